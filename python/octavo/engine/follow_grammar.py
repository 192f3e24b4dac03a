"""The constraint of structured outputs: an answer follows a grammar."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np

from octavo.engine.constraints import Constraint, UInt32
from octavo.engine.request import Request, Sequence
from octavo.grammar.matcher import Matcher


class FollowGrammar:
    """The text of the answer follows a grammar, and ends where the grammar may end.

    It comes last: where the grammar is complete and leaves nothing but the end, the answer ends
    even if another constraint would not have it, as `MinTokens`.
    """

    is_active = True
    watches_answer = True

    def __init__(
        self, sequence: Sequence, stop_token_ids: Collection[int], matcher: Matcher
    ) -> None:
        self._sequence = sequence
        self._stop_token_ids = stop_token_ids
        self._matcher = matcher
        self._num_accepted = sequence.num_prompt_tokens

    def forbid(self, words: UInt32) -> None:
        for token in self._sequence.token_ids[self._num_accepted :]:
            self._matcher.accept(token)
            self._num_accepted += 1
        found, may_end = self._matcher.allowed()
        allowed = found[: len(words)]
        if may_end:
            _set_bits(allowed, self._stop_token_ids)
        words &= allowed
        if may_end and not words.any():
            _set_bits(words, self._stop_token_ids)


def grammar_constraints(
    request: Request, sequence: Sequence, stop_token_ids: Collection[int]
) -> list[Constraint]:
    """The constraint of one answer of a request, if it follows a grammar."""
    if request.grammar is None:
        return []
    matcher = request.grammar.matcher(continues=request.continues_prompt)
    return [FollowGrammar(sequence, stop_token_ids, matcher)]


def _set_bits(words: UInt32, token_ids: Iterable[int]) -> None:
    for token in token_ids:
        words[token >> 5] |= np.uint32(1 << (token & 31))
