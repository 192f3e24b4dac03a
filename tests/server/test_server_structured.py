"""Structured outputs over HTTP: every spelling of them, and tools that must be called."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from parrot import END, write_parrot
from server_helpers import error_of, events_of, run, serving

from octavo.grammar import compiler
from octavo.llm import LLM
from octavo.server.tool_calls import Arguments, ToolCall
from octavo.server.tool_forced import ForcedParser

pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 10, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}
JSON = re.compile(r'\{"a":[0-9]{2}\}')
# Of its own accord the model says "no" after everything.
CHAIN = {"<go>": "no", "no": END, "<ask>": "no"}
TEMPLATE = (
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}<go>"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {key: {"$ref": "#/$defs/n"}},
                "required": [key],
                "$defs": {"n": {"enum": [numbers, {"}": "\\"}]}},
            },
        },
    }
    for name, key, numbers in (("add", "x", 5), ("send mail", "to", "]}"))
]


@pytest.fixture(scope="module", params=["text", "special"])
def tagged(request: Any, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """The tags of calls are text, or special tokens."""
    special = ["<tool_call>", "</tool_call>"] if request.param == "special" else []
    folder = tmp_path_factory.mktemp(request.param)
    spelled = {**CHAIN, "ad": "d", '{"': "nam"}
    return LLM(write_parrot(folder, spelled, special=special, template=TEMPLATE), num_threads=1)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("model")
    return LLM(write_parrot(folder, CHAIN, template=TEMPLATE), num_threads=1)


def message(**more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "x"}]
    return {"messages": messages, "max_tokens": 400, "seed": 5, "temperature": 1, **more}


COMPACT = {"disable_any_whitespace": True}
SCHEMA_FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
TAG = {"begin": "no<", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": ">"}
ONE_TAG = {
    **{"type": "triggered_tags", "triggers": ["no"], "tags": [{"type": "tag", **TAG}]},
    **{"stop_after_first": True},
}
OLDER_TAG = {"triggers": ["("], "structures": [{"begin": "(", "schema": SCHEMA, "end": ")"}]}
SPELLINGS: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"json": SCHEMA, **COMPACT}}, r'\{"a":[0-9]{2}\}'),
    ({"structured_outputs": {"json": json.dumps(SCHEMA), **COMPACT}}, r'\{"a":[0-9]{2}\}'),
    ({"structured_outputs": {"regex": "[ab]{3}", "disable_fallback": False}}, "[ab]{3}"),
    (
        {"guided_json": SCHEMA, "guided_whitespace_pattern": "  "},
        r'\{( *)"a"( *):( *)[0-9]{2}( *)\}',
    ),
    ({"guided_json": SCHEMA, "guided_decoding_backend": "auto"}, r'\{\s*"a"\s*:\s*[0-9]{2}\s*\}'),
    ({"guided_regex": r"\d-\d"}, "[0-9]-[0-9]"),
    ({"guided_choice": ["yes", "maybe"]}, "yes|maybe"),
    ({"guided_grammar": 'root ::= "u" | "v" root'}, "v*u"),
    ({"response_format": SCHEMA_FORMAT}, r'\{\s*"a"\s*:\s*[0-9]{2}\s*\}'),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, r'\{\s*"a"\s*:\s*..\s*\}'),
    (
        {"response_format": {"type": "structural_tag", "format": ONE_TAG}},
        r'no<\{\s*"a"\s*:\s*..\s*\}>',
    ),
    (
        {"structured_outputs": {"structural_tag": {"format": ONE_TAG}, **COMPACT}},
        r'no<\{"a":[0-9]{2}\}>',
    ),
    ({"structured_outputs": {"structural_tag": json.dumps(OLDER_TAG)}}, "no"),
    ({"response_format": {"type": "structural_tag", **OLDER_TAG}}, "no"),
    ({"response_format": {"type": "text"}}, "no"),
    ({"structured_outputs": {}}, "no"),
    ({"guided_json_object": False}, "no"),
]


@pytest.mark.parametrize(("fields", "pattern"), SPELLINGS, ids=lambda each: str(each)[:50])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_every_spelling(llm: LLM, path: str, fields: dict[str, Any], pattern: str) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            body = message(**fields)
            if path == COMPLETIONS:
                body["prompt"] = ["<ask>", "<ask>"]
                del body["messages"]
            answer = await client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            for choice in answer.json()["choices"]:
                text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
                assert re.fullmatch(pattern, text), text
                assert choice["finish_reason"] == "stop"
            streamed = await client.post(path, json={**body, "stream": True})
            pieces = [""] * 2
            for event in events_of(streamed.text):
                for one in event["choices"]:
                    pieces[one["index"]] += one.get("text") or one.get("delta", {}).get(
                        "content", ""
                    )
            assert [bool(re.fullmatch(pattern, piece)) for piece in pieces if piece]

    run(test)


def test_strict_refuses_what_it_cannot_enforce(llm: LLM) -> None:
    schema = {**SCHEMA, "not": {"const": 5}}

    async def test() -> None:
        async with serving(llm) as (client, _):
            for strict in (False, None, True):
                inner = {"name": "s", "schema": schema, "strict": strict}
                wanted = {"type": "json_schema", "json_schema": inner}
                answer = await client.post(CHAT, json=message(response_format=wanted))
                if strict:
                    error = error_of(answer, 400)
                    assert error["param"] == "response_format" and '"not"' in error["message"]
                else:
                    content = answer.json()["choices"][0]["message"]["content"]
                    assert JSON.fullmatch("".join(content.split()))

    run(test)


CHOICES: list[tuple[Any, Any, set[str]]] = [
    ("required", None, {"add", "send mail"}),
    ("required", False, {"add", "send mail"}),
    ({"type": "function", "function": {"name": "send mail"}}, None, {"send mail"}),
]


@pytest.mark.parametrize(("choice", "parallel", "names"), CHOICES)
def test_a_tool_that_must_be_called(
    tagged: LLM, choice: Any, parallel: Any, names: set[str]
) -> None:
    async def test() -> None:
        async with serving(tagged) as (client, _):
            seen = set()
            for seed in range(8):
                body = message(tools=TOOLS, tool_choice=choice, seed=seed, max_tokens=1900)
                body["parallel_tool_calls"] = parallel
                (whole,) = (await client.post(CHAT, json=body)).json()["choices"]
                calls = whole["message"]["tool_calls"]
                assert whole["message"]["content"] is None
                assert whole["finish_reason"] == "tool_calls"
                assert len(calls) == 1 or (parallel is not False and choice == "required")
                streamed = await client.post(CHAT, json={**body, "stream": True})
                events = events_of(streamed.text)
                assert joined(events) == [call["function"] for call in calls]
                for call in calls:
                    function = call["function"]
                    seen.add(function["name"])
                    (key, value), *others = json.loads(function["arguments"]).items()
                    expected = {"add": ("x", 5), "send mail": ("to", "]}")}[function["name"]]
                    assert key == expected[0] and value in (expected[1], {"}": "\\"}) and not others
                deltas = [event["choices"][0]["delta"] for event in events]
                assert sum("tool_calls" in delta for delta in deltas) > 6  # as it grows
                assert not any(delta.get("content") for delta in deltas)
            assert seen == names

    run(test)


def joined(events: list[Any]) -> list[dict[str, str]]:
    """The calls of a stream, put together as clients do."""
    calls: list[dict[str, str]] = []
    for event in events:
        for delta in event["choices"][0]["delta"].get("tool_calls", ()):
            if "id" in delta:
                assert delta["index"] == len(calls) and delta["type"] == "function"
                calls.append({"name": delta["function"]["name"], "arguments": ""})
            calls[delta["index"]]["arguments"] += delta["function"]["arguments"]
    return calls


def test_llama_3_writes_calls_without_tags(tmp_path: Path) -> None:
    template = '{# "parameters" ipython #}{{ tools }}{{ messages[0].content }}<go>'
    llm = LLM(write_parrot(tmp_path, CHAIN, template=template), num_threads=1)

    async def test() -> None:
        async with serving(llm) as (client, service):
            assert service.markup.tools == "llama3_json"
            numbers = set()
            for seed in range(5):
                body = message(tools=TOOLS, tool_choice="required", seed=seed)
                (whole,) = (await client.post(CHAT, json=body)).json()["choices"]
                numbers.add(len(whole["message"]["tool_calls"]))
                for call in whole["message"]["tool_calls"]:
                    assert json.loads(call["function"]["arguments"]).keys() <= {"x", "to"}
            assert len(numbers) > 1
            # What a schema demands is the answer, even where it looks like a call.
            wanted = {"const": {"name": "go", "parameters": {"x": 1}}}
            schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": wanted}}
            body = message(tools=TOOLS, response_format=schema)
            (whole,) = (await client.post(CHAT, json=body)).json()["choices"]
            assert json.loads(whole["message"]["content"]) == wanted["const"]
            assert whole["finish_reason"] == "stop" and "tool_calls" not in whole["message"]

    run(test)


def test_a_call_that_is_cut_off_says_so(tagged: LLM) -> None:
    async def test() -> None:
        async with serving(tagged) as (client, _):
            body = message(tools=TOOLS, tool_choice="required", max_tokens=44)
            (whole,) = (await client.post(CHAT, json=body)).json()["choices"]
            assert whole["finish_reason"] == "length"
            for length in (1, 3, 9):  # before its name is whole
                cut = {**body, "max_tokens": length}
                (whole,) = (await client.post(CHAT, json=cut)).json()["choices"]
                streamed = events_of((await client.post(CHAT, json={**cut, "stream": True})).text)
                deltas = [event["choices"][0]["delta"] for event in streamed]
                assert whole["message"] == {"role": "assistant", "content": ""}
                assert not any(delta.get("content") or "tool_calls" in delta for delta in deltas)

    run(test)


def test_a_call_that_a_stop_string_cuts_off_is_none_to_be_made(tagged: LLM) -> None:
    async def test() -> None:
        async with serving(tagged) as (client, _):
            for stop, reason in (('"x"', "stop"), ("</tool_call>", "tool_calls")):
                body = message(tools=TOOLS[:1], tool_choice="required", max_tokens=1900, stop=stop)
                (whole,) = (await client.post(CHAT, json=body)).json()["choices"]
                assert whole["finish_reason"] == reason and whole["stop_reason"] == stop
                assert len(whole["message"]["tool_calls"]) == 1
                streamed = events_of((await client.post(CHAT, json={**body, "stream": True})).text)
                assert streamed[-1]["choices"][0]["finish_reason"] == reason

    run(test)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function"}, "tools": TOOLS}, "tool_choice"),
    ({"tool_choice": {"function": {"name": "x"}}, "tools": TOOLS}, "tool_choice"),
    (
        {"tool_choice": "required", "tools": TOOLS, "guided_regex": "a"},
        "guided_regex",
    ),
    (
        {
            "tool_choice": "required",
            "tools": [
                *TOOLS,
                {
                    "type": "function",
                    "function": {
                        "name": "f",
                        "strict": True,
                        "parameters": {"properties": {"a": {"not": {"const": 1}}}},
                    },
                },
            ],
        },
        "tools[2].function.parameters",
    ),
    *(
        (
            {"tool_choice": "required", "tools": [*TOOLS, {"type": "function", "function": f}]},
            "tools[2].function.parameters",
        )
        for f in (
            {"name": "f", "parameters": {"required": ["a"], "properties": {"a": False}}},
            {"name": "f", "parameters": {"type": "object", "minProperties": 2, "maxProperties": 1}},
            {"name": "f", "parameters": False},
            {"name": "f", "parameters": {"type": "string"}},
            {"name": "f", "parameters": {"type": ["array", "null"]}},
            {"name": "f", "parameters": ["a"]},
            {
                "name": "f",
                "parameters": {"properties": {"a": {"pattern": "(?=b)"}}},
                "strict": True,
            },
        )
    ),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=lambda each: str(each)[:40])
def test_wrong_choices_of_tools_are_named(tagged: LLM, fields: dict[str, Any], param: str) -> None:
    async def test() -> None:
        async with serving(tagged) as (client, _):
            error = error_of(await client.post(CHAT, json=message(**fields)), 400)
            assert error["param"] == param, error

    run(test)


def test_what_cannot_be_enforced_of_a_tool_is_left_out_unless_it_is_strict(tagged: LLM) -> None:
    pattern = {"type": "string", "pattern": "(?=b)b", "enum": ["c"]}
    parameters = {"type": "object", "properties": {"a": pattern}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}

    async def test() -> None:
        async with serving(tagged) as (client, _):
            body = message(tools=[tool], tool_choice="required", parallel_tool_calls=False)
            (whole,) = (await client.post(CHAT, json=body)).json()["choices"]
            (call,) = whole["message"]["tool_calls"]
            assert json.loads(call["function"]["arguments"]) == {"a": "c"}

    run(test)


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": ["null", "object"], "maxProperties": 0},
        {"anyOf": [{"type": "string"}, {"type": "object", "properties": {}}]},
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            **{"$ref": "#/definitions/a", "definitions": {"a": {"enum": ["a", {}]}}},
        },
    ],
)
def test_arguments_are_an_object(llm: LLM, parameters: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}

    async def test() -> None:
        async with serving(llm) as (client, _):
            for seed in range(4):
                body = message(tools=[tool], tool_choice="required", seed=seed, max_tokens=1900)
                (whole,) = (await client.post(CHAT, json=body)).json()["choices"]
                for call in whole["message"]["tool_calls"]:
                    assert json.loads(call["function"]["arguments"]) == {}

    run(test)


def test_a_grammar_that_is_slow_to_compile_holds_nobody_up(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the event loop nor the engine's thread waits for it."""
    start = compiler.start_matcher

    def slow(*arguments: Any) -> Any:
        time.sleep(1.5)
        return start(*arguments)

    async def test() -> None:
        async with serving(llm) as (client, _):
            await client.post(CHAT, json=message())
            monkeypatch.setattr(compiler, "start_matcher", slow)
            started = time.monotonic()
            waiting = asyncio.ensure_future(client.post(CHAT, json=message(guided_regex="slow|er")))
            await asyncio.sleep(0.05)
            num_before = 0
            while not waiting.done():
                answer: httpx.Response = await client.post(CHAT, json=message())
                assert answer.status_code == 200
                num_before += 1
                await asyncio.sleep(0.005)
            assert time.monotonic() - started > 1.4 and num_before > 5
            assert (await waiting).json()["choices"][0]["message"]["content"] in ("slow", "er")

    run(test)


def test_a_parser_of_forced_calls_takes_any_cut() -> None:
    text = (
        '<tool_call>\n{"name": "a\\"b", "arguments": {"x": "\\\\\\"}{", "y": [{}, "]"]}}\n'
        '</tool_call>\n<tool_call>\n{"name": "c", "arguments": {}}\n</tool_call>'
    )
    expected = [('a"b', {"x": '\\"}{', "y": [{}, "]"]}), ("c", {})]
    for size in (1, 2, 3, 7, len(text)):
        parser, calls = ForcedParser(), list[tuple[str, str]]()
        for begin in range(0, len(text), size):
            for piece in parser.push(text[begin : begin + size]):
                if isinstance(piece, ToolCall):
                    calls.append((piece.name, ""))
                else:
                    assert isinstance(piece, Arguments)
                    calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
        assert [(name, json.loads(arguments)) for name, arguments in calls] == expected
        assert parser.finish() == []
