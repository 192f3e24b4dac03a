"""octavo's native core: one sequence on a `_native.Runtime`, every row a logit row."""

from __future__ import annotations

import numpy as np

from octavo.config import EngineConfig
from octavo.diff.implementations import Int32, StepResult
from octavo.models.adapter import Adapter
from octavo.quantization.plan import describe_dtypes
from octavo.runtime.loader import LoadedRuntime, LoadProgress, load_runtime
from octavo.runtime.session import Session
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
    adapter: Adapter | None = None,
    progress: LoadProgress | None = None,
) -> NativeImplementation:
    """Load the model for one sequence of at most `max_tokens` tokens, fed `chunk_size` at a time.

    adapter: a LoRA adapter that the sequence has. Raises what
    `octavo.runtime.loader.load_runtime` raises.
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
    return NativeImplementation(load_runtime(files, checkpoint, config, progress), adapter)


class NativeImplementation:
    """A loaded runtime. Its blocks are used in a scrambled order, so that paging is at work too."""

    name = "octavo"
    is_definition = False

    def __init__(self, loaded: LoadedRuntime, adapter: Adapter | None = None) -> None:
        from octavo import _native

        self._session = Session(loaded, () if adapter is None else (adapter,))
        self.dtype: str = loaded.options.dtype
        scrambled = np.random.default_rng(0).permutation(loaded.num_kv_blocks)
        self._session.restart(blocks=scrambled.astype(np.int32))
        options = loaded.options
        isa = options.isa if options.isa != "auto" else str(_native.build_info()["isa"])
        arithmetic = f", {isa}" if loaded.device == "cpu" else ""
        # How the definition has to round what meets int4. Other devices' activations are rounded
        # already, to a type that whole numbers of 16 bits keep well enough.
        self.grouped_activations = (
            str(_native.grouped_activations(isa)) if loaded.device == "cpu" else "whole"
        )
        # On other devices matrix products may sum in another order for one row than for many.
        self.bit_exact = self._session.is_exact
        self.op_files = "native" if loaded.device == "cpu" else "cuda"
        # ... and activations are kept in the weights' format.
        self.rounds_output = loaded.device != "cpu" and self.dtype != "f32"
        self.description = (
            f"native core, {loaded.device}{arithmetic}, "
            f"{describe_dtypes(options.formats, options.dtype)} weights, "
            f"{options.kv_dtype} KV cache{'' if adapter is None else ', with an adapter'}"
        )

    def reset(self) -> None:
        self._session.rewind(0)

    def feed(self, token_ids: Int32, *, taps: bool = False, all_logits: bool = True) -> StepResult:
        rows = range(len(token_ids)) if all_logits else None
        step = self._session.step({0: token_ids}, rows, ["*"] if taps else ())
        return StepResult(step.logits, int(step.token_ids[-1]), step.taps)
