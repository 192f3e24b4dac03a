"""Parsers of answers that a grammar has made calls and nothing else, or a text without calls."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from octavo.server.tool_calls import Arguments, Piece, ToolCall
from octavo.server.tool_parsers import ToolParser


class ForcedParser(ToolParser):
    """Reads an answer that is calls and nothing else, and gives their arguments as they come.

    The answer follows `octavo.server.tool_grammar`, so what stands before the arguments is known to
    the last space. head: that, with the name as its first group, which is JSON if it is quoted.
    new_id: makes the ids of the calls; None: as always.
    """

    JSON_HEAD = re.compile(r'\{"name": ("(?:[^"\\]|\\.)*"), "(?:arguments|parameters)": ')

    def __init__(
        self, head: re.Pattern[str] = JSON_HEAD, new_id: Callable[[], str] | None = None
    ) -> None:
        super().__init__()
        self._head, self._new_id = head, new_id
        self._depth = 0  # of the brackets of the arguments
        self._inside = self._in_string = self._is_escaped = False

    @property
    def is_inside(self) -> bool:
        return self._inside

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while True:
            if not self._inside:
                head = self._head.search(self._held)
                if head is None:
                    return pieces
                pieces.append(self._call(head[1]))
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

    def _call(self, name: str) -> ToolCall:
        call = ToolCall(json.loads(name) if name.startswith('"') else name, "")
        return call if self._new_id is None else replace(call, call_id=self._new_id())

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


class EitherParser(ToolParser):
    """Reads an answer that is calls and nothing else, or else a text in which no calls are.

    calls: reads the calls. begins: what they begin with, and no text.
    """

    def __init__(self, calls: ToolParser, begins: Sequence[str]) -> None:
        super().__init__()
        self._calls, self._begins = calls, tuple(begins)
        self._has_calls: bool | None = None  # None: it is not known yet
        self._space: list[str] = []  # before what is held

    @property
    def is_inside(self) -> bool:
        return self._calls.is_inside

    def push(self, text: str) -> list[Piece]:
        if self._has_calls is None:
            text = self._held + text
            self._held = text.lstrip()
            self._space.append(text[: len(text) - len(self._held)])
            has_calls = self._held.startswith(self._begins)
            if not has_calls and any(each.startswith(self._held) for each in self._begins):
                return []
            self._has_calls, text = has_calls, self._take_held()
        if self._has_calls:
            return self._calls.push(text)
        return [text] if text else []

    def finish(self) -> list[Piece]:
        if self._has_calls:
            return self._calls.finish()
        held = self._take_held()
        return [held] if held else []

    def _take_held(self) -> str:
        held = "".join([*self._space, self._held])
        self._space, self._held = [], ""
        return held
