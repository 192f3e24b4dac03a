"""Sequences on a native runtime, stepped by hand: what is timed is the core alone."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from octavo.engine.loader import LoadedRuntime
from octavo.reference.sampling import sampling_rows

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


class Session:
    """Sequences 0, 1, … that share the KV cache in equal parts; `restart` forgets them."""

    def __init__(self, loaded: LoadedRuntime, num_kv_groups: int) -> None:
        self._runtime = loaded.runtime
        self._num_blocks = loaded.num_kv_blocks
        self._num_kv_groups = num_kv_groups
        self._block_size = loaded.options.block_size
        # Whether a sequence's logits are promised to have the same bits in any company.
        self.is_exact = loaded.device == "cpu" or loaded.options.deterministic
        self.chunk = loaded.options.max_num_batched_tokens
        self._blocks: Int32 = np.empty((0, 0), np.int32)
        self._lengths: list[int] = []

    def restart(self, num_sequences: int, longest: int) -> None:
        """Begin anew with so many empty sequences of at most `longest` tokens."""
        each = -(-longest // self._block_size)
        if num_sequences * each > self._num_blocks:
            raise ValueError(
                f"{num_sequences} sequences of {longest} tokens need {num_sequences * each} "
                f"blocks of KV cache; there are {self._num_blocks}"
            )
        blocks = np.arange(num_sequences * each, dtype=np.int32)
        self._blocks = blocks.reshape(num_sequences, each)
        self._lengths = [0] * num_sequences

    def rewind(self, length: int) -> None:
        """Every sequence has only its first `length` tokens again."""
        self._lengths = [length] * len(self._lengths)

    def step(
        self, new: Mapping[int, Sequence[int]], *, want_logits: bool = False, sample: bool = True
    ) -> tuple[Int32, Float32 | None]:
        """Add tokens to sequences, in one step; new: sequence -> its new tokens.

        Returns the greedy next tokens (of the sequences in order; empty without `sample`, when the
        step ends before the head), and the logits they come from if asked for.
        """
        ticket = self._submit(new, sample)
        logits = self._runtime.logits(ticket) if want_logits else None
        return self._runtime.wait(ticket).token_ids, logits

    def _submit(self, new: Mapping[int, Sequence[int]], sample: bool = True) -> int:
        """Queue the step; what a sequence draws is kept in the state row of its number."""
        from octavo import _native

        rows = np.cumsum([0, *(len(tokens) for tokens in new.values())], dtype=np.int32)
        for index, tokens in new.items():
            self._lengths[index] += len(tokens)
        lengths = [self._lengths[index] for index in new]
        held = -(-max(lengths) // self._block_size)
        tables = np.ascontiguousarray(self._blocks[list(new), :held])
        for row, length in enumerate(lengths):
            tables[row, -(-length // self._block_size) :] = -1
        batch = _native.Batch(
            token_ids=np.array([t for tokens in new.values() for t in tokens], np.int32),
            row_starts=rows,
            context_lens=np.array(lengths, np.int32),
            block_tables=np.ascontiguousarray(
                np.broadcast_to(tables, (self._num_kv_groups, *tables.shape))
            ),
            logit_rows=rows[1:] - 1 if sample else np.empty(0, np.int32),
            sampling=sampling_rows(len(new), state_row=list(new)) if sample else None,
        )
        return self._runtime.submit(batch, draw=True)

    def prefill(
        self, prompt: Sequence[int], chunk: int | None = None, companion: Sequence[int] = ()
    ) -> Float32:
        """Feed sequence 0 a prompt in chunks; the logits of its last token, (vocab_size,).

        companion: tokens of sequence 1, one of which goes into each step while there are any.
        """
        chunk = self.chunk if chunk is None else chunk
        beside = list(companion)
        for start in range(0, len(prompt), chunk):
            new: dict[int, Sequence[int]] = {0: prompt[start : start + chunk]}
            if beside:
                new[1] = [beside.pop()]
            last = start + chunk >= len(prompt)
            _, logits = self.step(new, want_logits=last, sample=last)
        if logits is None:
            raise ValueError("the prompt is empty; expected a token or more")
        row: Float32 = logits[0]
        return row

    def fill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Feed every sequence its prompt, as many as fit a step at a time."""
        for index, prompt in enumerate(prompts):
            for start in range(0, len(prompt), self.chunk):
                self.step({index: prompt[start : start + self.chunk]}, sample=False)

    def decode(self, first: Sequence[int], num_tokens: int) -> None:
        """Greedy tokens for all sequences, each beginning with its token of `first`.

        A step is queued before the one before it is read: its tokens stay on the device.
        """
        tickets: deque[int] = deque()
        for step in range(num_tokens):
            tokens = first if step == 0 else [-1 - index for index in range(len(first))]
            if len(tickets) == 2:
                self._runtime.wait(tickets.popleft())
            tickets.append(self._submit({index: [token] for index, token in enumerate(tokens)}))
        for ticket in tickets:
            self._runtime.wait(ticket)

    def decode_logits(self, first: Sequence[int], num_tokens: int) -> Float32:
        """As `decode`; returns all logits, (num_tokens, sequences, vocab_size)."""
        tokens, found = list(first), []
        for _ in range(num_tokens):
            new = {index: [token] for index, token in enumerate(tokens)}
            drawn, logits = self.step(new, want_logits=True)
            if logits is not None:
                found.append(logits)
            tokens = drawn.tolist()
        return np.stack(found)


def hash_of(logits: Float32) -> str:
    """The first 16 digits of the SHA-256 of the numbers as little-endian float32."""
    data = np.ascontiguousarray(logits, dtype="<f4")
    return hashlib.sha256(data.tobytes()).hexdigest()[:16]
