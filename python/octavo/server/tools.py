"""Calls of tools found in an answer, for the ways of writing them that models were trained on.

Hermes and Qwen: <tool_call>{"name": …, "arguments": {…}}</tool_call>, anywhere in the text.
Llama 3: {"name": …, "parameters": {…}}, several being separated by ";", as the whole answer or
behind <|python_tag|>.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, field
from typing import Any, Literal

from octavo.server.reasoning import overlap

ToolFormat = Literal["hermes", "llama3_json"]
# What a parser looks for; in some vocabularies these are special tokens.
_PYTHON = "<|python_tag|>"
TAGS = {"hermes": ("<tool_call>", "</tool_call>"), "llama3_json": (_PYTHON,)}


@dataclass(frozen=True)
class ToolCall:
    """A call: the function's name, and its arguments as JSON text."""

    name: str
    arguments: str
    call_id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def as_json(self) -> dict[str, Any]:
        """As OpenAI's API has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


@dataclass(frozen=True)
class Arguments:
    """More of the arguments of the last call."""

    text: str


Piece = str | ToolCall | Arguments  # of an answer without its thinking


def detect_format(template: str) -> ToolFormat | None:
    """The format that a chat template teaches; None where it has no tools, or unknown ones."""
    if "tools" not in template:
        return None
    if "<tool_call>" in template:
        return "hermes"
    if '"parameters"' in template and ("<|python_tag|>" in template or "ipython" in template):
        return "llama3_json"
    return None


def tags_of(tool_format: ToolFormat) -> tuple[str, str]:
    """What stands before and behind a call where one must come; "" for nothing."""
    tags = TAGS[tool_format]
    return (tags[0], tags[-1]) if len(tags) == 2 else ("", "")


def arguments_key(tool_format: ToolFormat) -> str:
    """What the arguments are called in a call."""
    return "arguments" if tool_format == "hermes" else "parameters"


class HermesParser:
    """Cuts <tool_call>…</tool_call> out of the text.

    What might be the beginning of a tag is held back. Of a call that is no JSON the text is shown
    as it is: nothing the model says is lost.
    """

    _OPEN, _CLOSE = TAGS["hermes"]

    def __init__(self) -> None:
        self._held = ""
        self._inside = False
        self._behind_call = False
        self._space = ""  # behind a call, held back until it is known what follows

    def push(self, text: str) -> list[Piece]:
        """What this text makes certain."""
        self._held += text
        pieces: list[Piece] = []
        while True:
            tag = self._CLOSE if self._inside else self._OPEN
            before, found, rest = self._held.partition(tag)
            if not found:
                break
            self._held = rest
            pieces += self._calls(before, closed=True) if self._inside else self._show(before)
            self._inside = not self._inside
        if not self._inside:
            cut = len(self._held) - overlap(self._held, self._OPEN)
            shown, self._held = self._held[:cut], self._held[cut:]
            pieces += self._show(shown)
        return pieces

    def finish(self) -> list[Piece]:
        """What is left at the end; a last call may lack its closing tag."""
        held, self._held = self._held, ""
        return self._calls(held, closed=False) if self._inside else self._show(held)

    def _show(self, text: str) -> list[Piece]:
        text, self._space = self._space + text, ""
        if self._behind_call and not text.strip():  # between two calls it is no answer
            self._space = text
            return []
        self._behind_call = False
        return [text] if text else []

    def _calls(self, text: str, *, closed: bool) -> list[Piece]:
        whole = text.strip(" \t\n\r")
        call, end = _read_call(whole)
        if call is None or end < len(whole):
            return [f"{self._OPEN}{text}{self._CLOSE if closed else ''}"]
        self._behind_call, self._space = True, ""
        return [call]


class Llama3Parser:
    """An answer that begins with "{" may be a call, so it is held back to its end.

    So is what follows <|python_tag|>, wherever it stands.
    """

    def __init__(self) -> None:
        self._held = ""
        self._is_text = False  # something of the answer has been shown
        self._may_be_call = False

    def push(self, text: str) -> list[Piece]:
        """What this text makes certain."""
        self._held += text
        if self._may_be_call:
            return []
        begin = self._held.find(_PYTHON)
        if not self._is_text and self._held.lstrip().startswith("{"):
            begin = 0
        self._may_be_call = begin >= 0
        cut = begin if self._may_be_call else len(self._held) - overlap(self._held, _PYTHON)
        shown = self._held[:cut]
        if not self._is_text and not shown.strip():  # space that may part nothing from a call
            return []
        self._is_text, self._held = True, self._held[cut:]
        return [shown] if shown else []

    def finish(self) -> list[Piece]:
        """The calls, if what was held back is calls; else the text."""
        held, self._held = self._held, ""
        calls = _read_calls(held) if self._may_be_call else []
        return calls or ([held] if held else [])


class ForcedParser:
    """Reads an answer that is calls and nothing else, and gives their arguments as they come.

    The answer follows `octavo.server.structured.calls_of_tools`, so what stands before the
    arguments is known to the last space.
    """

    _HEAD = re.compile(r'\{"name": ("(?:[^"\\]|\\.)*"), "(?:arguments|parameters)": ')

    def __init__(self) -> None:
        self._held = ""
        self._depth = 0  # of the brackets of the arguments
        self._inside = self._in_string = self._is_escaped = False

    @property
    def is_inside(self) -> bool:
        """Whether the arguments of the last call have not ended."""
        return self._inside

    def push(self, text: str) -> list[Piece]:
        """What this text makes certain."""
        self._held += text
        pieces: list[Piece] = []
        while True:
            if not self._inside:
                head = self._HEAD.search(self._held)
                if head is None:
                    return pieces
                pieces.append(ToolCall(json.loads(head[1]), ""))
                self._held, self._inside = self._held[head.end() :], True
            end = self._end_of_arguments(self._held)
            taken = self._held[:end]
            self._held = self._held[len(taken) :]
            if taken:
                pieces.append(Arguments(taken))
            if end is None:
                return pieces
            self._inside = False

    def finish(self) -> list[Piece]:
        """Nothing: the arguments of a call that was cut off have been given."""
        return []

    def _end_of_arguments(self, text: str) -> int | None:
        """Where the object ends, whose beginning has been seen; None: not in this text."""
        for index, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return index + 1
        return None


ToolParser = HermesParser | Llama3Parser | ForcedParser


def make_parser(tool_format: ToolFormat, *, forced: bool = False) -> ToolParser:
    """A parser for one answer; forced: it can be nothing but calls."""
    if forced:
        return ForcedParser()
    return HermesParser() if tool_format == "hermes" else Llama3Parser()


def _read_calls(text: str) -> list[Piece]:
    """The calls that `text` consists of; none if some of it is no call."""
    calls: list[Piece] = []
    text = text.strip().removeprefix(_PYTHON).lstrip()
    while text:
        call, end = _read_call(text, is_bare=True)
        if call is None:
            return []
        calls.append(call)
        text = text[end:].lstrip().removeprefix(";").lstrip().removeprefix(_PYTHON).lstrip()
    return calls


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


_HALF_PAIR = re.compile("[\ud800-\udfff]")
_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _read_call(text: str, *, is_bare: bool = False) -> tuple[ToolCall | None, int]:
    """The call that `text` begins with, and where it ends.

    is_bare: no tags say that it is a call; an object with a name and no arguments, but something
    else, is none.
    """
    try:
        content, end = _DECODER.raw_decode(text)
        if not isinstance(content, dict) or not isinstance(content.get("name"), str):
            return None, 0
        key = next((key for key in ("arguments", "parameters") if key in content), None)
        if is_bare and key is None and content.keys() - {"name", "type", "id"}:
            return None, 0
        content["name"].encode()
        arguments = _argument_text({} if key is None else content[key])
    except (ValueError, RecursionError):
        return None, 0
    return ToolCall(content["name"], arguments), end


def _argument_text(arguments: Any) -> str:
    """Arguments as JSON text, which they may be already; half a surrogate pair stays escaped."""
    text = arguments if isinstance(arguments, str) else None
    try:
        _DECODER.decode(text or "")
    except ValueError:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return _HALF_PAIR.sub(lambda found: f"\\u{ord(found[0]):04x}", str(text))
