"""Penalties and biases of a request as changes to single logits, kept up to date token by token."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo.engine.dry import Dry
from octavo.engine.request import Sequence

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


class LogitAdjustments(NamedTuple):
    """Arguments of `Runtime.sample`; `octavo.reference.sampling.adjust_logits` defines them."""

    row_starts: Int32
    token_ids: Int32
    repetition: Float32
    bias: Float32


class Adjuster:
    """Which logits of one answer are to be changed, and how.

    The order is: repetition_penalty, over prompt and answer; then logit_bias is added and
    frequency_penalty and presence_penalty, over the answer alone, are taken off, and what DRY
    makes of both. (vLLM adds the
    bias first; it makes a difference only to a token that has both.)
    """

    @classmethod
    def create(cls, sequence: Sequence, tokenizer: Tokenizer | None = None) -> Adjuster | None:
        """None for a request that changes no logits, as nearly all."""
        params = sequence.params
        is_needed = params.logit_bias or sequence.has_penalties
        return cls(sequence, tokenizer) if is_needed else None

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer | None) -> None:
        params = sequence.params
        self._sequence = sequence
        self._num_counted = sequence.num_prompt_tokens
        pairs = dict(params.logit_bias)
        prompt = sequence.token_ids[: self._num_counted] if params.repetition_penalty != 1 else []
        # Sorted by token, each once; the other columns have the same length.
        self._tokens = np.unique(np.array([*pairs, *prompt], np.int32))
        self._bias = np.array([pairs.get(t, 0.0) for t in self._tokens.tolist()], np.float32)
        self._counts = np.zeros(len(self._tokens), np.float32)  # in the answer
        self._seen = np.isin(self._tokens, np.array(prompt, np.int32))  # in prompt or answer
        self._dry = Dry(sequence, tokenizer) if params.dry_multiplier > 0 else None

    def arrays(self) -> tuple[Int32, Float32, Float32]:
        """token_ids, repetition and bias for the next token of the answer as it is now."""
        params = self._sequence.params
        if self._sequence.has_penalties:
            self._count_new_tokens()
        repetition = np.where(self._seen, np.float32(params.repetition_penalty), np.float32(1))
        bias = self._bias - np.float32(params.frequency_penalty) * self._counts
        bias -= np.float32(params.presence_penalty) * (self._counts > 0)
        tokens, repetition = self._tokens, repetition.astype(np.float32)
        if self._dry is None:
            return tokens, repetition, bias.astype(np.float32)
        repeating, lost = self._dry.penalties()
        every = np.union1d(tokens, repeating).astype(np.int32)
        every_repetition, every_bias = (
            np.ones(len(every), np.float32),
            np.zeros(len(every), np.float32),
        )
        places = np.searchsorted(every, tokens)
        every_repetition[places], every_bias[places] = repetition, bias
        every_bias[np.searchsorted(every, repeating)] -= lost
        return every, every_repetition, every_bias

    def _count_new_tokens(self) -> None:
        token_ids = self._sequence.token_ids
        for position in range(self._num_counted, len(token_ids)):
            token = token_ids[position]
            place = int(np.searchsorted(self._tokens, token))
            if place == len(self._tokens) or self._tokens[place] != token:
                self._tokens = np.insert(self._tokens, place, token)
                self._bias = np.insert(self._bias, place, 0)
                self._counts = np.insert(self._counts, place, 0)
                self._seen = np.insert(self._seen, place, False)
            self._counts[place] += 1
            self._seen[place] = True
        self._num_counted = len(token_ids)


def build_adjustments(adjusters: SequenceOf[Adjuster | None]) -> LogitAdjustments | None:
    """The adjustments of all logit rows together; None when no row has any."""
    if not any(adjusters):
        return None
    none = (np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.float32))
    rows = [none if adjuster is None else adjuster.arrays() for adjuster in adjusters]
    tokens, repetition, bias = zip(*rows, strict=True)
    return LogitAdjustments(
        np.cumsum([0, *(len(row) for row in tokens)], dtype=np.int32),
        np.concatenate(tokens),
        np.concatenate(repetition),
        np.concatenate(bias),
    )
