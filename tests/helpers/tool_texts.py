"""Calls of tools as models write them, and random ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

from octavo.server.tool_calls import ToolCall
from octavo.server.tools import TAGS, ToolFormat, make_parser

Call = tuple[str, dict[str, Any]]  # a name, and the arguments
Writer = Callable[[Sequence[Call]], str]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "count": {"type": "integer"},
                    "ratio": {"type": "number"},
                    "flag": {"type": "boolean"},
                    "list": {"type": "array"},
                    "object": {"$ref": "#/$defs/object"},
                    "either": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                    "kind": {"enum": ["a", "b"]},
                    "any": {},
                },
                "$defs": {"object": {"type": "object"}},
            },
        },
    }
]


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def members(calls: Sequence[Call], key: str = "arguments", between: str = ", ") -> str:
    return between.join(f'{{"name": {dump(name)}, "{key}": {dump(a)}}}' for name, a in calls)


def python_call(call: Call, write: Callable[[Any], str] = repr) -> str:
    return f"{call[0]}({', '.join(f'{key}={write(value)}' for key, value in call[1].items())})"


def xml_call(call: Call) -> str:
    parameters = "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else dump(value)}\n</parameter>\n"
        for key, value in call[1].items()
    )
    return f"<tool_call>\n<function={call[0]}>\n{parameters}</function>\n</tool_call>"


def deepseek(calls: Sequence[Call], write: Callable[[Call], str], between: str) -> str:
    each = (f"<｜tool▁call▁begin｜>{write(call)}<｜tool▁call▁end｜>" for call in calls)
    return f"<｜tool▁calls▁begin｜>{between.join(each)}<｜tool▁calls▁end｜>"


# The forms of each format that were seen in templates and parsers.
WRITERS: list[tuple[ToolFormat, Writer]] = [
    (
        "hermes",
        lambda calls: "\n".join(f"<tool_call>\n{members([c])}\n</tool_call>" for c in calls),
    ),
    ("hermes", lambda calls: f"<tool_call>[{members(calls)}]</tool_call>"),
    ("llama3_json", lambda calls: members(calls, "parameters", "; ")),
    ("llama3_json", lambda calls: "<|python_tag|>" + members(calls, "parameters", ";\n")),
    ("mistral", lambda calls: f"[TOOL_CALLS] [{members(calls)}]"),
    ("mistral", lambda calls: f"[TOOL_CALLS][{members(calls, between=',')}]"),
    ("mistral_args", lambda calls: "".join(f"[TOOL_CALLS]{n}[ARGS]{dump(a)}" for n, a in calls)),
    (
        "mistral_args",
        lambda calls: "".join(
            f"[TOOL_CALLS]{n}[CALL_ID]a1B2c3D4e[ARGS]{dump(a)}" for n, a in calls
        ),
    ),
    ("mistral_args", lambda calls: "".join(f"[TOOL_CALLS]{n}{dump(a)}" for n, a in calls)),
    ("pythonic", lambda calls: f"[{', '.join(map(python_call, calls))}]"),
    ("pythonic", lambda calls: f"[{', '.join(python_call(call, dump) for call in calls)}]"),
    (
        "pythonic",
        lambda calls: f"<|python_start|>[{', '.join(map(python_call, calls))}]<|python_end|>",
    ),
    (
        "olmo3",
        lambda calls: (
            f"<function_calls>\n{chr(10).join(map(python_call, calls))}\n</function_calls>"
        ),
    ),
    (
        "olmo3",
        lambda calls: (
            f"<function_calls>{chr(10).join(python_call(c, dump) for c in calls)}</function_calls>"
        ),
    ),
    ("qwen3_coder", lambda calls: "\n".join(map(xml_call, calls))),
    (
        "qwen3_coder",
        lambda calls: "\n".join(xml_call(call).removeprefix("<tool_call>\n") for call in calls),
    ),
    ("granite", lambda calls: f"<|tool_call|>[{members(calls)}]"),
    ("granite", lambda calls: f"<tool_call> [{members(calls)}]"),
    ("phi4_mini_json", lambda calls: f"functools[{members(calls)}]"),
    ("phi4_mini_tags", lambda calls: f"<|tool_call|>[{members(calls)}]<|/tool_call|>"),
    ("phi4_mini_tags", lambda calls: f"<|tool_call|>[{members(calls)}]"),
    (
        "phi4_mini_tags",
        lambda calls: "".join(f"<|tool_call|>{members([c])}<|/tool_call|>" for c in calls),
    ),
    (
        "deepseek_v3",
        lambda calls: deepseek(
            calls,
            lambda call: f"function<｜tool▁sep｜>{call[0]}\n```json\n{dump(call[1])}\n```",
            "\n",
        ),
    ),
    (
        "deepseek_v31",
        lambda calls: deepseek(calls, lambda call: f"{call[0]}<｜tool▁sep｜>{dump(call[1])}", ""),
    ),
]

MARKS = sorted({mark for marks in TAGS.values() for mark in marks} | {"functools["})
SCRAPS = [
    *MARKS,
    *("<function=f>", "<parameter=text>", "</parameter>", "</function>", "\n", " ", '"', "'", "\\"),
    *(
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        ",",
        ";",
        "=",
        "f",
        "é",
        "<",
        "1",
        "```json\n",
        '{"name": "f"}',
    ),
    *(
        "f(a=1)",
        "f[ARGS]{}",
        '{"name": "f", "arguments": {}}',
        "function<｜tool▁sep｜>f\n```json\n{}",
    ),
]
NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True).filter(
    lambda name: name not in ("True", "False", "None")
)
TEXTS = st.lists(st.sampled_from(SCRAPS), max_size=6).map("".join) | st.text(max_size=10)
NUMBERS = st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
CALLS = st.lists(
    st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=3
)
# What ends a value or a call of Qwen3-Coder's notation cannot stand within it.
_XML_END = re.compile(r"</parameter>|</function>\s*</tool_call>")
_XML_TEXTS = TEXTS.filter(lambda text: not _XML_END.search(text))
_XML_ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "text": _XML_TEXTS,
        "unknown": _XML_TEXTS,
        "any": _XML_TEXTS,
        "kind": st.sampled_from(["a", "b"]),
        "count": st.integers(-(10**12), 10**12),
        "ratio": NUMBERS,
        "flag": st.booleans(),
        "list": st.lists(st.integers() | st.booleans() | st.none(), max_size=3),
        "object": st.dictionaries(NAMES, NUMBERS, max_size=3),
        "either": st.none() | st.integers(),
    },
)
XML_CALLS = st.lists(st.tuples(st.just("f"), _XML_ARGUMENTS), min_size=1, max_size=3)


def cut(text: str, places: Sequence[int]) -> list[str]:
    """The text in pieces."""
    cuts = sorted(place % (len(text) + 1) for place in places)
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def parse(tool_format: ToolFormat, pieces: Sequence[str]) -> tuple[str, list[ToolCall]]:
    """What is shown, and the calls."""
    parser = make_parser(tool_format, tools=TOOLS)
    found = [piece for text in pieces for piece in parser.push(text)] + parser.finish()
    shown = "".join(piece for piece in found if isinstance(piece, str))
    return shown, [piece for piece in found if isinstance(piece, ToolCall)]


def read(tool_format: ToolFormat, pieces: Sequence[str]) -> tuple[str, list[Call]]:
    """What is shown, and the calls' names and arguments."""
    shown, calls = parse(tool_format, pieces)
    return shown, [(call.name, json.loads(call.arguments)) for call in calls]
