"""Tools that must be called, in every format: what the model writes, and what clients get."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parrot import END, byte_tokens, write_parrot
from server_helpers import error_of, events_of, run, serving
from tool_texts import TOOLS as XML_TOOLS
from tool_texts import XML_CALLS, Call, cut, xml_call

from octavo.llm import LLM
from octavo.server.tool_calls import Arguments, ToolCall
from octavo.server.tool_xml import schemas_of
from octavo.server.tool_xml_grammar import tag_of_call
from octavo.server.tools import TAGS, ToolFormat, make_parser

pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")

CHAT = "/v1/chat/completions"
FORMATS: list[ToolFormat] = [*TAGS]
NUMBER = {"type": "integer", "minimum": 10, "maximum": 99}


def tool(name: str, key: str, **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {key: NUMBER}, "required": [key], **more}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


SPECIAL = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"),
    *("<|tool_call|>", "<|/tool_call|>", "<function_calls>", "</function_calls>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>"),
    *("<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
]
TOOLS = [tool("add", "x"), tool("send_mail", "to")]
# The text of the calls, as the model writes it; <N> is a name, <A> its arguments.
ONE = {
    "hermes": '<tool_call>\n{"name": "<N>", "arguments": <A>}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=<N>>\n<P></function>\n</tool_call>",
    "mistral_args": "[TOOL_CALLS]<N>[ARGS]<A>",
    "deepseek_v3": (
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜><N>\n```json\n<A>\n```<｜tool▁call▁end｜>"
    ),
    "deepseek_v31": "<｜tool▁call▁begin｜><N><｜tool▁sep｜><A><｜tool▁call▁end｜>",
    **dict.fromkeys(("llama3_json", "pythonic", "olmo3"), '{"name": "<N>", "parameters": <A>}'),
}
DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
FRAMES = {
    "mistral": (r"\[TOOL_CALLS\] ?\[", ", ", r"\]"),
    "granite": (r"<\|tool_call\|>\[", ", ", r"\]"),
    "phi4_mini_json": (r"functools\[", ", ", r"\]"),
    "phi4_mini_tags": (r"<\|tool_call\|>\[", ", ", r"\]<\|/tool_call\|>"),
    "deepseek_v3": (DEEPSEEK[0], "\n", DEEPSEEK[1]),
    "deepseek_v31": (DEEPSEEK[0], "", DEEPSEEK[1]),
    "mistral_args": ("", "", ""),
    **dict.fromkeys(("hermes", "qwen3_coder"), ("", "\n", "")),
    **dict.fromkeys(("llama3_json", "pythonic", "olmo3"), ("", "; ", "")),
}


def written(tool_format: ToolFormat) -> str:
    """An expression for the calls of a whole answer."""
    one = re.escape(ONE.get(tool_format, '{"name": "<N>", "arguments": <A>}'))
    cases = []
    for name, key in (("add", "x"), ("send_mail", "to")):
        arguments = rf'\{{\s*"{key}"\s*:\s*\d\d\s*\}}'
        parameters = rf"<parameter={key}>\n\d\d\n</parameter>\n"
        case = one.replace("<N>", name).replace("<A>", arguments).replace("<P>", parameters)
        cases.append(case)
    begin, between, end = FRAMES[tool_format]
    each = f"(?:{'|'.join(cases)})"
    return f"{begin}{each}(?:{re.escape(between)}{each})*{end}"


@pytest.fixture(scope="module", params=["text", "special"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says "no" of its own accord; marks of calls are text, or special tokens."""
    found: Path = tmp_path_factory.mktemp(request.param)
    special = SPECIAL if request.param == "special" else []
    chain = {"<go>": "no", "no": END}
    return write_parrot(found, chain, special=special, template="{{ tools }}<go>")


