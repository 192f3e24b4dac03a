"""Breaking lines between words while a text is still being written to a terminal."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from rich.cells import cell_len

_LONGEST_WORD = 24  # columns; a longer one may be broken: to hold it back would take too long
_TAB = 8  # columns
_LINE_START = 8  # characters that tell what kind of line it is
_FENCES = ("```", "~~~")
# Chinese, Japanese and Korean characters: a line may be broken before and after each, but not
# before these marks.
_WIDE = re.compile("[\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\uff01-\uffe6]")
_MARKS = frozenset("、。〉》」』】〕〗！），．：；？］｝〜")


class AnswerWriter:
    """Shows a text that comes in parts; anything but a terminal gets it unchanged.

    On a terminal a word that does not fit goes to the next line, and the blanks before it are left
    out. Near the edge a word is shown once it is whole, elsewhere at once. Words longer than 24
    columns, code blocks (between ``` or ~~~) and tables (| first) are not wrapped, so that they can
    be copied. The width is read again for each word: the window may change its size.
    The text must hold no escape sequences (see `common.printable`).
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._wraps = stream.isatty()
        self._column = 0  # of the cursor; as many as the width: behind the last one
        self._start = ""  # of the text's present line
        self._fence = ""  # of the code block that is open, if one is
        self._blanks = ""  # not shown yet: dropped if the line is broken here
        self._word = ""  # the present one, shown or not
        self._num_shown = 0  # characters of it that are on the screen

    def write(self, text: str) -> None:
        """Show some more."""
        if self._wraps:
            for character in text:
                self._take(character)
            self._show_early()
        else:
            self._stream.write(text)
        self._stream.flush()

    def end(self) -> None:
        """Show what was held back."""
        self._end_word()
        self._show(self._blanks)
        self._blanks = ""
        self._stream.flush()

    def _take(self, character: str) -> None:
        if character == "\n":
            self._end_line()
            return
        if character in " \t":
            self._end_word()
            self._blanks += character
        else:
            if self._word and _may_break(self._word[-1], character):
                self._end_word()
            self._word += character
        if len(self._start) < _LINE_START:
            self._start += character

    def _end_line(self) -> None:
        self._end_word()
        self._blanks = ""
        mark = self._start.lstrip()[:3]
        if self._fence:
            self._fence = "" if mark == self._fence else self._fence
        elif mark in _FENCES:
            self._fence = mark
        self._stream.write("\n")
        self._column, self._start = 0, ""

    def _end_word(self) -> None:
        if self._word:
            self._show_word()
            self._word, self._num_shown = "", 0

    def _show_early(self) -> None:
        """Show the part of an unfinished word that surely fits."""
        room = _width() - self._column - _columns(self._blanks)
        longest = min(_LONGEST_WORD, _width())
        if self._word and (self._num_shown or room >= longest or cell_len(self._word) > longest):
            self._show_word()

    def _show_word(self) -> None:
        """Put what is not shown of the word here, or on a new line if it does not fit."""
        as_it_is = self._num_shown or self._fence or self._start.lstrip().startswith("|")
        needed = _columns(self._blanks) + cell_len(self._word)
        if not as_it_is and self._column and self._column + needed > _width():
            self._stream.write("\n")
            self._column, self._blanks = 0, ""
        self._show(self._blanks + self._word[self._num_shown :])
        self._blanks, self._num_shown = "", len(self._word)

    def _show(self, text: str) -> None:
        self._stream.write(text)
        self._column += _columns(text)
        if self._column > _width():  # the terminal has broken the line
            self._column = (self._column - 1) % _width() + 1


@contextmanager
def dimmed(stream: IO[str]) -> Iterator[None]:
    """What is written meanwhile is dim, on a terminal that can show it so."""
    can = stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
    stream.write("\x1b[2m" if can else "")
    try:
        yield
    finally:
        stream.write("\x1b[0m" if can else "")
        stream.flush()


def _may_break(before: str, after: str) -> bool:
    """Whether a line may be broken between two characters, neither of them a blank."""
    if after in _MARKS:
        return False
    return bool(_WIDE.match(after) or (_WIDE.match(before) and after.isalnum()))


def _columns(text: str) -> int:
    """The width of a text in columns; a tab counts as 8."""
    return cell_len(text.replace("\t", " " * _TAB))


def _width() -> int:
    return max(1, shutil.get_terminal_size().columns)
