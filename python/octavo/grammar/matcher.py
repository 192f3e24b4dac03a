"""A grammar that is compiled, and one answer's way through it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from octavo.grammar.vocabulary import Vocabulary

UInt32 = NDArray[np.uint32]


class Grammar:
    """A compiled grammar, for any number of answers; any thread may ask for a matcher."""

    def __init__(self, vocabulary: Vocabulary, whole: LLMatcher, first: LLMatcher | None) -> None:
        """whole, first: fresh matchers, of all tokens as `Vocabulary` has them."""
        self._vocabulary = vocabulary
        self._whole, self._first = whole, first
        self._copying = threading.Lock()

    def matcher(self, *, continues: bool) -> Matcher:
        """For one answer; continues: its text goes on from the prompt's."""
        with self._copying:  # what was learned of the grammar's automaton stays shared
            whole = self._whole.deep_copy()
            first = None if self._first is None or continues else self._first.deep_copy()
        return Matcher(self._vocabulary, whole, first)


class Matcher:
    """Which tokens may come next in one answer. One thread uses it at a time."""

    def __init__(self, vocabulary: Vocabulary, whole: LLMatcher, first: LLMatcher | None) -> None:
        self._vocabulary = vocabulary
        self._whole, self._first = whole, first
        end = vocabulary.end
        self._end_word, self._end_bit = end >> 5, 1 << (end & 31)
        self._words = np.zeros((end >> 5) + 1, np.uint32)
        self._address = self._words.ctypes.data

    def allowed(self) -> tuple[UInt32, bool]:
        """The tokens that may come next, and whether the text may end here.

        The tokens: uint32 (at least ceil(vocab_size / 32),), token t being bit t % 32 of word
        t // 32; overwritten by the next call. Raises ValueError where the library gives up, as on
        a grammar that is too ambiguous.
        """
        matcher = self._whole if self._first is None else self._first
        matcher.unsafe_compute_mask_ptr(self._address, self._words.nbytes)
        if matcher.is_error():  # the mask would then allow the end alone
            raise ValueError(f"the grammar cannot be followed: {short_error(matcher)}")
        may_end = bool(self._words[self._end_word] & self._end_bit)
        if may_end:
            self._words[self._end_word] &= ~np.uint32(self._end_bit)
        return self._words, may_end

    def accept(self, token: int) -> None:
        """The answer goes on with this token, one of those that were allowed.

        Raises ValueError for any other.
        """
        spelled = [token] if self._first is None else self._vocabulary.spell(token)
        self._first = None
        if not all(self._whole.consume_token(each) for each in spelled):
            raise ValueError(f"the grammar does not go on with token {token}")


def start_matcher(tokens: LLTokenizer, lark: str) -> LLMatcher:
    """A matcher at its start; its error, if any, is found here and not at the first token."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(tokens, lark, log_level=0, limits=limits)  # releases Python's lock
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher


def short_error(matcher: LLMatcher) -> str:
    """The library's message in one line, without the grammar that it repeats."""
    message = matcher.get_error().partition("\n<")[0].partition("<backtrace>")[0]
    return " ".join(message.split())[:500]
