"""A model that gives logits at chosen positions of a text, a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from octavo.config import EngineConfig, Environment
from octavo.eval.windows import Window
from octavo.runtime.loader import LoadedRuntime, LoadProgress, load_runtime
from octavo.weights.checkpoint import Checkpoint
from octavo.weights.model_files import ModelFiles

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

_MAX_LOGITS = 1 << 24  # numbers held at a time: 64 MiB a model


def chunk_tokens(vocab_size: int, window: int) -> int:
    """How many tokens go through the model in one step, so that all their logits fit."""
    return min(window, max(16, _MAX_LOGITS // vocab_size))


def eval_config(config: EngineConfig, window: int, vocab_size: int) -> EngineConfig:
    """The configuration with room for one window and nothing else."""
    return replace(
        config,
        max_model_len=window,
        max_num_seqs=1,
        max_num_batched_tokens=chunk_tokens(vocab_size, window),
        num_kv_blocks=-(-window // config.block_size),
    )


class Scorer:
    """One sequence on a native runtime."""

    def __init__(self, loaded: LoadedRuntime, num_kv_groups: int) -> None:
        self._runtime = loaded.runtime
        self.options = loaded.options
        self.device = loaded.device
        self._chunk = loaded.options.max_num_batched_tokens
        order = np.arange(loaded.num_kv_blocks, dtype=np.int32)
        self._blocks = np.broadcast_to(order, (num_kv_groups, 1, len(order)))

    @property
    def weight_bytes(self) -> int:
        """What the weights take on the device."""
        return self._runtime.memory()["weights"]

    @classmethod
    def load(
        cls,
        files: ModelFiles,
        checkpoint: Checkpoint,
        config: EngineConfig,
        window: int,
        progress: LoadProgress | None = None,
        environment: Environment | None = None,
    ) -> Scorer:
        """Load the model with room for one window; raises what `load_runtime` raises."""
        config = eval_config(config, window, files.spec.vocab_size)
        loaded = load_runtime(files, checkpoint, config, progress, environment)
        return cls(loaded, files.spec.num_kv_groups)

    def load_weight(self, name: str, values: Float32) -> None:
        """Put other numbers in the place of a weight, which the model runs in floats."""
        self._runtime.load(name, np.ascontiguousarray(values), "f32")

    def logits(self, tokens: Int32, window: Window) -> Iterator[tuple[int, Float32]]:
        """Run the window; yields (index of the first token predicted, logits of those rows).

        Row i of float32 (rows, vocab_size) is the model's opinion of token `index + i` of the
        text. Only scored tokens are among them; all of them, in order, over the chunks.
        """
        from octavo import _native

        for start in range(window.begin, window.end - 1, self._chunk):
            end = min(start + self._chunk, window.end - 1)  # the last token predicts nothing here
            first = max(start, window.first_scored - 1)
            length = end - window.begin
            held = -(-length // self.options.block_size)
            batch = _native.Batch(
                token_ids=np.ascontiguousarray(tokens[start:end]),
                row_starts=np.array([0, end - start], np.int32),
                context_lens=np.array([length], np.int32),
                block_tables=np.ascontiguousarray(self._blocks[:, :, :held]),
                logit_rows=np.arange(first - start, end - start, dtype=np.int32),
            )
            ticket = self._runtime.submit(batch)
            logits = self._runtime.logits(ticket) if first < end else None
            self._runtime.wait(ticket)
            if logits is not None:
                yield first + 1, logits
