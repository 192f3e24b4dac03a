"""Sequences on a loaded runtime, stepped by hand: no engine, no scheduler, greedy tokens only.

For commands that examine the native core itself: `octavo bench`, `eval`, `diff`, `quantize`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo.errors import InvalidArgumentError
from octavo.models.adapter import Adapter
from octavo.reference.sampling import sampling_rows
from octavo.runtime.loader import LoadedRuntime

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Tokens = Sequence[int] | Int32


class Step(NamedTuple):
    """The result of a step.

    token_ids: int32 (rows,), the most probable next token of each logit row. logits: float32 (rows,
    vocab_size). taps: name -> float32 (tokens of the step, width).
    """

    token_ids: Int32
    logits: Float32
    taps: Mapping[str, Float32]


class Session:
    """Sequences 0, 1, …; they share the blocks of the KV cache in equal parts.

    loaded: the runtime, of a model with one KV group; nothing else may step it meanwhile. Every
    sequence has the rope frequencies of one of max_model_len tokens.
    adapters: LoRA adapters that the sequences have in turn; none: they have none.
    chunk: the most tokens of a step. is_exact: whether a sequence's logits are promised to have
    the same bits in any batch.
    """

    def __init__(self, loaded: LoadedRuntime, adapters: Sequence[Adapter] = ()) -> None:
        for place, adapter in enumerate(adapters):
            loaded.runtime.load_adapter(place, adapter.native())
        self.loaded = loaded
        self._num_adapters = len(adapters)
        self.chunk = loaded.options.max_num_batched_tokens
        self.is_exact = loaded.device == "cpu" or loaded.options.deterministic
        self._block_size = loaded.options.block_size
        self.restart()

    def need_one_rope(self) -> None:
        """Raise an InvalidArgumentError where sequences may outgrow their rope's frequencies."""
        switch = self.loaded.options.rope_switch
        if switch:
            raise InvalidArgumentError(
                f"max_model_len is {self.loaded.options.max_model_len}, but with more than "
                f"{switch} tokens this model has other rope frequencies, to which this search "
                f"cannot change: expected at most {switch}"
            )

    def restart(
        self, num_sequences: int = 1, blocks: Int32 | None = None, first_adapter: int = 0
    ) -> None:
        """Start again with so many empty sequences.

        blocks: int32, the blocks to use, in this order; None: all, in ascending order.
        first_adapter: the number of sequence 0's, where there are adapters.
        """
        self._first_adapter = first_adapter
        blocks = np.arange(self.loaded.num_kv_blocks, dtype=np.int32) if blocks is None else blocks
        each = len(blocks) // num_sequences
        self._blocks = blocks[: num_sequences * each].reshape(num_sequences, each)
        self._lengths = np.zeros(num_sequences, np.int32)

    def rewind(self, length: int) -> None:
        """Shorten every sequence to its first `length` tokens."""
        self._lengths[:] = length

    def step(
        self, new: Mapping[int, Tokens], rows: Tokens | None = None, taps: Sequence[str] = ()
    ) -> Step:
        """Add tokens to sequences in one step, and wait for its result; arguments as `submit`."""
        ticket = self.submit(new, rows, taps)
        logits = self.loaded.runtime.logits(ticket)
        output = self.loaded.runtime.wait(ticket)
        return Step(output.token_ids, logits, output.taps)

    def states(self, new: Mapping[int, Tokens]) -> Float32:
        """Add tokens to sequences in one step, which ends before the head.

        Returns the hidden states behind the final norm, float32 (tokens of the step, hidden_size).
        """
        states: Float32 = self.loaded.runtime.wait(self.submit(new, (), states="tokens")).states
        return states

    def submit(
        self,
        new: Mapping[int, Tokens],
        rows: Tokens | None = None,
        taps: Sequence[str] = (),
        states: str | None = None,
    ) -> int:
        """Queue a step that adds tokens to sequences; returns the ticket for `runtime.wait`.

        new: sequence -> its new tokens; -1 - s stands for what sequence s sampled last. rows: the
        indices, ascending, of those tokens whose logits are wanted; None: each sequence's last;
        (): none, and the step ends before the head. taps: names, or "*" for all. states: as of
        `Runtime.submit`.
        Raises ValueError where a sequence outgrows its blocks, and the errors of the runtime.
        """
        sequences = list(new)
        starts = np.cumsum([0, *map(len, new.values())], dtype=np.int32)
        lengths = self._lengths[sequences] + np.diff(starts)
        held = -(-lengths // self._block_size)
        room = self._blocks.shape[1]
        if held.max() > room:
            raise ValueError(
                f"a sequence of {lengths.max()} tokens; expected at most "
                f"{room * self._block_size}, the room of each of {len(self._lengths)}"
            )
        self._lengths[sequences] = lengths
        tables = self._blocks[sequences, : held.max()]
        tables[np.arange(held.max()) >= held[:, None]] = -1
        batch = self.loaded.make_batch(
            token_ids=np.concatenate([np.asarray(tokens, np.int32) for tokens in new.values()]),
            row_starts=starts,
            context_lens=lengths,
            block_tables=tables[None],
            logit_rows=starts[1:] - 1 if rows is None else np.asarray(rows, np.int32),
            sampling=sampling_rows(len(new), state_row=sequences) if rows is None else None,
            adapter_ids=self._adapter_ids(sequences),
            rope_sets=np.ones(len(new), np.int32) if self.loaded.options.rope_switch else None,
        )
        return self.loaded.runtime.submit(batch, list(taps) or None, sample=True, states=states)

    def _adapter_ids(self, sequences: Sequence[int]) -> Int32 | None:
        if not self._num_adapters:
            return None
        return (np.array(sequences, np.int32) + self._first_adapter) % self._num_adapters

    def feed(self, tokens: Tokens, sequence: int = 0) -> None:
        """Add tokens to a sequence, in as many steps as needed; nothing is sampled."""
        for start in range(0, len(tokens), self.chunk):
            self.step({sequence: tokens[start : start + self.chunk]}, ())
