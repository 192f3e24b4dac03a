"""An answer as it grows: token ids in, text out, and stop strings found on the way."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from octavo.errors import InvalidArgumentError
from octavo.text.tokenizer import Tokenizer


class StreamDecoder:
    """Text of a growing list of token ids, O(1) amortized a token.

    The pieces that `push` and at last `flush` return, put together, are `tokenizer.decode` of all
    the ids. A character whose bytes are spread over tokens comes out when it is whole; U+FFFD
    appears only for bytes that can no longer become a character, or at `flush`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        *,
        continues: bool = False,
        kept: Collection[int] = (),
    ) -> None:
        """Begin a new stream.

        continues: the ids go on from a text before them, so that the space which a sentencepiece
        tokenizer drops at the start of a text is kept: prompt + answer reads right.
        kept: special tokens that stay in the text, such as the tags around calls of tools.
        """
        self._tokenizer = tokenizer
        special = tokenizer.special_ids.difference(kept)
        self._skipped = special if skip_special_tokens else frozenset()
        self._pipeline = tokenizer.pipeline(at_start=not continues)

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; "" while a character is unfinished."""
        if token_id in self._skipped:
            return ""
        token = self._tokenizer.token(token_id)
        return "" if token is None else self._pipeline.push(token)

    def skipped(self, token_id: int) -> str:
        """The text of a special token that `push` leaves out; "" for every other token."""
        return (self._tokenizer.token(token_id) or "") if token_id in self._skipped else ""

    def flush(self) -> str:
        """What is left when no token follows; the decoder is not to be pushed again."""
        return self._pipeline.finish()


class StopChecker:
    """Finds stop strings in text that arrives in pieces, however they are cut.

    The text of special tokens counts, though it is hidden from the reader: a stop string may be one
    of them, or hold one. Holds back the end of the text while it could still be the beginning of a
    stop string, and cuts exactly before the first one (behind it, with `include`). The first is
    the one that is complete first; of those complete at the same character, the longest.

    Each stop string is followed by the automaton of Knuth, Morris and Pratt (1977): O(1)
    amortized a character and stop string.
    """

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise InvalidArgumentError(f"stop is {stop!r}; expected non-empty strings")
        self._stop = stop
        self._failures = [_failures(text) for text in stop]
        self._states = [0] * len(stop)  # how much of each stop string the text ends with
        self._include = include
        self._held = ""
        self._visible: list[bool] = []  # of each character held back
        self.matched: str | None = None

    def push(self, text: str, armed: bool = True, *, hidden: bool = False) -> str:
        """The text that may be shown. Once `matched` is set, nothing more comes.

        armed: False lets stop strings that are complete within this text pass (min_tokens).
        hidden: the text is looked at and never shown, unless it is in a stop string that is kept.
        """
        if self.matched is not None:
            return ""
        if not self._stop:
            return "" if hidden else text
        start = len(self._held)
        self._held += text
        self._visible += [not hidden] * len(text)
        for position, character in enumerate(text, start=start + 1):
            match = self._advance(character, armed)
            if match is None:
                continue
            self.matched = match
            begin = position - len(match)
            if not self._include:
                return self._take(begin)
            self._visible[begin:position] = [True] * len(match)
            return self._take(position)
        return self._take(len(self._held) - max(self._states))

    def flush(self) -> str:
        """The text still held back, when the answer ended for another reason."""
        if self.matched is not None:
            return ""
        self._states = [0] * len(self._stop)
        return self._take(len(self._held))

    def _take(self, count: int) -> str:
        """Remove the first characters of what is held back; returns those that are visible."""
        text = "".join(itertools.compress(self._held[:count], self._visible))
        self._held, self._visible = self._held[count:], self._visible[count:]
        return text

    def _advance(self, character: str, armed: bool) -> str | None:
        """Move every automaton by one character; the longest stop string complete here."""
        longest: str | None = None
        for index, stop in enumerate(self._stop):
            failures = self._failures[index]
            state = self._states[index]
            while state and stop[state] != character:
                state = failures[state - 1]
            if stop[state] == character:
                state += 1
            if state == len(stop):
                if armed and (longest is None or len(stop) > len(longest)):
                    longest = stop
                state = failures[state - 1]
            self._states[index] = state
        return longest


def _failures(text: str) -> list[int]:
    """Entry i: the length of the longest proper prefix of text[:i + 1] that is also its suffix."""
    table = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = table[length - 1]
        if text[index] == text[length]:
            length += 1
        table[index] = length
    return table
