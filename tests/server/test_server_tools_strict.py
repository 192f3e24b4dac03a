"""Tools with strict that may be called, in every format: whatever is drawn at random."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from typing import Any

import jsonschema
import pytest
from call_walks import CallWalk, load
from grammar_helpers import follows

from octavo.llm import LLM
from octavo.server.answer_grammar import answer_grammar
from octavo.server.answers import Markup
from octavo.server.protocol import ChatBody
from octavo.server.reasoning import REASONING
from octavo.server.structured import as_tag
from octavo.server.tag_parts import tag
from octavo.server.tool_calls import read_python_calls
from octavo.server.tool_parsers import LeadingParser
from octavo.server.tool_python_grammar import ANY_ARGUMENTS, arguments_of
from octavo.server.tools import TAGS, ToolFormat, parser_of
from octavo.structured_outputs import StructuredOutputs

pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")

EXPLORE = bool(os.environ.get("OCTAVO_TEST_EXPLORE"))
FORMATS: list[ToolFormat] = [*TAGS]
THINK = REASONING["qwen3"]


def schema(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [next(iter(properties))],
        "additionalProperties": False,
    }


# Of the strict tool. Strings may hold what ends a call, or begins one.
SCHEMAS = [
    schema(
        x={"type": "integer", "minimum": 10, "maximum": 99},
        s={"type": "string", "maxLength": 4},
        b={"type": ["boolean", "null"]},
    ),
    schema(x={"type": "array", "items": {"type": "string"}, "maxItems": 2}, s={"type": "string"}),
    schema(
        s={"enum": ["a", "</tool_call>", "\n</parameter>\n"]},
        x={"type": ["string", "null"], "pattern": "^[a-z/]{0,4}$"},
        o={"$ref": "#/$defs/o"},
    )
    | {"$defs": {"o": schema(x={"anyOf": [{"type": "integer"}, {"type": "null"}]})}},
]
OTHER = schema(y={"type": "string"})
ANSWERS: list[Any] = [
    schema(k={"type": "string", "maxLength": 9}),
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    {"enum": [False, None, "functools[", 5]},
]


@pytest.fixture(scope="module", params=["text", "special"])
def llm(request: Any, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp(request.param)
    return load(folder, special=request.param == "special")


def tools(strict: dict[str, Any]) -> list[Any]:
    functions = [
        {"name": "f", "parameters": strict, "strict": True},
        {"name": "g", "parameters": OTHER},
    ]
    return [{"type": "function", "function": each} for each in functions]


def scenes(tool_format: ToolFormat) -> list[tuple[Markup, str, dict[str, Any]]]:
    """How the model writes, the end of the prompt, and more of the body."""
    thinks = Markup(tool_format, THINK)
    return [
        (Markup(tool_format), "x", {}),
        (thinks, "x", {"parallel_tool_calls": False}),
        (thinks, "x<think>", {}),
    ]


@pytest.mark.parametrize("tool_format", FORMATS)
def test_calls_follow_the_schemas_of_strict_tools(llm: LLM, tool_format: ToolFormat) -> None:
    seed = random.randrange(2**32) if EXPLORE else 3
    print(f"seed {seed}")
    rng, found = random.Random(seed), Counter[str]()
    for number in range(1000 if EXPLORE else 3):
        strict = SCHEMAS[number % 3]
        for markup, prompt, fields in scenes(tool_format):
            walk = CallWalk(llm, markup, prompt, tools=tools(strict), **fields)
            assert walk.reading.calls == "steered"
            for _ in range(8):
                answer = walk.draw(rng)
                found.update(name for name, _ in answer.calls)
                found["text"] += bool(answer.shown)
                assert len(answer.calls) < 2 or not fields
                for name, arguments in answer.calls:
                    value = json.loads(arguments)
                    assert isinstance(value, dict) and name in ("f", "g")
                    if name == "f":
                        jsonschema.validate(value, strict)
    assert found["f"] > 1 and found["f"] + found["g"] > 5 and found["text"] > 15, found


@pytest.mark.parametrize("tool_format", FORMATS)
def test_an_answer_is_calls_or_follows_the_response_format(
    llm: LLM, tool_format: ToolFormat
) -> None:
    seed = random.randrange(2**32) if EXPLORE else 4
    print(f"seed {seed}")
    rng, found = random.Random(seed), Counter[str]()
    for number in range(1000 if EXPLORE else 3):
        strict, wanted = SCHEMAS[number % 3], ANSWERS[number % 3]
        inner = {"name": "answer", "schema": wanted, "strict": True}
        response_format = {"type": "json_schema", "json_schema": inner}
        for markup, prompt, fields in scenes(tool_format):
            asked = {"tools": tools(strict), "response_format": response_format, **fields}
            walk = CallWalk(llm, markup, prompt, **asked)
            for _ in range(5):
                answer = walk.draw(rng, most=300)
                if not answer.is_whole:
                    continue
                found["calls" if answer.calls else "text"] += 1
                if not answer.calls:
                    jsonschema.validate(json.loads(answer.shown), wanted)
                assert not (answer.calls and answer.shown)
                for name, arguments in answer.calls:
                    jsonschema.validate(json.loads(arguments), strict if name == "f" else OTHER)
    assert found["text"] > 3 and (found["calls"] > 1) == (tool_format != "llama3_json"), found


TEXT, NUMBER = {"type": "string"}, {"type": "integer"}
SAYABLE: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({}, [""], ["a=5"]),
    (
        {"properties": {"a": NUMBER, "b": TEXT}, "required": ["a"]},
        ["a=5", 'a=5, b="x"'],
        ["", 'b="x"', "a=5,", "a='5'", 'b="x", a=5', "a=5, c=1"],
    ),
    (
        {"properties": {"a": NUMBER, "b": NUMBER, "c": NUMBER}},
        ["", "a=1", "b=2", "c=3", "a=1, c=3", "b=2, c=3", "a=1, b=2, c=3"],
        [", b=2", "a=1 b=2", "b=2, a=1"],
    ),
    (
        {"properties": {"a": NUMBER, "b": NUMBER}, "required": ["b"]},
        ["b=2", "a=1, b=2"],
        ["a=1", ""],
    ),
    (
        {"properties": {"a": {"type": ["boolean", "null"], "title": "t"}}},
        ["a=True", "a=false", "a=None", "a=null"],
        ["a=no", "a=TRUE"],
    ),
    ({"properties": {"a": {"anyOf": [NUMBER, {"type": "null"}]}}}, ["a=5", "a=None"], ["a=True"]),
    ({"properties": {"a": {"type": "boolean", "const": True}}}, ["a=true"], ["a=True", "a=false"]),
]
UNSAYABLE: list[dict[str, Any]] = [
    {"properties": {"a b": TEXT}},
    {"properties": {"a": TEXT}, "anyOf": []},
    {"properties": {"a": TEXT}, "minProperties": 1},
    {"properties": {"a": TEXT}, "required": ["b"]},
    {"properties": [1]},
    {"properties": {f"a{i}": TEXT for i in range(60)}},
]


def test_arguments_in_pythons_syntax(llm: LLM) -> None:
    for parameters, good, bad in SAYABLE:
        part = arguments_of({"type": "object", **parameters}, strict=True)
        assert part is not None
        wanted = as_tag(tag("f(", part, ")"))
        for each in (*good, *bad):
            assert follows(llm.engine.grammars, wanted, f"f({each})") == (each in good), each
    wanted = as_tag(tag("f(", ANY_ARGUMENTS, ")"))
    for each in ("", "a=1", "a='x\"', b=[True, {'k': None, \"l\": -1.5}]", "a = []"):
        assert follows(llm.engine.grammars, wanted, f"f({each})"), each
        assert read_python_calls(f"f({each})")
    for each in ("a", "1", "a=b", "a=1 b=2", "a=)", "a='"):
        assert not follows(llm.engine.grammars, wanted, f"f({each})"), each


@pytest.mark.parametrize("parameters", UNSAYABLE, ids=lambda each: str(each)[:40])
def test_what_pythons_syntax_cannot_say(parameters: dict[str, Any]) -> None:
    assert arguments_of({"type": "object", **parameters}, strict=True) is None


def grammar_of(
    tool_format: ToolFormat, prompt: str = "x", strict: dict[str, Any] = SCHEMAS[0]
) -> StructuredOutputs:
    body = ChatBody.model_validate({"messages": [], "tools": tools(strict)})
    wanted = answer_grammar(body, None, Markup(tool_format, THINK), prompt)
    assert wanted is not None
    return wanted


@pytest.mark.parametrize("tool_format", FORMATS)
def test_what_opens_a_call_must_go_on_as_one(llm: LLM, tool_format: ToolFormat) -> None:
    parser = parser_of(tool_format)
    marks = parser.marks if issubclass(parser, LeadingParser) else parser.opens
    leads = {"llama3_json": ['{"name": "f"', ' {"name":"g"'], "pythonic": ["[f(", "\n[ g("]}
    for mark in (*marks, *leads.get(tool_format, [])):
        before = "" if mark in leads.get(tool_format, []) else "So: "
        for thought in ("", f" <think>{mark}!</think>"):
            begun, grammars = thought + before + mark, llm.engine.grammars
            assert not follows(grammars, grammar_of(tool_format), begun + "!")
            assert not follows(grammars, grammar_of(tool_format), begun)
            assert follows(grammars, grammar_of(tool_format), begun[:-1] + "!")
        assert follows(grammars, grammar_of(tool_format, "<think>"), f"{mark}! no end")
    for lead in leads.get(tool_format, []):
        assert follows(llm.engine.grammars, grammar_of(tool_format), f"So: {lead}!")


def test_a_value_in_tags_does_not_hold_what_ends_it(llm: LLM) -> None:
    if "</tool_call>" in llm.engine.grammars.prepare().special:
        return  # which `follows` cannot write
    other, end = "<function=g>\n<parameter=y>\n</parameter>\nx\n</parameter>\n", "</function>\n"
    strict = "<function=f>\n<parameter=x>\n12\n</parameter>\n"
    string = "<parameter=s>\n<S>\n</parameter>\n"
    cases = {
        other + end: True,
        other + "<parameter=z>\n</function>\n</parameter>\n" + end: True,
        other + end + "<function=f>\n" + end: False,
        other + end + "<function=f>\n<parameter=x>\nbad\n</parameter>\n" + end: False,
        other + "<parameter=z>\n</tool_call>\n</parameter>\n" + end: False,
        strict + end: True,
        strict + string.replace("<S>", "a</parameter>") + end: True,
        strict + string.replace("<S>", "a</tool_call>") + end: False,
        strict + string.replace("<S>", "a\n</parameter>\n") + end: False,
    }
    wanted = grammar_of("qwen3_coder", strict=schema(x=NUMBER, s=TEXT))
    for text, is_one in cases.items():
        whole = f"<tool_call>\n{text}</tool_call>"
        assert follows(llm.engine.grammars, wanted, whole) == is_one, text
