"""What an answer may sample next: constraints, and the bit masks that they become."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from octavo.engine.request import Sequence

Int32 = NDArray[np.int32]
UInt32 = NDArray[np.uint32]


class Constraint(Protocol):
    """Forbids an answer some of the tokens. It belongs to one answer and looks at its sequence."""

    @property
    def is_active(self) -> bool:
        """Whether it may forbid anything from here on; asked before every step, so cheap."""

    @property
    def watches_answer(self) -> bool:
        """Whether it depends on the tokens of the answer, and not only on their number.

        If so, `forbid` is only called when all of them are known.
        """

    def forbid(self, words: UInt32) -> None:
        """Clear the bits of the tokens that must not be sampled next.

        words: uint32 (ceil(vocab_size / 32),); token t is bit t % 32 of word t // 32. An exception
        ends the request that this answer belongs to, and no other.
        """


class MinTokens:
    """No token ends the answer before it has min_tokens of them."""

    watches_answer = False

    def __init__(self, sequence: Sequence, stop_token_ids: Collection[int]) -> None:
        self._sequence = sequence
        self._stop_token_ids = stop_token_ids

    @property
    def is_active(self) -> bool:
        sequence = self._sequence
        return sequence.num_output_tokens < sequence.params.min_tokens

    def forbid(self, words: UInt32) -> None:
        # The token that is about to be sampled is among the pending ones.
        sequence = self._sequence
        index = sequence.num_output_tokens + sequence.num_pending_tokens - 1
        if index < sequence.params.min_tokens:
            clear_bits(words, self._stop_token_ids)


def clear_bits(words: UInt32, token_ids: Iterable[int]) -> None:
    """Forbid these tokens."""
    for token in token_ids:
        words[token >> 5] &= np.uint32(~(1 << (token & 31)) & 0xFFFFFFFF)


def all_allowed(num_rows: int, vocab_size: int) -> Int32:
    """Masks that forbid nothing: int32 (num_rows, ceil(vocab_size / 32)), a set bit allows."""
    masks = np.full((num_rows, (vocab_size + 31) // 32), -1, np.int32)
    if vocab_size % 32:
        masks[:, -1] = (1 << vocab_size % 32) - 1  # no bits of tokens that do not exist
    return masks


def create_constraints(
    sequence: Sequence, stop_token_ids: Collection[int]
) -> SequenceOf[Constraint]:
    """The constraints that a request's parameters ask for; nearly always none."""
    constraints: list[Constraint] = []
    if sequence.params.min_tokens:
        constraints.append(MinTokens(sequence, stop_token_ids))
    return constraints
