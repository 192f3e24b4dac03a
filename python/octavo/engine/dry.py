"""DRY for one answer: its tokens so far, and where repetitions break off."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from octavo.engine.request import Sequence
from octavo.reference.sampling import Float32, Int32, dry_penalties

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer


class Breakers:
    """Whether a sequence breaker ends in a token, told token by token.

    A breaker is looked for in the text, so it may begin in one token and end in a later one.
    Without a tokenizer there is no text, and nothing breaks.
    """

    def __init__(self, texts: tuple[str, ...], tokenizer: Tokenizer | None) -> None:
        self._breakers = [text.encode() for text in texts] if tokenizer is not None else []
        self._tokenizer = tokenizer
        self._num_kept = max([len(breaker) - 1 for breaker in self._breakers], default=0)
        self._tail = b""
        self._bytes: dict[int, bytes] = {}

    def push(self, token_id: int) -> bool:
        """Whether a breaker ends in this token, the next one."""
        if not self._breakers or self._tokenizer is None:
            return False
        piece = self._bytes.get(token_id)
        if piece is None:
            piece = self._bytes[token_id] = self._tokenizer.token_bytes(token_id)
        text, num_before = self._tail + piece, len(self._tail)
        self._tail = text[len(text) - self._num_kept :] if self._num_kept else b""
        return any(
            text.find(breaker, max(0, num_before - len(breaker) + 1)) >= 0
            for breaker in self._breakers
        )


class Dry:
    """What the next token of an answer loses to DRY; see `octavo.reference.sampling`."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer | None) -> None:
        self._sequence = sequence
        self._breakers = Breakers(sequence.params.dry_sequence_breakers, tokenizer)
        self._tokens: Int32 = np.empty(0, np.int32)  # with room at the end
        self._breaks: NDArray[np.bool_] = np.empty(0, np.bool_)
        self._num_seen = 0

    def penalties(self) -> tuple[Int32, Float32]:
        """Tokens, ascending, and what is taken off their logits."""
        self._take_new_tokens()
        params = self._sequence.params
        last_n = params.dry_penalty_last_n
        begin = 0 if last_n < 0 else max(0, self._num_seen - last_n)
        return dry_penalties(
            self._tokens[begin : self._num_seen],
            self._breaks[begin : self._num_seen],
            multiplier=params.dry_multiplier,
            base=params.dry_base,
            allowed_length=params.dry_allowed_length,
        )

    def _take_new_tokens(self) -> None:
        new = self._sequence.token_ids[self._num_seen :]
        end = self._num_seen + len(new)
        if end > len(self._tokens):
            self._tokens = np.resize(self._tokens, 2 * end)
            self._breaks = np.resize(self._breaks, 2 * end)
        self._tokens[self._num_seen : end] = new
        self._breaks[self._num_seen : end] = [self._breakers.push(token) for token in new]
        self._num_seen = end