@pytest.mark.parametrize("tool_format", FORMATS)
def test_calls_that_must_come(folder: Path, tool_format: ToolFormat) -> None:
    llm = LLM(folder, num_threads=1)

    async def test() -> None:
        async with serving(llm) as (client, service):
            service.markup = replace(service.markup, tools=tool_format)
            numbers, names = set(), set()
            for seed in range(6):
                body = {
                    "messages": [{"role": "user", "content": "x"}],
                    **{"tools": TOOLS, "tool_choice": "required", "seed": seed},
                    **{"temperature": 1, "max_tokens": 1500, "logprobs": True},
                }
                (whole,) = (await client.post(CHAT, json=body)).json()["choices"]
                calls = whole["message"]["tool_calls"]
                assert whole["message"]["content"] is None
                assert whole["finish_reason"] == "tool_calls"
                tokens = whole["logprobs"]["content"]
                text = b"".join(bytes(each["bytes"]) for each in tokens).decode()
                assert re.fullmatch(written(tool_format), text), text
                for call in calls:
                    (key, value), *others = json.loads(call["function"]["arguments"]).items()
                    assert {"add": "x", "send_mail": "to"}[call["function"]["name"]] == key
                    assert 10 <= value <= 99 and not others
                    names.add(call["function"]["name"])
                    if tool_format.startswith("mistral"):
                        assert re.fullmatch("[A-Za-z0-9]{9}", call["id"])
                numbers.add(len(calls))
                streamed = await client.post(CHAT, json={**body, "stream": True})
                events = events_of(streamed.text)
                deltas = [event["choices"][0]["delta"] for event in events]
                found: list[dict[str, str]] = []
                for delta in deltas:
                    for each in delta.get("tool_calls", ()):
                        if "id" in each:
                            found.append({"name": each["function"]["name"], "arguments": ""})
                        found[each["index"]]["arguments"] += each["function"]["arguments"]
                assert found == [call["function"] for call in calls]
                assert not any(delta.get("content") for delta in deltas)
                assert sum("tool_calls" in delta for delta in deltas) > len(calls)
            assert len(names) == 2 and len(numbers) > 1
            # One tool by its name; an answer that is cut off.
            named = {"type": "function", "function": {"name": "send_mail"}}
            (one,) = (await client.post(CHAT, json={**body, "tool_choice": named})).json()[
                "choices"
            ]
            (call,) = one["message"]["tool_calls"]
            assert call["function"]["name"] == "send_mail"
            (one,) = (await client.post(CHAT, json={**body, "max_tokens": 3})).json()["choices"]
            assert one["finish_reason"] == "length" and not one["message"]["content"]
            # A schema that cannot be met is named, whatever stands around it.
            wrong = tool("f", "x", minProperties=2, maxProperties=1)
            sent = {**body, "tools": [*TOOLS, wrong]}
            error = error_of(await client.post(CHAT, json=sent), 400)
            assert error["param"] == "tools[2].function.parameters", error

    run(test)


def test_calls_that_must_come_behind_thoughts(tmp_path: Path) -> None:
    chain = {"<go>": "<think>", "<think>": "hmm", "hmm": "</think>"}
    folder = write_parrot(tmp_path, chain, template="{{ tools }}</think><go>")
    llm = LLM(folder, num_threads=1)

    async def test() -> None:
        async with serving(llm) as (client, service):
            for tool_format in FORMATS:
                service.markup = replace(service.markup, tools=tool_format)
                body = {
                    "messages": [{"role": "user", "content": "x"}],
                    **{"tools": TOOLS[:1], "tool_choice": "required", "seed": 3},
                    **{"temperature": 1, "max_tokens": 1500, "parallel_tool_calls": False},
                }
                (one,) = (await client.post(CHAT, json=body)).json()["choices"]
                (call,) = one["message"]["tool_calls"]
                assert one["message"]["reasoning"] == "hmm" and not one["message"]["content"]
                assert call["function"]["name"] == "add"
                assert {*json.loads(call["function"]["arguments"])} == {"x"}

    run(test)


def forced(pieces: list[str], tools: list[Any]) -> list[tuple[str, str]]:
    parser, calls = make_parser("qwen3_coder", "only", tools), list[tuple[str, str]]()
    for piece in [each for text in pieces for each in parser.push(text)] + parser.finish():
        if isinstance(piece, ToolCall):
            calls.append((piece.name, piece.arguments))
        else:
            assert isinstance(piece, Arguments)
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return calls


@given(XML_CALLS, st.lists(st.integers(0, 10**6), max_size=8))
def test_parameters_in_tags_come_one_by_one(calls: list[Call], places: list[int]) -> None:
    text = "\n".join(map(xml_call, calls))
    for pieces in ([text], list(text), cut(text, places)):
        found = forced(pieces, XML_TOOLS)
        assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    # What is cut off has the parameters that are complete.
    for length in range(0, len(text), 7):
        for (name, arguments), (whole_name, whole) in zip(
            forced([text[:length]], XML_TOOLS), calls, strict=False
        ):
            assert name == whole_name and json.dumps(whole)[:1] == "{"
            closed = arguments if arguments.endswith("}") else f"{arguments or '{'}}}"
            assert json.loads(closed).items() <= whole.items() if not nested(whole) else True


def nested(value: dict[str, Any]) -> bool:
    return any(isinstance(each, (dict, list)) for each in value.values())


def test_a_long_value_with_tags_in_it_is_not_read_anew_with_every_piece() -> None:
    value = "</function>" + "abc\n" * 15000
    text, begun = xml_call(("f", {"text": value})), time.process_time()
    pieces = [text[i : i + 4] for i in range(0, len(text), 4)]
    assert forced(pieces, XML_TOOLS) == [("f", json.dumps({"text": value}))]
    assert time.process_time() - begun < 2  # seconds; it takes a tenth of that


