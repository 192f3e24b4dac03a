"""The core's ops one by one, for tests and benchmarks; the engine does without."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
SamplingRows = NDArray[np.void]  # of octavo.reference.sampling.SAMPLING_ROW

def default_sampling_row() -> bytes:
    """A row of SAMPLING_ROW as a batch without `sampling` has it."""

class OpBench:
    """How long single ops take on random numbers, in seconds a call.

    The median of `repeats` runs of `launches` calls, timed by the device itself; CUDA replays a run
    as one graph. What is read takes turns among so many copies that `cache_bytes` do not hold them.
    dtype: of activations.
    """

    def __init__(
        self,
        device: str,
        dtype: str,
        deterministic: bool = False,
        launches: int = 200,
        repeats: int = 5,
        cache_bytes: int = 256 << 20,
    ) -> None: ...
    def linear(
        self, rows: Sequence[int], outputs: int, inputs: int, format: Any = None
    ) -> list[float]:
        """One time for each number of rows.

        format: octavo.models.spec.WeightFormat; None takes dtype.
        """

    def attention(
        self,
        num_seqs: int,
        tokens_per_seq: int,
        context: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        kv_dtype: str,
        window: int = 0,
    ) -> float:
        """num_seqs sequences of `context` tokens, of which the last tokens_per_seq are new."""

    def add_norm(self, rows: int, width: int) -> float: ...
    def gated_activation(self, rows: int, width: int) -> float: ...
    def sample(
        self,
        rows: int,
        vocab_size: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> float: ...

class Ops:
    """Each compute op by itself, for tests; arguments and results as in octavo.reference.ops."""

    def __init__(
        self,
        device: str = "cpu",
        num_threads: int = 0,
        isa: str = "auto",
        dtype: str = "f32",
        deterministic: bool = False,
        row_gap: int = 0,
    ) -> None:
        """dtype, deterministic: as in RuntimeOptions; the CPU keeps activations in float32.

        row_gap: numbers behind every row of every matrix, NaNs that no op may read or write.
        """

    def last_kernels(self) -> str:
        """Names of the kernels launched last, first to last, on a GPU: at most 8."""

    def embed(
        self,
        table: Float32,
        token_ids: Int32,
        position_table: Float32 | None = None,
        positions: Int32 | None = None,
        dtype: str = "f32",
    ) -> Float32: ...
    def norm(
        self, x: Float32, weight: Float32, bias: Float32 | None, eps: float, kind: str = "rms"
    ) -> Float32: ...
    def add_norm(
        self,
        residual: Float32,
        x: Float32,
        weight: Float32,
        bias: Float32 | None,
        eps: float,
        kind: str = "rms",
    ) -> tuple[Float32, Float32]: ...
    def norm_heads(
        self, x: Float32, weight: Float32, bias: Float32 | None, eps: float, kind: str = "rms"
    ) -> Float32: ...
    def scale(self, x: Float32, factor: float, cap: float = 0.0) -> Float32: ...
    def linear(
        self, x: Float32, weight: Float32, bias: Float32 | None = None, dtype: str = "f32"
    ) -> Float32: ...
    def quantized_linear(
        self,
        x: Float32,
        codes: NDArray[Any],
        scales: Float32,
        format: Any,
        zeros: Float32 | None = None,
        bias: Float32 | None = None,
    ) -> Float32: ...
    def quantized_embed(
        self,
        token_ids: Int32,
        width: int,
        codes: NDArray[Any],
        scales: Float32,
        format: Any,
        zeros: Float32 | None = None,
    ) -> Float32: ...
    def rope_and_store(
        self,
        q: Float32,
        k: Float32,
        v: Float32,
        positions: Int32,
        slots: Int32,
        frequencies: Float32 | None,
        num_slots: int,
        block_size: int = 16,
        kv_dtype: str = "f32",
        attention_factor: float = 1.0,
    ) -> tuple[Float32, Float32, Float32]: ...
    def attention(
        self,
        q: Float32,
        k: Float32,
        v: Float32,
        row_starts: Int32,
        context_lens: Int32,
        block_tables: Int32,
        scale: float,
        window: int = 0,
        block_size: int = 16,
        kv_dtype: str = "f32",
        softcap: float = 0.0,
    ) -> Float32: ...
    def gated_activation(self, gate: Float32 | None, up: Float32, activation: str) -> Float32: ...
    def moe(
        self,
        x: Float32,
        router_logits: Float32,
        gate: Float32,
        up: Float32,
        down: Float32,
        experts_per_token: int,
        normalize: bool = True,
        activation: str = "silu",
        dtype: str = "f32",
    ) -> Float32: ...
    def take_rows(self, x: Float32, rows: Int32) -> Float32: ...
    def adjust_logits(
        self,
        logits: Float32,
        row_starts: Int32,
        token_ids: Int32,
        repetition: Float32,
        bias: Float32,
    ) -> Float32: ...
    def sample(
        self,
        logits: Float32,
        rows: SamplingRows,
        masks: Int32 | None = None,
    ) -> tuple[Int32, Float32, NDArray[np.uint8], Int32, Float32, Int32, Int32]:
        """Tokens, their logprobs, whether rows are finite; the best tokens and their logprobs.

        The latter two are (rows, largest num_logprobs). At last, what as many state rows keep, and
        the tokens' ranks; 0 where no log-probability is asked for.
        """

    def log_softmax(self, logits: Float32) -> Float32: ...
    def gumbel(self, seed: int, sample_index: int, position: int, vocab_size: int) -> Float32: ...
