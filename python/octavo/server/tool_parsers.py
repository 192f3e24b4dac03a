"""Parsers that find the calls of tools in an answer, whole or cut anywhere, one class a format.

What might be the beginning of a call is held back. What turns out to be none is shown as it is:
nothing the model says is lost.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from octavo.server.reasoning import before_tag
from octavo.server.tool_calls import (
    Piece,
    Quotes,
    ToolCall,
    read_json,
    read_json_calls,
    read_python_calls,
    short_id,
)

Tools = Sequence[Mapping[str, Any]]
SPACE = r"[ \t\r\n]{0,64}"  # an expression of what may stand between two parts of JSON


class ToolParser(ABC):
    """Takes one answer apart as it comes.

    tools: those of the request, for what needs a schema. names: theirs, as `Writing.first` has
    them, where a grammar writes the calls; what it cannot have written is none then.
    """

    def __init__(self, tools: Tools = (), names: Sequence[str] | None = None) -> None:
        self._tools, self._names = tools, names
        self._held = ""

    @property
    def is_inside(self) -> bool:
        """Whether a call has been given whose arguments have not ended."""
        return False

    @abstractmethod
    def push(self, text: str) -> list[Piece]:
        """What this text makes certain."""

    @abstractmethod
    def finish(self) -> list[Piece]:
        """What is left at the end."""


class MarkedParser(ToolParser):
    """Calls stand behind one of `opens`, anywhere in the text.

    They end at `close`, or at the end of the answer if that comes first. A format without `close`
    has its calls up to the next of `opens`, and what follows them there is text. A mark within a
    string is none.
    """

    opens: ClassVar[tuple[str, ...]]
    close: ClassVar[str] = ""
    quotes: ClassVar[str] = '"'

    def __init__(self, tools: Tools = (), names: Sequence[str] | None = None) -> None:
        super().__init__(tools, names)
        self._opens = re.compile("|".join(map(re.escape, self.opens)))
        self._ends = re.compile(re.escape(self.close)) if self.close else self._opens
        self._open = ""  # the mark behind which `_inner` and then `_held` stand
        self._inner: list[str] = []  # in as many parts as it came in
        self._quotes = self.new_quotes()
        self._is_behind_call = False
        self._space: list[str] = []  # behind a call, held back until it is known what follows

    @abstractmethod
    def read(self, mark: str, text: str) -> tuple[list[ToolCall], str]:
        """The calls in what stands behind this mark, and the text that follows them."""

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while True:
            if not self._open:
                begin = self._opens.search(self._held)
                if begin is None:
                    break
                pieces += self._show(self._held[: begin.start()])
                self._open, self._held = begin[0], self._held[begin.end() :]
            if not self._reaches_end():
                return pieces
            self._held = self._held.removeprefix(self.close)
            pieces += self._take(self.close)
        shown, self._held = before_tag(self._held, *self.opens)
        return pieces + self._show(shown)

    def finish(self) -> list[Piece]:
        held, self._held = self._held, ""
        if not self._open:
            return self._show(held)
        if self.close:  # the beginning of which is no call
            return self._take(held)
        self._inner.append(held)
        return self._take("")

    def new_quotes(self) -> Quotes:
        """What tells of one call where it is within a string, so that no mark ends it."""
        return Quotes(self.quotes)

    def _reaches_end(self) -> bool:
        """Read what is held, up to the end of the call; whether that follows."""
        at = 0
        for end in self._ends.finditer(self._held):
            is_within = self._grow(self._held[at : end.start()])
            at = end.start()
            if not is_within:
                self._held = self._held[at:]
                return True
        marks = (self.close,) if self.close else self.opens
        more, self._held = before_tag(self._held[at:], *marks)
        self._grow(more)
        return False

    def _grow(self, text: str) -> bool:
        """Add to what stands behind the mark; whether that is within a string now."""
        self._inner.append(text)
        return self._quotes.read(text)

    def _take(self, end: str) -> list[Piece]:
        """The calls, or what turned out to be none. end: what stood behind it."""
        mark, inner = self._open, "".join(self._inner)
        self._open, self._inner, self._quotes = "", [], self.new_quotes()
        return self._found(*self.read(mark, inner), mark + inner + end)

    def _found(self, calls: list[ToolCall], rest: str, whole: str) -> list[Piece]:
        if not calls:
            return self._show(whole)
        self._is_behind_call, self._space = True, []
        return [*calls, *self._show(rest)]

    def _show(self, text: str) -> list[Piece]:
        if self._is_behind_call and not text.strip():  # between two calls it is no answer
            self._space.append(text)
            return []
        text = "".join([*self._space, text])
        self._is_behind_call, self._space = False, []
        return [text] if text else []


class HermesParser(MarkedParser):
    """Hermes, Qwen, Granite 4, SmolLM3: <tool_call>{"name": …, "arguments": …}</tool_call>."""

    opens, close = ("<tool_call>",), "</tool_call>"

    def read(self, mark: str, text: str) -> tuple[list[ToolCall], str]:
        return _all_calls(*read_json_calls(text))


class GraniteParser(MarkedParser):
    """Granite 3: <|tool_call|>[{"name": …, "arguments": …}, …], or behind <tool_call>."""

    opens = ("<|tool_call|>", "<tool_call>")

    def read(self, mark: str, text: str) -> tuple[list[ToolCall], str]:
        return read_json_calls(text)


class Phi4MiniParser(MarkedParser):
    """Phi-4-mini: functools[{"name": …, "arguments": …}, …], or <|tool_call|>[…]<|/tool_call|>."""

    opens = ("<|tool_call|>", "functools[")
    _CLOSE = "<|/tool_call|>"

    def read(self, mark: str, text: str) -> tuple[list[ToolCall], str]:
        calls, rest = read_json_calls("[" + text if mark == "functools[" else text)
        following = rest.lstrip()
        if self._CLOSE.startswith(following.rstrip()):  # all of it, or cut off
            return calls, ""
        is_closed = following.startswith(self._CLOSE)
        return calls, following.removeprefix(self._CLOSE) if is_closed else rest


class MistralParser(MarkedParser):
    """Mistral: [TOOL_CALLS][{"name": …, "arguments": …}, …], later [TOOL_CALLS]name[ARGS]{…}.

    A call's id may come behind [CALL_ID]. The ids that are given are such as templates demand.
    """

    opens = ("[TOOL_CALLS]",)
    _HEAD = re.compile(
        r'\s*(?:([^\s\[\]{}"][^\[\]{}"\n]*)(?:\[CALL_ID\][^\[\]{}]*)?\[ARGS\]|([\w.-]+))\s*(?=\{)'
    )

    def read(self, mark: str, text: str) -> tuple[list[ToolCall], str]:
        head = self._HEAD.match(text)
        if head is None:
            calls, rest = read_json_calls(text)
            return [replace(call, call_id=short_id()) for call in calls], rest
        try:
            _, end = read_json(text, head.end())
        except ValueError:
            return [], text
        name = (head[1] or head[2]).strip()
        return [ToolCall(name, text[head.end() : end], short_id())], text[end:]


class DeepSeekParser(MarkedParser):
    """DeepSeek: in a frame, calls of which each has its own marks.

    V3 and R1 write function<｜tool▁sep｜>name and the arguments in a block of Markdown, V3.1
    name<｜tool▁sep｜>{…}.
    """

    opens, close = ("<｜tool▁calls▁begin｜>",), "<｜tool▁calls▁end｜>"
    _HEAD = re.compile(
        r"\s*<｜tool▁call▁begin｜>(?:[^<\n]*<｜tool▁sep｜>([^<\n]+)\n```json\s*|([^<\n]+)<｜tool▁sep｜>\s*)"
    )
    _TAIL = re.compile(r"\s*(?:```)?\s*(?:<｜tool▁call▁end｜>)?")

    def read(self, mark: str, text: str) -> tuple[list[ToolCall], str]:
        calls: list[ToolCall] = []
        at = 0
        while head := self._HEAD.match(text, at):
            try:
                _, end = read_json(text, head.end())
            except ValueError:
                break
            calls.append(ToolCall((head[1] or head[2]).strip(), text[head.end() : end]))
            tail = self._TAIL.match(text, end)
            at = tail.end() if tail else end
        return _all_calls(calls, text[at:])


class Olmo3Parser(MarkedParser):
    """OLMo 3: <function_calls>f(a=1), a line each</function_calls>."""

    opens, close, quotes = ("<function_calls>",), "</function_calls>", "\"'"

    def read(self, mark: str, text: str) -> tuple[list[ToolCall], str]:
        return read_python_calls(text), ""


def _all_calls(calls: list[ToolCall], rest: str) -> tuple[list[ToolCall], str]:
    """None, where anything but calls stands between two marks."""
    return ([], rest) if rest.strip() else (calls, "")


class LeadingParser(ToolParser):
    """An answer that begins as calls do may be calls, so it is held back to its end.

    So is what follows one of the marks, wherever that stands. Where a grammar writes the calls,
    they begin with `lead` and a name.
    """

    marks: ClassVar[tuple[str, ...]]
    lead: ClassVar[str]  # an expression of what a grammar takes before the name of the first call
    tail: ClassVar[str] = ""  # what may stand behind the last call
    # Of an answer without the space before it; what they match is short, whatever the answer.
    begins: ClassVar[re.Pattern[str]]  # an answer that may be calls
    may_begin: ClassVar[re.Pattern[str]]  # what is too short to tell

    def __init__(self, tools: Tools = (), names: Sequence[str] | None = None) -> None:
        super().__init__(tools, names)
        self._kept: list[str] = []  # before what is held: the first space, or what may be a call
        self._is_text = False  # something of the answer has been shown
        self._may_be_call = False

    @abstractmethod
    def read(self, text: str) -> list[ToolCall]:
        """The calls that all of the text is; none if some of it is no call."""

    def push(self, text: str) -> list[Piece]:
        if self._may_be_call:
            self._kept.append(text)
            return []
        self._held += text
        if not self._is_text:
            begun = self._held.lstrip()
            self._kept.append(self._held[: len(self._held) - len(begun)])
            self._held = begun
            if self.may_begin.fullmatch(begun):
                return []
        found = [at for at in map(self._held.find, self.marks) if at >= 0]
        if not self._is_text and self.begins.match(self._held):
            found = [0]
        if found:
            self._may_be_call, at = True, min(found)
            shown, self._held = self._held[:at], self._held[at:]
        else:
            shown, self._held = before_tag(self._held, *self.marks)
        if shown:
            shown = "".join([*self._kept, shown])
            self._is_text, self._kept = True, []
        if found:
            self._kept.append(self._held)
            self._held = ""
        return [shown] if shown else []

    def finish(self) -> list[Piece]:
        held = "".join([*self._kept, self._held])
        self._kept, self._held = [], ""
        begin = self._begin_of_calls(held) if self._may_be_call else -1
        calls = self.read(held[begin:]) if begin >= 0 else []
        if not calls:
            return [held] if held else []
        return [held[:begin], *calls] if held[:begin].strip() else [*calls]

    def _begin_of_calls(self, text: str) -> int:
        """Where there may be calls, from there to the end; -1: nowhere."""
        names = "|".join(map(re.escape, self._names or ()))
        if self._names is None or re.match(f"{self.lead}(?:{names})", text):
            return 0
        found = [at for at in map(text.find, self.marks) if at >= 0]
        return min(found, default=-1)


class Llama3Parser(LeadingParser):
    """Llama 3: {"name": …, "parameters": …}, several being separated by ";"."""

    marks = ("<|python_tag|>",)
    lead = r'_\{_(?:"type"_:_"function"_,_)?"name"_:_'.replace("_", SPACE)
    begins, may_begin = re.compile(r"\{"), re.compile("")

    def read(self, text: str) -> list[ToolCall]:
        calls, rest = read_json_calls(text, is_bare=True)
        return _all_calls(calls, rest.strip().removeprefix(";"))[0]


class PythonicParser(LeadingParser):
    """Llama 3.2 and 4, Gemma 3 by vLLM's templates: [f(a=1, b="x"), g()]."""

    marks = ("<|python_start|>", "<|python_tag|>")
    lead, tail = rf"{SPACE}\[{SPACE}", "<|python_end|>"
    begins = re.compile(r"\[\s{0,99}[A-Za-z_][\w.]{0,255}\s{0,99}\(")
    may_begin = re.compile(r"(?:\[\s{0,99}(?:[A-Za-z_][\w.]{0,255}\s{0,99})?)?")
    _MARKS = re.compile(r"\A\s*<\|python_(?:start|tag)\|>|<\|python_end\|>\s*\Z")

    def read(self, text: str) -> list[ToolCall]:
        return read_python_calls(self._MARKS.sub("", text))
