"""octavo's native core: one sequence on a `_native.Runtime`, every row a logit row."""

from __future__ import annotations

import numpy as np

from octavo.config import EngineConfig
from octavo.diff.implementations import Int32, StepResult
from octavo.quantization.plan import describe_dtypes
from octavo.runtime.loader import LoadedRuntime, LoadProgress, load_runtime
from octavo.weights.checkpoint import Checkpoint
from octavo.weights.model_files import ModelFiles

BLOCK_SIZE = 16


def load_native(
    files: ModelFiles,
    checkpoint: Checkpoint,
    *,
    device: str,
    dtype: str,
    max_tokens: int,
    chunk_size: int,
    num_threads: int = 0,
    progress: LoadProgress | None = None,
) -> NativeImplementation:
    """Load the model for one sequence of at most `max_tokens` tokens, fed `chunk_size` at a time.

    Raises what `octavo.runtime.loader.load_runtime` raises.
    """
    config = EngineConfig(
        device=device,
        dtype=dtype,  # type: ignore[arg-type]  # EngineConfig checks it
        max_model_len=max_tokens,
        max_num_seqs=1,
        max_num_batched_tokens=chunk_size,
        block_size=BLOCK_SIZE,
        num_kv_blocks=-(-max_tokens // BLOCK_SIZE),
        num_threads=num_threads,
    )
    return NativeImplementation(
        load_runtime(files, checkpoint, config, progress), files.spec.num_kv_groups
    )


class NativeImplementation:
    """A loaded runtime. Its blocks are used in a scrambled order, so that paging is at work too."""

    name = "octavo"
    is_definition = False

    def __init__(self, loaded: LoadedRuntime, num_kv_groups: int) -> None:
        from octavo import _native

        self._native = _native
        self._runtime = loaded.runtime
        self.dtype: str = loaded.options.dtype
        order = np.random.default_rng(0).permutation(loaded.num_kv_blocks).astype(np.int32)
        self._blocks = np.broadcast_to(order, (num_kv_groups, 1, len(order)))
        self._length = 0
        options = loaded.options
        isa = options.isa if options.isa != "auto" else str(_native.build_info()["isa"])
        arithmetic = f", {isa}" if loaded.device == "cpu" else ""
        # How the definition has to round what meets int4. Other devices' activations are rounded
        # already, to a type that whole numbers of 16 bits keep well enough.
        self.int4_activations = (
            str(_native.int4_activations(isa)) if loaded.device == "cpu" else "whole"
        )
        # On other devices matrix products may sum in another order for one row than for many.
        self.bit_exact = loaded.device == "cpu" or options.deterministic
        self.op_files = "native" if loaded.device == "cpu" else "cuda"
        # ... and activations are kept in the weights' format.
        self.rounds_output = loaded.device != "cpu" and self.dtype != "f32"
        self.description = (
            f"native core, {loaded.device}{arithmetic}, "
            f"{describe_dtypes(options.formats, options.dtype)} weights, "
            f"{options.kv_dtype} KV cache"
        )

    def reset(self) -> None:
        self._length = 0

    def feed(self, token_ids: Int32, *, taps: bool = False, all_logits: bool = True) -> StepResult:
        count = len(token_ids)
        self._length += count
        held = -(-self._length // BLOCK_SIZE)
        batch = self._native.Batch(
            token_ids=np.ascontiguousarray(token_ids, dtype=np.int32),
            row_starts=np.array([0, count], dtype=np.int32),
            context_lens=np.array([self._length], dtype=np.int32),
            block_tables=np.ascontiguousarray(self._blocks[:, :, :held]),
            logit_rows=np.arange(0 if all_logits else count - 1, count, dtype=np.int32),
        )
        ticket = self._runtime.submit(batch, taps=["*"] if taps else None)
        logits = self._runtime.logits(ticket)
        output = self._runtime.wait(ticket)
        return StepResult(logits, int(output.token_ids[-1]), output.taps if taps else {})
