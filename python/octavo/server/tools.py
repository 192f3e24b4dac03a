"""The ways in which models write calls of tools: how a template is told, what reads an answer.

Their names are those of vLLM's parsers. What each looks like stands at its parser.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Literal

from octavo.server.tool_calls import Arguments, Piece, ToolCall, short_id
from octavo.server.tool_forced import EitherParser, ForcedParser
from octavo.server.tool_parsers import (
    DeepSeekParser,
    GraniteParser,
    HermesParser,
    LeadingParser,
    Llama3Parser,
    MarkedParser,
    MistralParser,
    Olmo3Parser,
    Phi4MiniParser,
    PythonicParser,
    ToolParser,
    Tools,
)
from octavo.server.tool_xml import ForcedXmlParser, Qwen3CoderParser

__all__ = ["Arguments", "Piece", "ToolCall", "ToolParser", "Tools"]

ToolFormat = Literal[
    "hermes",
    "llama3_json",
    "mistral",
    "mistral_args",
    "pythonic",
    "olmo3",
    "qwen3_coder",
    "granite",
    "phi4_mini_json",
    "phi4_mini_tags",
    "deepseek_v3",
    "deepseek_v31",
]

# Calls anywhere in a text; the same, but a grammar writes the calls of tools; either calls or a
# text, by a grammar; calls and nothing else, by a grammar.
CallMode = Literal["free", "steered", "either", "only"]


@dataclass(frozen=True)
class Writing:
    """How a grammar writes calls, and how those of earlier turns are written.

    begins: what may stand before the first, of which the model takes one. before, between, after:
    what stands around the name and the arguments of each. separator: between two calls. end: what
    stands behind the last. is_quoted: the name is written as JSON.
    """

    before: str = '{"name": '
    between: str = ', "arguments": '
    after: str = "}"
    separator: str = ", "
    begins: tuple[str, ...] = ("",)
    end: str = ""
    is_quoted: bool = True

    def first(self, name: str) -> str:
        """The name of a function, with what tells it from a longer one."""
        return json.dumps(name) if self.is_quoted else name + self.between

    @property
    def head(self) -> re.Pattern[str]:
        """What stands before the arguments of a call; its first group is the name."""
        name = r'("(?:[^"\\]|\\.)*")' if self.is_quoted else r"(.+?)"
        return re.compile(re.escape(self.before) + name + re.escape(self.between))


@dataclass(frozen=True)
class _Way:
    """tags: what the parser looks for; in some vocabularies these are special tokens.

    writing: of calls that must come. own: of calls that may come; None: the same.
    """

    parser: type[MarkedParser | LeadingParser]
    tags: tuple[str, ...]
    writing: Writing = field(default_factory=Writing)
    own: Writing | None = None


_TAGGED = Writing('<tool_call>\n{"name": ', after="}\n</tool_call>", separator="\n")
_BARE = Writing(between=', "parameters": ', separator="; ")
_PYTHON = Writing("", "(", ")", ", ", ("[",), "]", is_quoted=False)
_LINES = Writing(
    "",
    "(",
    ")",
    "\n",
    ("<function_calls>\n",),
    "\n</function_calls>",
    is_quoted=False,
)
_SEP = "<｜tool▁sep｜>"
_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", _SEP)
_DEEPSEEK_TAGS = (*_DEEPSEEK, "<｜tool▁call▁end｜>")
_DEEPSEEK_V3 = Writing(
    f"<｜tool▁call▁begin｜>function{_SEP}",
    "\n```json\n",
    "\n```<｜tool▁call▁end｜>",
    "\n",
    _DEEPSEEK[:1],
    _DEEPSEEK[1],
    is_quoted=False,
)
_DEEPSEEK_V31 = Writing(
    "<｜tool▁call▁begin｜>",
    _SEP,
    "<｜tool▁call▁end｜>",
    "",
    _DEEPSEEK[:1],
    _DEEPSEEK[1],
    is_quoted=False,
)
_MISTRAL_TAGS = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
_PHI_TAGS = ("<|tool_call|>", "<|/tool_call|>")
_WAYS: dict[ToolFormat, _Way] = {
    "hermes": _Way(HermesParser, ("<tool_call>", "</tool_call>"), _TAGGED),
    "llama3_json": _Way(Llama3Parser, Llama3Parser.marks, _BARE),
    "mistral": _Way(
        MistralParser, _MISTRAL_TAGS, Writing(begins=("[TOOL_CALLS][", "[TOOL_CALLS] ["), end="]")
    ),
    "mistral_args": _Way(
        MistralParser, _MISTRAL_TAGS, Writing("[TOOL_CALLS]", "[ARGS]", "", "", is_quoted=False)
    ),
    # Calls that must come are written as JSON, of which a client gets the arguments as they come.
    "pythonic": _Way(PythonicParser, (*PythonicParser.marks, "<|python_end|>"), _BARE, _PYTHON),
    "olmo3": _Way(Olmo3Parser, ("<function_calls>", "</function_calls>"), _BARE, _LINES),
    # Where the schema of a tool can be said in tags, `tool_grammar` writes them.
    "qwen3_coder": _Way(Qwen3CoderParser, ("<tool_call>", "</tool_call>"), _TAGGED),
    "granite": _Way(
        GraniteParser,
        GraniteParser.opens,
        Writing(
            begins=("<|tool_call|>[",),
            end="]",
        ),
    ),
    "phi4_mini_json": _Way(
        Phi4MiniParser,
        _PHI_TAGS,
        Writing(begins=("functools[",), end="]"),
    ),
    "phi4_mini_tags": _Way(
        Phi4MiniParser,
        _PHI_TAGS,
        Writing(begins=("<|tool_call|>[",), end="]<|/tool_call|>"),
    ),
    "deepseek_v3": _Way(DeepSeekParser, _DEEPSEEK_TAGS, _DEEPSEEK_V3),
    "deepseek_v31": _Way(DeepSeekParser, _DEEPSEEK_TAGS, _DEEPSEEK_V31),
}
TAGS = {name: way.tags for name, way in _WAYS.items()}
# vLLM's names of parsers, and what each of them reads.
PARSERS: dict[str, tuple[ToolFormat, ...]] = {
    "hermes": ("hermes",),
    "llama3_json": ("llama3_json",),
    "llama4_json": ("llama3_json",),
    "mistral": ("mistral", "mistral_args"),
    "pythonic": ("pythonic",),
    "llama4_pythonic": ("pythonic",),
    "olmo3": ("olmo3",),
    "qwen3_coder": ("qwen3_coder",),
    "qwen3_xml": ("qwen3_coder",),
    "granite": ("granite",),
    "granite4": ("hermes",),
    "phi4_mini_json": ("phi4_mini_json", "phi4_mini_tags"),
    "deepseek_v3": ("deepseek_v3",),
    "deepseek_v31": ("deepseek_v31",),
}


def detect_format(template: str) -> ToolFormat | None:
    """The format that a chat template teaches; None where it has no tools, or unknown ones."""

    def has(*parts: str) -> bool:
        return all(part in template for part in parts)

    rules: list[tuple[bool, ToolFormat]] = [
        (has("[TOOL_CALLS]", "[ARGS]"), "mistral_args"),
        (has("[TOOL_CALLS]"), "mistral"),
        (has(_DEEPSEEK[0], "```json"), "deepseek_v3"),
        (has(_DEEPSEEK[0]), "deepseek_v31"),
        (has("<tool_call>", "<function=", "<parameter="), "qwen3_coder"),
        (has("<function_calls>"), "olmo3"),
        (has("functools["), "phi4_mini_json"),
        (has("<|/tool_call|>") or has("<|tool|>", "<|/tool|>"), "phi4_mini_tags"),
        (has("<|tool_call|>"), "granite"),
        (has("<tool_call>") and not (has("<arg_key>") or has("<invoke")), "hermes"),
        (re.search(r"\[\w+\(\w+=", template) is not None, "pythonic"),
        (has('"parameters"') and (has("<|python_tag|>") or has("ipython")), "llama3_json"),
    ]
    if not re.search(r"(?<![a-z])tools\b", template):  # not functools alone
        return None
    return next((name for is_so, name in rules if is_so), None)


def format_of(parser: str, detected: ToolFormat | None) -> ToolFormat:
    """The format for one of `PARSERS`: the detected one, if that parser reads it."""
    formats = PARSERS[parser]
    return detected if detected in formats else formats[0]


def writing_of(tool_format: ToolFormat, *, must_come: bool = True) -> Writing:
    """How a grammar writes calls in this format, which must come, or may."""
    way = _WAYS[tool_format]
    return way.writing if must_come or way.own is None else way.own


def parser_of(tool_format: ToolFormat) -> type[MarkedParser | LeadingParser]:
    """What finds calls in an answer that may hold some."""
    return _WAYS[tool_format].parser


def make_parser(tool_format: ToolFormat, mode: CallMode = "free", tools: Tools = ()) -> ToolParser:
    """A parser for one answer. tools: those of the request."""
    way = _WAYS[tool_format]
    if mode == "free":
        return way.parser(tools)
    writing = writing_of(tool_format, must_come=mode == "only")
    names = [writing.first(tool["function"]["name"]) for tool in tools]
    parser: ToolParser = way.parser(tools, names)
    if mode == "only" or (mode == "either" and way.own is None):
        is_short = way.parser is MistralParser
        parser = ForcedParser(writing.head, short_id if is_short else None)
        parser = ForcedXmlParser(tools) if tool_format == "qwen3_coder" else parser
    if mode != "either":
        return parser
    begins = [writing.begins[0] + writing.before + name for name in names]
    return EitherParser(parser, getattr(way.parser, "opens", begins))
