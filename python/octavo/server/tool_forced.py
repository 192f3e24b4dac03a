"""The parser of answers that a grammar has made calls and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
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
