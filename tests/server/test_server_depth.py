"""Values within values: what is nested too deep is refused at once, and nothing less deep fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from server_helpers import TEMPLATE, fake_llm, run, serving

from octavo.llm import LLM
from octavo.server.middleware import MAX_DEPTH

DEEP = "DEEP"  # becomes a value that is as deep as is asked for
USER = [{"role": "user", "content": "Hi"}]
PLAIN = {"type": "function", "function": {"name": "f"}, "name": "f"}  # for chats and responses
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"a": DEEP}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": DEEP}}}
SCHEMA = {"type": "json_schema", "name": "s", "schema": {"a": DEEP}}
BODIES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "/v1/chat/completions": (
        {"messages": USER},
        [
            {"unknown": DEEP},
            {"messages": DEEP},
            {"messages": [{"role": "user", "content": DEEP}]},
            {"messages": [{"role": "user", "content": "Hi", "more": DEEP}]},
            {"messages": [*USER, {"role": "assistant", "tool_calls": [CALL]}], "tools": [PLAIN]},
            {"tools": [TOOL]},
            {"tools": [TOOL], "tool_choice": "required"},
            {"tool_choice": {"a": DEEP}},
            {"documents": [{"a": DEEP}]},
            {"chat_template_kwargs": {"shown": DEEP}},
            {"response_format": {"type": "json_schema", "json_schema": SCHEMA}},
            {"response_format": {"type": "structural_tag", "format": DEEP}},
            {"logit_bias": DEEP},
            {"stream_options": {"a": DEEP}},
            {"metadata": {"a": DEEP}},
        ],
    ),
    "/v1/completions": (
        {"prompt": "ABC"},
        [{"prompt": DEEP}, {"guided_json": {"a": DEEP}}, {"guided_choice": DEEP}],
    ),
    "/v1/responses": (
        {"input": "Hi"},
        [
            {"input": DEEP},
            {"input": [{"role": "user", "content": DEEP}]},
            {"metadata": {"a": DEEP}},
            {"text": {"format": SCHEMA}},
            {"tools": [{"type": "function", "name": "f", "parameters": {"a": DEEP}}]},
            {"tool_choice": {"a": DEEP}},
            {"reasoning": {"a": DEEP}},
        ],
    ),
    "/v1/messages": (
        {"messages": USER, "max_tokens": 3},
        [
            {"system": DEEP},
            {"metadata": DEEP},
            {"tools": [{"name": "f", "input_schema": {"a": DEEP}}]},
            {"output_config": {"format": SCHEMA}},
        ],
    ),
    "/v1/messages/count_tokens": ({"messages": USER}, [{"system": DEEP}, {"unknown": DEEP}]),
    "/v1/embeddings": ({"input": "x"}, [{"input": DEEP}]),
    "/tokenize": ({}, [{"prompt": DEEP}, {"messages": USER, "tools": [TOOL]}]),
    "/detokenize": ({"tokens": [1]}, [{"tokens": DEEP}]),
    "/v1/load_lora_adapter": ({"lora_name": "a"}, [{"lora_path": DEEP}]),
    "/v1/unload_lora_adapter": ({"lora_name": "a"}, [{"unknown": DEEP}]),
}
SHOWN = (
    "{# </think> #}{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    "{{ shown | tojson if shown }}"
)


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    return fake_llm(tmp_path, SHOWN + TEMPLATE, num_blocks=512, max_model_len=4096)


def content_of(body: dict[str, Any], depth: int, begin: str, end: str) -> str:
    """The body as JSON, as deep as is asked for."""
    before, behind = json.dumps(body).split(json.dumps(DEEP))
    levels = depth - sum(map(before.count, "[{")) + sum(map(before.count, "]}"))
    return before + begin * levels + "1" + end * levels + behind


@pytest.mark.parametrize("path", BODIES)
def test_depth_has_a_limit_everywhere(llm: LLM, path: str) -> None:
    base, fields = BODIES[path]

    async def test() -> None:
        async with serving(llm) as (client, _):
            for more in fields:
                for brackets in (("[", "]"), ('{"a":', "}")):
                    texts = [content_of({**base, **more}, MAX_DEPTH + i, *brackets) for i in (0, 1)]
                    at_limit, deeper = [
                        await client.post(
                            path, content=text, headers={"content-type": "application/json"}
                        )
                        for text in texts
                    ]
                    assert at_limit.status_code < 500, (more, at_limit.text)
                    assert "within each other" not in at_limit.text
                    assert deeper.status_code == 400
                    message = deeper.json()["error"]["message"]
                    assert f"the body has more than {MAX_DEPTH} lists and objects within" in message

    run(test)


def test_json_within_a_text_may_be_of_any_depth(llm: LLM) -> None:
    """It is refused, or a text like any other."""

    async def test() -> None:
        async with serving(llm) as (client, _):
            for levels in (200, 900, *range(970, 990), 5000, 100_000):
                text = '{"a":' * levels + "1" + "}" * levels
                function = {"name": "f", "arguments": text}
                calls = [{"id": "c", "type": "function", "function": function}]
                messages = [{"role": "assistant", "tool_calls": calls}, *USER]
                item = {"type": "function_call", "call_id": "c", **function}
                bodies: list[tuple[str, dict[str, Any]]] = [
                    ("chat/completions", {"messages": USER, "guided_json": text}),
                    ("chat/completions", {"messages": messages, "tools": [PLAIN]}),
                    ("completions", {"prompt": "ABC", "guided_json": text}),
                    ("completions", {"prompt": "ABC", "structured_outputs": {"json": text}}),
                    ("responses", {"input": [item, *USER], "tools": [PLAIN]}),
                ]
                for path, body in bodies:
                    response = await client.post(f"/v1/{path}", json=body)
                    assert response.status_code in (200, 400), (levels, response.text)

    run(test)


def test_brackets_within_texts_have_no_depth(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            for text in ("[" * 400, '"[\\' * 300, "\\" + '{"a":' * 99):
                body = {"messages": [{"role": "user", "content": "Hi", "more": text}]}
                response = await client.post("/v1/chat/completions", json=body)
                assert response.status_code == 200, response.text
            wide = {"prompt": [[1, 2]] * 300, "max_tokens": 1}
            assert (await client.post("/v1/completions", json=wide)).status_code == 200

    run(test)
