"""A model that gives logits at chosen positions of a text, a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from octavo.config import EngineConfig, Environment
from octavo.eval.windows import Window
from octavo.models.adapter import Adapter
from octavo.runtime.loader import LoadProgress, load_runtime
from octavo.runtime.session import Session
from octavo.weights.checkpoint import Checkpoint
from octavo.weights.model_files import ModelFiles

if TYPE_CHECKING:
    from octavo import _native

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

_MAX_LOGITS = 1 << 24  # numbers held at a time: 64 MiB a model


class Scorer:
    """One sequence on a native runtime."""

    def __init__(
        self,
        files: ModelFiles,
        checkpoint: Checkpoint,
        config: EngineConfig,
        window: int,
        progress: LoadProgress | None = None,
        environment: Environment | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        """Load the model with room for one window; raises what `load_runtime` raises.

        adapter: a LoRA adapter that the sequence has.
        """
        config = replace(
            config,
            max_model_len=window,
            max_num_seqs=1,
            max_adapters=0 if adapter is None else 1,
            # So many that all their logits fit.
            max_num_batched_tokens=min(window, max(16, _MAX_LOGITS // files.spec.vocab_size)),
            num_kv_blocks=-(-window // config.block_size),
        )
        self.loaded = load_runtime(files, checkpoint, config, progress, environment)
        self._session = Session(self.loaded, () if adapter is None else (adapter,))

    def load_weight(self, name: str, values: Float32) -> None:
        """Put other numbers in the place of a weight, which the model runs in floats."""
        runtime = cast("_native.Runtime", self.loaded.runtime)  # of one rank
        runtime.load(name, np.ascontiguousarray(values), "f32")

    def logits(self, tokens: Int32, window: Window) -> Iterator[tuple[int, Float32]]:
        """Run the window; yields (index of the first token predicted, logits of those rows).

        Row i of float32 (rows, vocab_size) is the model's opinion of token `index + i` of the
        text. Only scored tokens are among them; all of them, in order, over the chunks.
        """
        self._session.rewind(0)
        chunk = self._session.chunk
        for start in range(window.begin, window.end - 1, chunk):
            end = min(start + chunk, window.end - 1)  # the last token predicts nothing here
            first = max(start, window.first_scored - 1)
            step = self._session.step({0: tokens[start:end]}, range(first - start, end - start))
            if first < end:
                yield first + 1, step.logits
