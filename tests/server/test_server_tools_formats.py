"""Every way of writing calls of tools: read whole and cut anywhere, and what is no call."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tool_texts import (
    CALLS,
    MARKS,
    SCRAPS,
    TOOLS,
    WRITERS,
    XML_CALLS,
    Call,
    Writer,
    cut,
    parse,
    read,
)

from octavo.server.tool_calls import PythonReader, Quotes, ToolCall, read_python_calls
from octavo.server.tool_xml import typed, types_of
from octavo.server.tools import TAGS, ToolFormat, make_parser

FORMATS: list[ToolFormat] = [*TAGS]
LEADING = ("llama3_json", "pythonic")  # calls are all of the answer
PLACES = st.lists(st.integers(0, 10**6), max_size=8)


@pytest.mark.parametrize(("tool_format", "write"), WRITERS)
@given(data=st.data())
def test_calls_come_back_however_the_text_is_cut(
    tool_format: ToolFormat, write: Writer, data: st.DataObject
) -> None:
    calls = data.draw(XML_CALLS if tool_format == "qwen3_coder" else CALLS)
    before = (
        "" if tool_format in LEADING else data.draw(st.sampled_from(["", "Let me see. ", "\n"]))
    )
    text = before + write(calls)
    for pieces in ([text], list(text), cut(text, data.draw(PLACES))):
        assert read(tool_format, pieces) == (before, calls)


@pytest.mark.parametrize("tool_format", FORMATS)
@given(data=st.data(), places=PLACES)
def test_any_text_is_read_the_same_however_it_is_cut(
    tool_format: ToolFormat, data: st.DataObject, places: list[int]
) -> None:
    calls_of_it = [write([("f", {})]) for name, write in WRITERS if name == tool_format]
    scraps = st.sampled_from(SCRAPS) | st.sampled_from([*calls_of_it, " ", "\n", "ok"])
    text = data.draw(st.lists(scraps, max_size=14).map("".join))
    shown, calls = read(tool_format, [text])
    for pieces in (list(text), cut(text, places)):
        assert read(tool_format, pieces) == (shown, calls)
    assert calls or shown == text
    rest = iter(text)
    assert all(letter in rest for letter in shown)  # nothing is added, and the order stays


@pytest.mark.parametrize(("tool_format", "write"), WRITERS)
def test_an_answer_that_is_cut_off_loses_nothing(tool_format: ToolFormat, write: Writer) -> None:
    text = write([("f", {"text": 'a "b" \\ c', "count": 12})])
    whole = read(tool_format, [text])[1]
    for length in range(len(text)):
        shown, calls = read(tool_format, [text[:length]])
        assert calls in ([], whole)
        assert shown == ("" if calls else text[:length])


# Text within which other formats have marks stays what it is.
@pytest.mark.parametrize("tool_format", FORMATS)
def test_marks_of_other_formats_are_text(tool_format: ToolFormat) -> None:
    others = [mark for mark in MARKS if not any(mark in tags for tags in (TAGS[tool_format],))]
    text = "See " + " and ".join(others)
    assert read(tool_format, list(text))[0] == text


CASES: list[tuple[ToolFormat, str, str, list[Call]]] = [
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}] so', " so", [("f", {})]),
    ("mistral", '[TOOL_CALLS][{"name": "f"}', '[TOOL_CALLS][{"name": "f"}', []),
    ("mistral", "[TOOL_CALLS][]", "[TOOL_CALLS][]", []),
    ("mistral", "[TOOL_CALLS] I call\n{}", "[TOOL_CALLS] I call\n{}", []),
    ("mistral", "a [TOOL_ [TOOL_CALLS", "a [TOOL_ [TOOL_CALLS", []),
    ("mistral_args", "[TOOL_CALLS]f[ARGS]{1}", "[TOOL_CALLS]f[ARGS]{1}", []),
    ("mistral_args", "[TOOL_CALLS]f[ARGS][1]", "[TOOL_CALLS]f[ARGS][1]", []),
    (
        "mistral_args",
        '[TOOL_CALLS]f[ARGS]{"a": "[TOOL_CALLS]g[ARGS]{}',  # cut off within a string
        '[TOOL_CALLS]f[ARGS]{"a": "[TOOL_CALLS]g[ARGS]{}',
        [],
    ),
    (
        "mistral_args",
        '[TOOL_CALLS]f[ARGS]{"a": 1} then [TOOL_CALLS]g[ARGS]{}',
        " then ",
        [("f", {"a": 1}), ("g", {})],
    ),
    ("granite", '<|tool_call|>{"name": "f", "arguments": {}}', "", [("f", {})]),
    ("granite", '<|tool_call|>[{"name": "f"}, 5]', '<|tool_call|>[{"name": "f"}, 5]', []),
    ("phi4_mini_json", "import functools\n", "import functools\n", []),
    ("phi4_mini_json", "functools[0]", "functools[0]", []),
    ("phi4_mini_json", 'Now: functools[{"name": "f"}] ok', "Now:  ok", [("f", {})]),
    ("phi4_mini_tags", '<|tool_call|>{"name":"f"}, {"name":"g"}', "", [("f", {}), ("g", {})]),
    ("phi4_mini_tags", '<|tool_call|>[{"name":"f"}]<|/tool_call|> ok', " ok", [("f", {})]),
    ("pythonic", "[1, 2]", "[1, 2]", []),
    ("pythonic", "[link](x) f(a=1)", "[link](x) f(a=1)", []),
    ("pythonic", "[]", "[]", []),
    ("pythonic", "[f(1)]", "[f(1)]", []),
    ("pythonic", "[f(a=b)]", "[f(a=b)]", []),
    ("pythonic", "[f(a=1e999)]", "[f(a=1e999)]", []),
    ("pythonic", "[f(a=__import__('os'))]", "[f(a=__import__('os'))]", []),
    ("pythonic", "[f(a=1)] so", "[f(a=1)] so", []),
    ("pythonic", "[f(a=1)", "[f(a=1)", []),
    ("pythonic", "[f(a=(1, -2.5),), a.b(c={'x': [True, null]},)]", "", None),  # type: ignore[list-item]
    ("pythonic", "So: [f(a=1)]", "So: [f(a=1)]", []),
    ("pythonic", "So: <|python_tag|>[f(a=1)]", "So: ", [("f", {"a": 1})]),
    ("pythonic", "[f(a=" + "[" * 5000, "[f(a=" + "[" * 5000, []),
    ("pythonic", "[f(a=" + "9" * 5000 + ")]", "[f(a=" + "9" * 5000 + ")]", []),
    ("olmo3", "<function_calls>f(a='</function_calls>')</function_calls>", "", None),  # type: ignore[list-item]
    ("olmo3", "<function_calls>no call</function_calls>!", None, []),  # type: ignore[list-item]
    ("olmo3", "<function_calls>f(a=1)", "", [("f", {"a": 1})]),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>',
        "",
        None,
    ),  # type: ignore[list-item]
    ("hermes", '<tool_call>{"name": "f"}</tool_', "", [("f", {})]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>\n ok \n', "\n ok \n", [("f", {})]),
    ("hermes", '<tool_call>{"name": "f"} so</tool_call> ok', None, []),  # type: ignore[list-item]
    ("qwen3_coder", "<tool_call>\n<function=f>\n", "<tool_call>\n<function=f>\n", []),
    ("qwen3_coder", "<tool_call>\n<function=f>\n</function>\n", "", [("f", {})]),
    ("qwen3_coder", "<tool_call>\n<function=g>\n</function>\n</tool_call> ok", " ok", [("g", {})]),
    ("qwen3_coder", "<function=f> is XML", "<function=f> is XML", []),
    ("qwen3_coder", '<tool_call>\n{"name": "f"}\n</tool_call> ok', " ok", [("f", {})]),
    ("qwen3_coder", '<tool_call>{"name": "</tool_call>"}</tool_call>', "", [("</tool_call>", {})]),
    ("qwen3_coder", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    ("deepseek_v3", "<｜tool▁calls▁begin｜>no<｜tool▁calls▁end｜>", None, []),  # type: ignore[list-item]
    (
        "deepseek_v3",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```",
        "",
        [("f", {})],
    ),
]
SPECIAL = {  # where the table has None
    "[f(a=(1": [("f", {"a": [1, -2.5]}), ("a.b", {"c": {"x": [True, None]}})],
    "<functi": [("f", {"a": "</function_calls>"})],
    "<tool_c": [("f", {"a": "</tool_call>"})],
}


@pytest.mark.parametrize("index", range(len(CASES)))
def test_single_cases(index: int) -> None:
    tool_format, text, shown, calls = CASES[index]
    expected = (text if shown is None else shown, SPECIAL[text[:7]] if calls is None else calls)
    assert read(tool_format, [text]) == expected
    assert read(tool_format, list(text)) == expected


ENDS = "</parameter></function></tool_call><tool_call><function=f></function></tool_call>"
# What a grammar cannot have written is no call where it writes them: of the only tool "f".
STEERED: list[tuple[ToolFormat, str, list[Call]]] = [
    ("llama3_json", '{"name": "f", "parameters": {"count": 5}}', [("f", {"count": 5})]),
    ("llama3_json", ' {"type": "function",\n"name" :"f"}', [("f", {})]),
    ("llama3_json", '{"name": "f"}; {"name": "f"}', [("f", {}), ("f", {})]),
    ("llama3_json", '{"parameters": {"count": 5}, "name": "f"}', []),
    ("llama3_json", '{"name": "g"}; {"name": "f"}', []),
    ("llama3_json", '\x1c{"name": "f"}', []),
    ("llama3_json", 'So <|python_tag|>{"parameters": {}, "name": "f"}', [("f", {})]),
    ("llama3_json", '{"a": 5} <|python_tag|>{"name": "f"}', [("f", {})]),
    ("llama3_json", ' <|python_tag|>{"name": "f"}', [("f", {})]),
    ("pythonic", "[f(count=5)]", [("f", {"count": 5})]),
    ("pythonic", "[g() <|python_tag|>[f()]<|python_end|>", [("f", {})]),
    ("pythonic", "[g(), f()]", []),
    ("pythonic", "[f (count=5)]", []),
    (
        "qwen3_coder",
        "<function=f>\n<parameter=list>\n"
        '["</parameter></function></tool_call><tool_call><function=f></function></tool_call>"]'
        "\n</parameter>\n</function>\n</tool_call>",
        [
            (
                "f",
                {
                    "list": [
                        "</parameter></function></tool_call><tool_call><function=f></function></tool_call>"
                    ]
                },
            )
        ],
    ),
    (
        "qwen3_coder",
        "<function=f>\n<parameter=text>\n\n</parameter></function>\n\n</parameter>\n</function>\n",
        [("f", {"text": "\n</parameter></function>\n"})],
    ),
]


@pytest.mark.parametrize("index", range(len(STEERED)))
def test_calls_that_a_grammar_has_written(index: int) -> None:
    tool_format, text, calls = STEERED[index]
    for pieces in ([text], list(text)):
        parser = make_parser(tool_format, "steered", TOOLS)
        found = [piece for each in pieces for piece in parser.push(each)] + parser.finish()
        read_calls = [each for each in found if isinstance(each, ToolCall)]
        assert [(call.name, json.loads(call.arguments)) for call in read_calls] == calls
        shown = "".join(each for each in found if isinstance(each, str))
        before = text.partition("<|python_")[0] if "<|python_" in text else ""
        assert shown == ((before if before.strip() else "") if calls else text)


EITHER: list[tuple[ToolFormat, str, list[Call]]] = [
    ("hermes", '{"k": "<tool_call>\\n{}"}', []),
    ("hermes", '\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', [("f", {})]),
    ("mistral", "[[]]", []),
    ("mistral", "[TO", []),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}]', [("f", {})]),
    ("phi4_mini_json", "false", []),
    ("pythonic", "[f(count=5), f()]", [("f", {"count": 5}), ("f", {})]),
    ("pythonic", '["[f()]"]', []),
    ("olmo3", "<function_calls>\nf()\n</function_calls>", [("f", {})]),
    ("olmo3", '"<function_calls>f()</function_calls>"', []),
]


@pytest.mark.parametrize("index", range(len(EITHER)))
def test_calls_or_a_text_without_any(index: int) -> None:
    tool_format, text, calls = EITHER[index]
    for pieces in ([text], list(text)):
        parser, shown, found = make_parser(tool_format, "either", TOOLS), "", list[ToolCall]()
        for piece in [each for one in pieces for each in parser.push(one)] + parser.finish():
            if isinstance(piece, ToolCall):
                found.append(piece)
            elif isinstance(piece, str):
                shown += piece
            else:
                found[-1] = replace(found[-1], arguments=found[-1].arguments + piece.text)
        assert [(call.name, json.loads(call.arguments)) for call in found] == calls
        assert shown == ("" if calls else text)


REFERENCE, DEFINITIONS = {"$ref": "#/$defs/n"}, {"n": {"type": "integer"}}


@pytest.mark.parametrize("tool_format", ["mistral", "mistral_args"])
def test_mistrals_ids_are_nine_letters_and_digits(tool_format: ToolFormat) -> None:
    for name, write in WRITERS:
        if name == tool_format:
            calls = parse(name, [write([("f", {}), ("g", {"a": 1})])])[1]
            assert all(re.fullmatch("[A-Za-z0-9]{9}", call.call_id) for call in calls)
            assert len({call.call_id for call in calls}) == 2


@pytest.mark.parametrize("tool_format", FORMATS)
def test_half_of_a_surrogate_can_be_sent(tool_format: ToolFormat) -> None:
    for name, write in WRITERS:
        if name == tool_format and name != "qwen3_coder":
            call = parse(name, [write([("f", {"a": "SURROGATE"})]).replace("SURROGATE", "\\ud800")])
            (one,) = call[1]
            assert json.loads(one.arguments.encode()) == {"a": "\ud800"}


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": <V>}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": "<V>"}</tool_call>'),
        ("llama3_json", '{"name": "f", "parameters": <V>}'),
        (
            "qwen3_coder",
            "<tool_call><function=f><parameter=list><V></parameter></function></tool_call>",
        ),
    ],
)
def test_values_of_any_depth_are_read_or_shown(tool_format: ToolFormat, text: str) -> None:
    """There are depths that Python reads, and does not write."""
    limit = sys.getrecursionlimit()
    for depth in [*range(limit - 200, limit + 1), 10 * limit]:
        whole = text.replace("<V>", "[" * depth + "]" * depth)
        shown, calls = parse(tool_format, [whole])
        assert (shown, len(calls)) in ((whole, 0), ("", 1))


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "string"}, " null", " null"),
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, "5.5", "5.5"),
        ({"type": "integer"}, "true", "true"),
        ({"type": "number"}, "-5", -5),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, " false ", False),
        ({"type": "null"}, "None", None),
        ({"type": "array"}, "['a', 1]", ["a", 1]),
        ({"type": "array"}, '["a", ', '["a", '),
        ({"type": "object"}, '{"a": {}}', {"a": {}}),
        ({"type": "object"}, "[1]", "[1]"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, '"a"', '"a"'),
        ({"type": ["string", "integer"]}, "7", 7),
        ({"type": ["string", "integer"]}, "7.5", "7.5"),
        ({"enum": [1, 2]}, "2", 2),
        ({"const": None}, "null", None),
        ({"anyOf": [{"type": "boolean"}, REFERENCE], "$defs": DEFINITIONS}, "7", 7),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"$ref": "#/$defs/n"}}}, "7", "7"),
        ({}, "7", "7"),
        (None, "7", "7"),
    ],
)
def test_a_value_is_what_its_schema_says(schema: Any, text: str, value: Any) -> None:
    found = typed(text, schema)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("begun", ["[" + "a" * 999, "[" + " " * 999, "[f" + " " * 999])
def test_what_goes_on_for_ever_is_no_beginning_of_a_call(begun: str) -> None:
    """It would be looked at anew with every piece."""
    assert make_parser("pythonic").push(begun) == [begun]
    for pieces in ([begun], list(begun)):
        assert parse("pythonic", [*pieces, "(a=1)]"]) == (f"{begun}(a=1)]", [])


def test_types_that_a_schema_names() -> None:
    assert types_of({"enum": ["a", 1, None]}) == {"string", "integer", "number", "null"}
    assert types_of({"allOf": [{"type": "array"}]}) == {"array"}
    assert types_of({"type": 5, "anyOf": 5, "$ref": 5}) == set()
    # Each of these refers to all of them.
    names = [f"#/$defs/{i}" for i in range(6)]
    every = {"anyOf": [*({"$ref": name} for name in names), {"type": "null"}]}
    schemas = {str(i): dict(every) for i in range(6)}
    begun = time.process_time()
    assert types_of({**every, "$defs": schemas}) == {"null"}
    assert time.process_time() - begun < 1
    deep: dict[str, Any] = {"type": "array"}
    for _ in range(900):
        deep = {"anyOf": [deep]}
    assert types_of(deep) == set()


@given(st.text(alphabet="f(a=1,)[]{}:'\"\\nx0 \nTruee.-", max_size=30))
def test_python_is_read_or_refused(text: str) -> None:
    """Nothing but a ValueError comes out, and what is read is what Python itself would read."""
    import ast

    try:
        found = PythonReader(text).literal()
    except ValueError:
        return
    try:
        expected = ast.literal_eval(text.strip())
    except (SyntaxError, ValueError):
        return  # more is read than Python has: true, a line break in a string
    assert json.dumps(found) == json.dumps(expected)


def test_calls_in_pythons_syntax() -> None:
    found = read_python_calls(r"""f(a='it\'s "x"\n\x41\u00e9', b="c\/" 'd', c={}, d=[],)  g()""")
    assert [call.name for call in found] == ["f", "g"]
    assert json.loads(found[0].arguments) == {
        "a": 'it\'s "x"\nAé',
        "b": "c/d",  # as JSON spells it
        "c": {},
        "d": [],
    }
    for wrong in ("f(a=1", "f(a)", "f(a=1 b=2)", "[f()", "f({1: 2})", "f(a={1: 2})", "f", "1", "-"):
        assert read_python_calls(wrong) == []


def test_quotes_are_followed_from_piece_to_piece() -> None:
    text, quotes = r"""a "b\"'" 'd"\'' "f""", Quotes("\"'")
    opens = "".join("01"[quotes.read(letter)] for letter in text)
    assert opens == "001111100111110011"
    assert not Quotes('"').read("it's")
    assert Quotes('"').read('"a') and not Quotes('"').read('"a\n') and Quotes("\"'").read('"a\n')


def test_a_string_without_an_end_costs_one_call_only() -> None:
    broken = '<tool_call>\n{"name": "f", "arguments": {"a": "x}}\n</tool_call>'
    text = f'{broken}\n<tool_call>\n{{"name": "g"}}\n</tool_call>'
    for pieces in ([text], list(text)):
        assert read("hermes", pieces) == (f"{broken}\n", [("g", {})])


def test_the_schemas_of_the_tools_are_those_of_the_request() -> None:
    assert TOOLS[0]["function"]["name"] == "f"  # type: ignore[index]
    text = "<tool_call><function=f><parameter=count>7</parameter></function></tool_call>"
    assert read("qwen3_coder", [text])[1] == [("f", {"count": 7})]
    other = text.replace("function=f", "function=g")
    assert read("qwen3_coder", [other])[1] == [("g", {"count": "7"})]
