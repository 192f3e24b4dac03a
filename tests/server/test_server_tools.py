"""Calls of tools: both ways of writing them, whole and cut anywhere, and what is none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_helpers import error_of, events_of, run, serving, tiny_llm

from octavo.engine.outputs import CompletionOutput, OutputChunk, RequestMetrics, RequestOutput
from octavo.server.answers import Markup, Reading
from octavo.server.formats import ChatFormat, Head
from octavo.server.tools import ToolCall, ToolFormat, detect_format, make_parser
from octavo.text.chat import ChatTemplate

HERMES = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools> answer in <tool_call></tool_call>"
    "{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
)
LLAMA = (
    '{% if tools %}{{ tools | tojson }} Respond with {"name": …, "parameters": …}{% endif %}'
    "{% for m in messages %}{% if m.role == 'ipython' %}x{% endif %}{{ m.content }}{% endfor %}"
)
ONE = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "}"]}}\n</tool_call>'
TWO = f'{ONE}\n<tool_call>{{"name": "now", "arguments": {{}}}}</tool_call>'

# format, text, what is shown, calls as (name, arguments)
CASES: list[tuple[ToolFormat, str, str, list[tuple[str, Any]]]] = [
    ("hermes", "just words", "just words", []),
    ("hermes", ONE, "", [("add", {"a": 1, "b": [2, "}"]})]),
    ("hermes", TWO, "", [("add", {"a": 1, "b": [2, "}"]}), ("now", {})]),
    ("hermes", f"Let me see. {ONE}", "Let me see. ", [("add", {"a": 1, "b": [2, "}"]})]),
    ("hermes", f"{ONE} and so", " and so", [("add", {"a": 1, "b": [2, "}"]})]),
    ("hermes", "1 < 2 <tool_cal <tool", "1 < 2 <tool_cal <tool", []),
    ("hermes", "<tool_call>no json</tool_call>!", "<tool_call>no json</tool_call>!", []),
    ("hermes", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}}', "", [("f", {"x": 1})]),
    ("hermes", '<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "argum', []),
    ("hermes", "<tool_call>" + "[" * 5000, "<tool_call>" + "[" * 5000, []),
    (
        "hermes",
        r'<tool_call>{"name": "f", "arguments": {"x": "\ud800"}}',
        "",
        [("f", {"x": "\ud800"})],
    ),
    ("hermes", r'<tool_call>{"name": "\ud800"}', r'<tool_call>{"name": "\ud800"}', []),
    ("hermes", r'<tool_call>{"name": "f", "arguments": "{\"x\": 1}"}', "", [("f", {"x": 1})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "x = 1"}', "", [("f", "x = 1")]),
    ("llama3_json", "just words", "just words", []),
    ("llama3_json", '{"name": "add", "parameters": {"a": 1}}', "", [("add", {"a": 1})]),
    ("llama3_json", '\n {"name": "f", "arguments": {}} ', "", [("f", {})]),
    (
        "llama3_json",
        '<|python_tag|>{"name": "a", "parameters": {}}; {"name": "b", "parameters": {"x": ";"}}',
        "",
        [("a", {}), ("b", {"x": ";"})],
    ),
    ("llama3_json", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3_json", '{"name": "Alice", "age": 30}', '{"name": "Alice", "age": 30}', []),
    ("llama3_json", '{"name": "now"}', "", [("now", {})]),
    ("llama3_json", '{"type": "function", "name": "now"}', "", [("now", {})]),
    ("hermes", '<tool_call>{"name": "f", "x": 1}', "", [("f", {})]),
    *(
        ("llama3_json", text, text, [])
        for number in ("NaN", "-Infinity", "1e999")
        for text in [f'{{"name": "f", "parameters": {{"a": {number}}}}}']
    ),
    ("llama3_json", '{"name": "f", "parameters": {}} then', None, []),  # type: ignore[list-item]
    ("llama3_json", '{"name": "f", "para', '{"name": "f", "para', []),
    ("llama3_json", "", "", []),
    ("llama3_json", "  <|pyth", "  <|pyth", []),
    (
        "llama3_json",
        'I will.\n<|python_tag|>{"name": "f", "parameters": {}}',
        "I will.\n",
        [("f", {})],
    ),
    (
        "llama3_json",
        ' <|python_tag|>{"name": "f", "parameters": {}};<|python_tag|> {"name": "g"}',
        "",
        [("f", {}), ("g", {})],
    ),
    ("llama3_json", "so <|python_tag|>print(1)", "so <|python_tag|>print(1)", []),
    ("llama3_json", "a <|pyth then", "a <|pyth then", []),
]
CASES = [(a, b, b if c is None else c, d) for a, b, c, d in CASES]


def parse(tool_format: ToolFormat, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    parser = make_parser(tool_format)
    found = [piece for text in pieces for piece in parser.push(text)] + parser.finish()
    text = "".join(piece for piece in found if isinstance(piece, str))
    calls = [piece for piece in found if isinstance(piece, ToolCall)]
    assert all((call.name + call.arguments).encode() for call in calls)
    return text, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("index", range(len(CASES)))
def test_whole_and_letter_by_letter(index: int) -> None:
    tool_format, text, shown, calls = CASES[index]
    assert parse(tool_format, [text]) == (shown, calls)
    assert parse(tool_format, list(text)) == (shown, calls)
    assert parse(tool_format, [text[i : i + 7] for i in range(0, len(text), 7)]) == (shown, calls)


FRAGMENTS = [
    "<tool_call>",
    "</tool_call>",
    '{"name": "f", "arguments": {}}',
    "<",
    "tool",
    "\n",
    "a",
]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12), st.data())
def test_however_it_is_cut(fragments: list[str], data: st.DataObject) -> None:
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse("hermes", pieces) == parse("hermes", [text])


@given(st.text(alphabet="<tolcal_>/ {}", max_size=40))
def test_text_without_a_whole_call_is_shown_as_it_is(text: str) -> None:
    assert parse("hermes", list(text)) == (text, [])


def test_templates_tell_their_format() -> None:
    assert detect_format(HERMES) == "hermes"
    assert detect_format(LLAMA) == "llama3_json"
    assert detect_format("{% for m in messages %}{{ m.content }}{% endfor %}") is None
    assert detect_format("{{ tools }}{{ messages }}") is None


def test_a_message_with_calls() -> None:
    answer_format = ChatFormat(Head("id", 1, "m"), None, Reading(Markup("hermes")))
    metrics = RequestMetrics(0, 0, 0, 1, 1, 1, 0)
    output = CompletionOutput(0, TWO, (), "stop")
    result = RequestOutput("id", None, (1,), (output,), None, metrics)
    (choice,) = answer_format.whole([result], {})["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    calls = choice["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["add", "now"]
    assert all(call["type"] == "function" for call in calls)
    assert len({call["id"] for call in calls}) == 2

    cut_off = replace(output, finish_reason="length")
    (choice,) = answer_format.whole([replace(result, outputs=(cut_off,))], {})["choices"]
    assert choice["finish_reason"] == "length"


def test_a_stream_with_calls() -> None:
    answer_format = ChatFormat(Head("id", 1, "m"), None, Reading(Markup("hermes")))
    text = f"Well: {TWO}"
    chunks = [OutputChunk("id", 0, text[i : i + 5]) for i in range(0, len(text), 5)]
    chunks.append(OutputChunk("id", 0, "", finish_reason="stop"))
    written = "".join(answer_format.piece(0, chunk, "") for chunk in chunks)
    choices = [event["choices"][0] for event in events_of(written + "data: [DONE]\n\n")]
    shown = "".join(choice["delta"].get("content", "") for choice in choices)
    assert shown == "Well: "
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "add"), (1, "now")]
    assert json.loads(calls[0]["function"]["arguments"]) == {"a": 1, "b": [2, "}"]}
    assert [choice["finish_reason"] for choice in choices][-1] == "tool_calls"


def test_the_template_for_tools_says_the_format(tmp_path: Path) -> None:
    llm = tiny_llm(tmp_path)
    tools = ChatTemplate("{# <tool_call> #}{{ tools[0].function.name }}{{ messages[0].content }}")
    llm.chat_template = ChatTemplate("{{ messages[0].content }}", with_tools=tools)
    tool = {"type": "function", "function": {"name": "FFF", "parameters": {}}}

    async def test() -> None:
        async with serving(llm) as (client, _):
            for fields, prompt in (({}, "X"), ({"tools": [tool]}, "FFFX")):
                body = {"messages": [{"role": "user", "content": "X"}], **fields}
                answer = await client.post("/tokenize", json={**body, "return_token_strs": True})
                assert "".join(answer.json()["token_strs"]) == prompt
                response = await client.post("/v1/chat/completions", json={**body, "max_tokens": 1})
                assert response.status_code == 200

    run(test)


def test_tools_reach_the_template(tmp_path: Path) -> None:
    llm = tiny_llm(
        tmp_path, "{# <tool_call> #}{{ tools[0].function.name }}{{ messages[0].content }}"
    )
    tool = {"type": "function", "function": {"name": "FFF", "parameters": {}}}

    async def test() -> None:
        async with serving(llm) as (client, _):
            body = {"messages": [{"role": "user", "content": "X"}], "tools": [tool]}
            answer = await client.post("/tokenize", json={**body, "return_token_strs": True})
            assert "".join(answer.json()["token_strs"]) == "FFFX"
            for choice in ("auto", "none"):
                sent = {**body, "tool_choice": choice, "max_tokens": 2}
                response = await client.post("/v1/chat/completions", json=sent)
                assert response.status_code == 200
            for wrong in ({}, {"type": "function"}, {"type": "x", "function": {"name": "f"}}):
                sent = {**body, "tools": [tool, wrong]}
                error = error_of(await client.post("/v1/chat/completions", json=sent), 400)
                assert error["param"] == "tools[1]"
            sent = {**body, "tool_choice": {"type": "function", "function": {"name": "GGG"}}}
            error = error_of(await client.post("/v1/chat/completions", json=sent), 400)
            assert error["param"] == "tool_choice"
        async with serving(llm, tool_parser="none") as (client, _):
            error = error_of(await client.post("/v1/chat/completions", json=body), 400)
            assert error["param"] == "tools"
            assert "--tool-call-parser auto" in error["message"]

    run(test)
