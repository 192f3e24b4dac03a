"""Calls of tools, and the two notations they are written in: JSON, and calls in Python's syntax."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import string
from dataclasses import dataclass, field
from typing import Any

_LETTERS = string.ascii_letters + string.digits
MAX_DEPTH = 64  # of values within values


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


def short_id() -> str:
    """Nine letters and digits, which Mistral's chat templates demand of a call's id."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))


def to_json(value: Any) -> str:
    """JSON text that can be sent; a ValueError for numbers that JSON has not, and for depth."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:  # half of a pair of surrogates
        return json.dumps(value)
    except RecursionError as error:  # what is read just so may be too deep to be written
        raise ValueError("too many values within each other") from error
    return text


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


_HALF_PAIR = re.compile("[\ud800-\udfff]")
_DECODER = json.JSONDecoder(parse_constant=_refuse)


def read_json(text: str, begin: int = 0) -> tuple[Any, int]:
    """The JSON value that begins there, and where it ends. Raises ValueError."""
    try:
        return _DECODER.raw_decode(text, begin)
    except RecursionError as error:
        raise ValueError("too many values within each other") from error


# Between calls, and before them.
_BETWEEN = re.compile(r"\s*[;,]?\s*(?:<\|python_tag\|>)?\s*")


def read_json_calls(text: str, *, is_bare: bool = False) -> tuple[list[ToolCall], str]:
    """The calls that `text` begins with, and the rest: objects, or lists of objects.

    is_bare: nothing else says that they are calls; an object with a name and no arguments, but
    something else, is none.
    """
    calls: list[ToolCall] = []
    end = 0
    while end < len(text):
        begin = _BETWEEN.match(text, end)
        try:
            content, following = read_json(text, begin.end() if begin else end)
            members = content if isinstance(content, list) else [content]
            found = [_json_call(each, is_bare) for each in members]
        except ValueError:
            break
        if not found:
            break
        calls += found
        end = following
    return calls, text[end:]


def _json_call(content: Any, is_bare: bool) -> ToolCall:
    """The call that an object is. Raises ValueError where it is none."""
    name = content.get("name") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise ValueError("no object with a name")
    key = next((key for key in ("arguments", "parameters") if key in content), None)
    if is_bare and key is None and content.keys() - {"name", "type", "id"}:
        raise ValueError("an object that is no call")
    name.encode()  # a ValueError: half of a pair of surrogates
    return ToolCall(name, _argument_text({} if key is None else content[key]))


def _argument_text(arguments: Any) -> str:
    """Arguments as JSON text, which they may be already."""
    if isinstance(arguments, str):
        text = arguments.strip()
        with contextlib.suppress(ValueError):
            value, end = read_json(text)
            if end == len(text):
                is_plain = not _HALF_PAIR.search(text)
                return text if is_plain else to_json(value)
    return to_json(arguments)


class Quotes:
    """Whether a text that is read piece by piece ends within a string.

    No string of JSON, whose only mark is ", goes beyond its line: what is behind one that lacks its
    end is none of it.
    """

    def __init__(self, marks: str) -> None:
        self._marks = marks
        self._ends = "\n" if marks == '"' else ""
        self._inside = ""
        self._is_escaped = False

    def read(self, text: str) -> bool:
        """Whether the string is still open behind this piece."""
        for character in text:
            if self._is_escaped:
                self._is_escaped = False
            elif self._inside:
                self._is_escaped = character == "\\"
                is_end = character == self._inside or character in self._ends
                self._inside = "" if is_end else self._inside
            elif character in self._marks:
                self._inside = character
        return bool(self._inside)


_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
_SPACE = re.compile(r"\s*")
_STRING = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_ESCAPE = re.compile(
    r"\\(\n|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|[\\'\"abfnrtv/])"
)
# The last, "\\/", is JSON's.
_ESCAPES = dict(zip("\\'\"abfnrtv\n/", "\\'\"\a\b\f\n\r\t\v\n/", strict=True)) | {"\n": ""}
_WORDS = {
    **{"True": True, "False": False, "None": None},
    **{"true": True, "false": False, "null": None},  # as the tools' schemas spell them
}


def is_python_name(text: str) -> bool:
    """Whether `PythonReader` takes this for the name of a function or an argument."""
    return _NAME.fullmatch(text) is not None


class PythonReader:
    """Reads calls in Python's syntax whose arguments are literals: f(a=1, b=["x", None]).

    Nothing is evaluated. All methods raise a ValueError for anything else.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def calls(self) -> list[ToolCall]:
        """All of the text: a list of calls, or calls without brackets, commas between or not."""
        has_brackets = self._take("[")
        found: list[ToolCall] = []
        while not self._is_end() and not self._next_is("]"):
            found.append(self._call())
            if not self._take(",") and has_brackets:
                break
        if has_brackets:
            self._demand("]")
        if not self._is_end():
            raise ValueError("more than calls")
        return found

    def literal(self) -> Any:
        """All of the text: one value."""
        found = self._value(0)
        if not self._is_end():
            raise ValueError("more than a value")
        return found

    def _call(self) -> ToolCall:
        name = self._match(_NAME)[0]
        arguments: dict[str, Any] = {}
        self._demand("(")
        while not self._take(")"):
            key = self._match(_NAME)[0]
            self._demand("=")
            arguments[key] = self._value(0)
            if not self._take(",") and not self._next_is(")"):
                raise ValueError("no end of the arguments")
        return ToolCall(name, to_json(arguments))

    def _value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError("too many values within each other")
        self._skip()
        first = self._text[self._at : self._at + 1]
        if first and first in "'\"":
            return self._string()
        if first == "{":
            return self._mapping(depth)
        if first and first in "[(":
            self._at += 1
            return self._values("]" if first == "[" else ")", depth)
        if first.isalpha():
            word = self._match(_NAME)[0]
            if word not in _WORDS:
                raise ValueError(f"{word} is no literal")
            return _WORDS[word]
        number = self._match(_NUMBER)[0]
        return float(number) if set(number) & set(".eE") else int(number)

    def _string(self) -> str:
        parts = []
        while self._next_is("'") or self._next_is('"'):
            found = self._match(_STRING)
            parts.append(_ESCAPE.sub(_unescape, found[1] if found[2] is None else found[2]))
        return "".join(parts)

    def _values(self, end: str, depth: int) -> list[Any]:
        found = []
        while not self._take(end):
            found.append(self._value(depth + 1))
            if not self._take(",") and not self._next_is(end):
                raise ValueError(f"no {end!r}")
        return found

    def _mapping(self, depth: int) -> dict[str, Any]:
        self._demand("{")
        found: dict[str, Any] = {}
        while not self._take("}"):
            key = self._value(depth + 1)
            if not isinstance(key, str):
                raise ValueError("a key is no string")
            self._demand(":")
            found[key] = self._value(depth + 1)
            if not self._take(",") and not self._next_is("}"):
                raise ValueError("no '}'")
        return found

    def _skip(self) -> None:
        space = _SPACE.match(self._text, self._at)
        self._at = space.end() if space else self._at

    def _is_end(self) -> bool:
        self._skip()
        return self._at == len(self._text)

    def _next_is(self, mark: str) -> bool:
        self._skip()
        return self._text.startswith(mark, self._at)

    def _take(self, mark: str) -> bool:
        found = self._next_is(mark)
        self._at += len(mark) if found else 0
        return found

    def _demand(self, mark: str) -> None:
        if not self._take(mark):
            raise ValueError(f"no {mark!r}")

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str]:
        self._skip()
        found = pattern.match(self._text, self._at)
        if found is None:
            raise ValueError("no literal")
        self._at = found.end()
        return found


def _unescape(found: re.Match[str]) -> str:
    what = found[1]
    if what in _ESCAPES:
        return _ESCAPES[what]
    code = int(what[1:], 16) if what[0] in "xuU" else int(what, 8)
    return chr(code) if code <= 0x10FFFF else found[0]


def read_python_calls(text: str) -> list[ToolCall]:
    """The calls that all of `text` is; none if some of it is no call."""
    try:
        return PythonReader(text).calls()
    except ValueError:
        return []
