"""OpenAI's Responses API: what is refused and by which name, what is welcome, what a slip is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from parrot import say, write_parrot
from response_helpers import ask_responses as ask
from response_helpers import shown
from server_helpers import error_of, tiny_llm

from octavo.llm import LLM

TEMPLATE = (
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)
TOOLS = [
    {"type": "function", "name": "add", "parameters": {}},
    {"type": "function", "name": "now", "parameters": {}},
]
CALLED = {"type": "function_call", "call_id": "1", "name": "add", "arguments": "{}"}
FORMAT = {"type": "json_schema", "name": "person", "schema": {"type": "object"}}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("parrot")
    write_parrot(folder, say("Hello", " there", after="hello"), template=TEMPLATE)
    return LLM(folder, num_threads=1, num_kv_blocks=64, max_model_len=900)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored here"),
    ({"conversation": "conv_1"}, "conversation", "nothing is stored here"),
    ({"background": True}, "background", "wait for the answer"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt", "instructions and input"),
    ({"truncation": "auto"}, "truncation", "expected 'disabled'"),
    ({"messages": [{}]}, "messages", "its name here is input"),
    ({"max_tokens": 5}, "max_tokens", "its name here is max_output_tokens"),
    ({"max_completion_tokens": 5}, "max_completion_tokens", "max_output_tokens"),
    ({"response_format": {"type": "text"}}, "response_format", "text.format"),
    ({"logprobs": True}, "logprobs", "its name here is include"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "reasoning.effort"),
    ({"prompt_logprobs": 1}, "prompt_logprobs", "/v1/chat/completions"),
    ({"echo": True}, "echo", "/v1/chat/completions"),
    ({"context_management": [{"type": "compaction"}]}, "context_management", "leave out"),
    ({"moderation": {"model": "m"}}, "moderation", "leave it out"),
    ({"mirostat": 2}, "mirostat", "use min_p"),
    ({"n": 2}, "n", "expected 1"),
    ({"top_logprobs": 2}, "top_logprobs", "message.output_text.logprobs"),
    ({"include": ["x"]}, "include[0]", "expected one of"),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "leave it out"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format", "of type 'grammar'"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format", "without a schema"),
    ({"text": {"format": {**FORMAT, "schema": {"type": "what"}}}}, "text.format", "what"),
    ({"text": {"format": {**FORMAT, "name": None}}}, "text.format", "without a name"),
    ({"text": 5}, "text", "text"),
    ({"tools": [{**TOOLS[0], "strict": 1}]}, "tools[0].strict", "expected bool"),
    ({"tools": [{**TOOLS[0], "parameters": []}]}, "tools[0].parameters", "expected dict"),
    ({"metadata": {"a": 1}}, "metadata.a", "string"),
    ({"tools": [TOOLS[0], {"type": "web_search"}]}, "tools[1]", "runs no tools"),
    ({"tools": [{"type": "function"}]}, "tools[0].name", "has no name"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "'add'"),
    ({"tools": TOOLS, "tool_choice": {"type": "file_search"}}, "tool_choice", "allowed_tools"),
    ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
    ({"input": []}, "input", "is an empty list"),
    ({"input": 5}, "input", "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "send the item itself"),
    ({"input": [{"type": "web_search_call"}]}, "input[0]", "of type 'web_search_call'"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "'tool'"),
    ({"input": [{"role": "user"}]}, "input[0].content", "null or missing"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0]",
        "reads texts only",
    ),
    ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "expected a text"),
    (
        {"input": [CALLED, {**CALLED, "arguments": "{"}, {"role": "user", "content": "x"}]},
        "input[1]",
        "input[1] has arguments that are no JSON",
    ),
    ({"max_output_tokens": 3, "min_tokens": 5}, "min_tokens", "min_tokens"),
    ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens"),
    ({"input": "a" * 900}, "input", "900"),
    ({"temperature": -1}, "temperature", "temperature"),
    ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "messages"),
]


@pytest.fixture(scope="module")
def refusals(llm: LLM) -> list[httpx.Response]:
    bodies = [{"input": "hello", **fields} for fields, _, _ in REFUSED]
    return ask(llm, *bodies)


@pytest.mark.parametrize("index", range(len(REFUSED)), ids=lambda i: str(REFUSED[i][0])[:50])
def test_what_is_refused_is_named(refusals: list[httpx.Response], index: int) -> None:
    _, param, words = REFUSED[index]
    error = error_of(refusals[index], 400)
    assert error["param"] == param
    assert words in error["message"]


def test_the_parameters_of_a_tool_are_blamed_by_their_place_here(llm: LLM) -> None:
    bad = {"type": "function", "name": "bad", "parameters": {"type": "what"}}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"name": "bad"}]}
    for choice in ("required", allowed):
        body = {"input": "must", "tools": [TOOLS[0], bad], "tool_choice": choice}
        error = error_of(ask(llm, body)[0], 400)
        assert error["param"] == "tools[1].parameters"


def test_an_error_of_the_template_names_the_item(tmp_path: Path) -> None:
    llm = tiny_llm(tmp_path, "{{ raise_exception('no') }}")
    assert error_of(ask(llm, {"input": "hello"})[0], 400)["param"] == "input"
    plain = tiny_llm(tmp_path)
    error = error_of(ask(plain, {"input": "hello", "tools": TOOLS})[0], 400)
    assert error["param"] == "tools"


HARMLESS: list[dict[str, Any]] = [
    {"truncation": "disabled", "store": False, "background": False, "previous_response_id": None},
    {"include": ["reasoning.encrypted_content"], "prompt_cache_key": "k", "max_tool_calls": 3},
    {"reasoning": {"effort": "low", "summary": "auto"}, "service_tier": "auto"},
    {"text": {"format": None, "verbosity": "medium"}, "tools": [], "tool_choice": "auto"},
    {"stream_options": {"include_obfuscation": False}, "safety_identifier": "s", "messages": []},
    {"max_output_tokens": -1, "top_k": 3, "min_p": 0.1, "seed": 3, "priority": 1, "n": 1},
]


@pytest.mark.parametrize("fields", HARMLESS, ids=str)
def test_what_asks_for_nothing_is_welcome(llm: LLM, fields: dict[str, Any]) -> None:
    (response,) = ask(llm, {"input": "hello", **fields})
    assert shown(response.json()) == [("message", "Hello there")]
    assert "x-octavo-warning" not in response.headers


def test_a_slip_is_told(llm: LLM) -> None:
    fields = {"instuctions": "x", "max_ouput_tokens": 5, "frobnicate": 1}
    (response,) = ask(llm, {"input": "hello", **fields})
    warning = response.headers["x-octavo-warning"]
    assert "instructions" in warning and "max_output_tokens" in warning
    assert "frobnicate" not in warning