def test_json_within_tags_is_read_where_tags_cannot_say_it() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"a": "<function=g>\\n"}}\n</tool_call>\n'
    for pieces in ([text * 2], list(text * 2)):
        assert forced(pieces, []) == [("f", '{"a": "<function=g>\\n"}')] * 2


TEXT = {"type": "string"}
SAYABLE: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"properties": {"a": TEXT}}, True),
    ({"properties": {"a": {**TEXT, "description": "d"}}, "required": ["a"]}, True),
    ({"properties": {"a": {"enum": ["x", "y"]}}, "additionalProperties": False}, True),
    ({"properties": {"a": {"$ref": "#/$defs/n"}}, "$defs": {"n": NUMBER}}, True),
    ({"properties": {"a": {"type": ["integer", "null"]}}}, True),
    ({"properties": {"a": {"type": ["string", "null"]}}}, False),
    ({"properties": {"a": {}}}, False),
    ({"properties": {"a": True}}, False),
    ({"properties": {"a": {**TEXT, "pattern": "x+"}}}, False),
    ({"properties": {"a": {**TEXT, "maxLength": 5}}}, False),
    ({"properties": {"a>": NUMBER}}, False),
    ({"properties": {"a": NUMBER}, "required": ["b"]}, False),
    ({"properties": {"a": NUMBER}, "minProperties": 1}, False),
    ({"properties": {"a": NUMBER}, "additionalProperties": NUMBER}, False),
    ({"properties": {"a": NUMBER}, "anyOf": [{"required": ["a"]}]}, False),
    ({"properties": {"a": {**TEXT, "const": 5}}}, False),
    ({"properties": {"a": {**TEXT, "enum": "ab"}}}, False),
    ({"properties": {"a": {"enum": ["x", "a</parameter>"]}}}, False),
    ({"properties": [1]}, False),
    ({"required": True}, False),
    ({"required": [["a"]]}, False),
]


@pytest.mark.parametrize(("schema", "is_sayable"), SAYABLE, ids=str)
def test_what_tags_can_say(schema: dict[str, Any], is_sayable: bool) -> None:
    parameters = {"type": "object", **schema}
    assert (tag_of_call("f", parameters, strict=False) is not None) == is_sayable
    assert tag_of_call("f>", parameters, strict=False) is None


def test_what_is_no_string_is_no_choice_of_strings() -> None:
    properties = {"a": {**TEXT, "enum": ["x", None]}}
    tag: Any = tag_of_call("f", {"properties": properties, "required": ["a"]}, strict=False)
    (parameter,) = tag["content"]["elements"]
    assert parameter["content"] == {"type": "const_string", "value": "x"}


def test_strings_in_tags_are_free_or_chosen(tmp_path: Path) -> None:
    """The model says "<b>" behind a line break where it may, and then ends the value."""
    (newline,) = byte_tokens(b"\n")
    close = "\n</parameter>\n"  # begins with a line break, so it may end "<parameter=text>"
    chain = {"<go>": "no", "no": END, newline: "<b>", "<b>": close, close: "<b>"}
    llm = LLM(write_parrot(tmp_path, chain, template="{{ tools }}<go>"), num_threads=1)
    properties = {"text": TEXT, "kind": {"enum": ["a\n", "bc"]}, "count": NUMBER}
    function = {
        "name": "f",
        "parameters": {"properties": properties, "required": ["text", "kind"]},
    }
    tools = [{"type": "function", "function": function}]

    async def test() -> None:
        async with serving(llm) as (client, service):
            service.markup = replace(service.markup, tools="qwen3_coder")
            keys = set()
            for seed in range(8):
                body = {
                    "messages": [{"role": "user", "content": "x"}],
                    **{"tools": tools, "tool_choice": "required", "parallel_tool_calls": False},
                    **{"seed": seed, "temperature": 1, "max_tokens": 1500},
                }
                (one,) = (await client.post(CHAT, json=body)).json()["choices"]
                (call,) = one["message"]["tool_calls"]
                arguments = json.loads(call["function"]["arguments"])
                assert arguments["text"].endswith("<b>")
                assert arguments["kind"] in ("a\n", "bc")
                assert isinstance(arguments.get("count", 10), int)
                keys.add(tuple(arguments))
            assert keys == {("text", "kind"), ("text", "kind", "count")}

    run(test)


def test_schemas_of_malformed_tools_are_none() -> None:
    for tools in ([], [{}], [{"function": 5}], [{"function": {"name": "f", "parameters": 5}}]):
        assert schemas_of(tools, "f") == {}  # type: ignore[arg-type]
