"""The native core. The same names exist in every build, with CUDA or without."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

def build_info() -> dict[str, Any]:
    """What was built, and what it found.

    compiler, isas (compiled), isa (what "auto" takes here), physical_cores; cuda: whether the
    build has CUDA's runtime; num_devices: CUDA devices of this machine; device_name: of the
    first; cuda_runtime, cuda_driver: versions of CUDA, of the build and of the driver; products:
    whose kernels multiply many rows ("cuBLASLt 13.0.2", or octavo's own); cuda_emulated: whether
    the build has the device "cuda_emulated", for tests.
    """

def available_devices() -> list[str]:
    """The devices that a Runtime can be made for on this machine, slowest first."""

def available_isas() -> list[str]:
    """The instruction sets that are compiled in and that this machine has, slowest first."""

def int4_activations(isa: str = "auto") -> str:
    """How an instruction set of the CPU rounds what meets int4 weights.

    "bf16", or "whole": to whole numbers of 16 bits, with a scale a row. Both are defined by
    `rounded_product` in octavo.reference.quantization. isa: as in RuntimeOptions; a ValueError
    names those that this machine and build have.
    """

def physical_cores(proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> int:
    """Physical cores this process may use, at least 1: how many threads num_threads 0 means.

    Those it may run on (sched_getaffinity, which knows cpusets), or fewer where the quota of its
    control groups keeps fewer busy; a quarter of a core counts as one. The folders are parameters
    for tests.
    """

def cpu_quota(proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> float | None:
    """Cores' worth of time that the process's control groups give it, such as 1.5.

    The tightest of versions 1 and 2 and of every group above the process; None without a limit.
    """

def available_memory(proc: str = "/proc", cgroup: str = "/sys/fs/cgroup", reserved: int = 0) -> int:
    """As octavo.machine.available_memory, which calls it."""

def measure_bandwidth(
    num_threads: int = 0, seconds: float = 1.0, num_bytes: int = 0, device: str = "cpu"
) -> float:
    """Bytes a second that the device reads from its memory, the best of several passes.

    num_threads: of the CPU; 0 takes all cores. num_bytes: the buffer to read; 0 takes a quarter of
    the free memory, at most 1 GiB (CUDA: 4 GiB).
    """

def measure_flops(
    num_threads: int = 0, isa: str = "auto", seconds: float = 0.5, device: str = "cpu"
) -> float:
    """Operations a second, multiply-adds counted as two.

    The CPU's in float32, all threads together; a GPU's in bf16 with float32 sums (mma.sync).
    """

class Batch:
    """What one step computes: ragged, with no distinction of prefill and decode.

    Sequence s brings the tokens row_starts[s] .. row_starts[s+1] - 1 of `token_ids`; they are the
    last of its context_lens[s] tokens, and everything before them is in the KV cache already. Its
    keys and values lie in the blocks that block_tables[:, s] names, one table a KV group.

    token_ids: int32 (num_tokens,). A negative id -1 - r means: what state row r sampled last.
    row_starts: int32 (num_seqs + 1,), from 0 to num_tokens, strictly increasing.
    context_lens: int32 (num_seqs,), new tokens included.
    block_tables: int32 (num_kv_groups, num_seqs, max_blocks), -1 behind the last block.
    logit_rows: int32 (num_rows,), indices into token_ids whose logits are wanted, ascending.
    Sampling, one entry a logit row (all of length num_rows):
    temperature: float32; 0 is greedy. top_k: int32; 0 keeps all. top_p, min_p: float32.
    seed: uint64. sample_index: int32. num_logprobs: int32; -1 none, 0 only the token drawn.
    state_rows: int32 in 0 .. max_num_seqs - 1; where the drawn token is kept for a later
        negative token id; -1 keeps it nowhere.
    The position that enters the random numbers is the position of the token to be drawn.
    Left out, the sampling arrays mean greedy without logprobs.
    """

    def __init__(
        self,
        token_ids: Int32,
        row_starts: Int32,
        context_lens: Int32,
        block_tables: Int32,
        logit_rows: Int32,
        temperature: Float32 | None = None,
        top_k: Int32 | None = None,
        top_p: Float32 | None = None,
        min_p: Float32 | None = None,
        seed: NDArray[np.uint64] | None = None,
        sample_index: Int32 | None = None,
        num_logprobs: Int32 | None = None,
        state_rows: Int32 | None = None,
    ) -> None: ...

class StepOutput:
    """What a step gave; arrays have one entry a logit row of the batch."""

    @property
    def token_ids(self) -> Int32: ...
    @property
    def logprobs(self) -> Float32:
        """Log-probability of each drawn token; NaN where num_logprobs was -1."""
    @property
    def top_token_ids(self) -> Int32:
        """(num_rows, most asked for), most probable first; -1 where fewer were asked for."""
    @property
    def top_logprobs(self) -> Float32:
        """(num_rows, most asked for); NaN where fewer were asked for."""
    @property
    def finite(self) -> NDArray[np.bool_]:
        """False where a row's logits hold a NaN or an infinity: its token means nothing."""
    @property
    def taps(self) -> dict[str, Float32]:
        """(num_tokens, width) a tap; for "final_norm" and "logits" (num_rows, width)."""

class Runtime:
    """One model on one device: weights, KV cache, and the step.

    Every call may raise ValueError (the message names the argument), MemoryError, or RuntimeError,
    which a process forked after this was made gets always: it has no threads to compute with. Not
    thread-safe.
    """

    def __init__(self, device: str, spec: Any, options: Any) -> None:
        """device: "cpu" or "cuda"; spec: octavo.models.spec.ModelSpec; options: RuntimeOptions."""

    def load(self, name: str, array: NDArray[Any], dtype: str) -> None:
        """Take one weight, in octavo's names. dtype "f32", "f16", or "bf16" (raw bits, uint16).

        A matrix that options.formats names as quantized comes as codes, "int8" (int8) or "int4"
        (uint8, two codes a byte, the first in the low half), with its "NAME.scale" and, where the
        format has zeros, "NAME.zero", float (outputs, groups). An int8 matrix may also come as
        numbers, which are rounded to 127 steps of each row's largest magnitude.
        The array is copied or packed before the call returns.
        """

    def missing_weights(self) -> list[str]:
        """Names that `load` has not seen yet; the first step needs this to be empty."""

    def kv_bytes_per_block(self) -> int: ...
    def alloc_kv(self, num_blocks: int) -> None: ...
    def copy_blocks(self, kv_group: int, pairs: Int32) -> None:
        """Copy whole KV blocks; pairs: int32 (n, 2), source and destination."""

    def memory(self) -> dict[str, int]:
        """Bytes: weights, kv_cache, workspace, available (on the device, now)."""

    def allocations(self) -> int:
        """How many times a step had to grow a buffer so far.

        0 as long as no step wants more logit rows than max_num_seqs, or more than 20 top
        log-probabilities. Adjustments' buffers grow with the tokens they name.
        """

    def counts(self) -> dict[str, int]:
        """What a GPU was given to do so far, behind all steps queued; zeros on a CPU.

        kernels: launched, or recorded, one by one. recorded, replayed, forgotten: steps recorded
        as CUDA graphs, launched as such, dropped. uploads, downloads: copies.
        """

    def submit(self, batch: Batch, taps: Sequence[str] | None = None, draw: bool = False) -> int:
        """Queue the forward pass and return a ticket at once; at most two may be in flight.

        taps: names from octavo.models.layer.tap_names, or ["*"] for all. draw: the sampling follows
        at once, with neither masks nor adjustments, and `sample` must not be called: a GPU then
        has a recorded step in one piece.
        """

    def sample(
        self,
        ticket: int,
        masks: Int32 | None = None,
        adjustments: tuple[Int32, Int32, Float32, Float32] | None = None,
    ) -> None:
        """Queue the sampling of the ticket's rows.

        masks: int32 (num_rows, ceil(vocab / 32)); bit b of word w set allows token 32 w + b.
        adjustments: (row_starts, token_ids, repetition, bias) as in the reference's
        `adjust_logits`; log-probabilities are of the logits without them.
        """

    def logits(self, ticket: int) -> Float32:
        """(num_rows, vocab): waits for the forward pass. The ticket stays open."""

    def wait(self, ticket: int) -> StepOutput:
        """Wait for the ticket and close it (its sampling is queued first if it was not)."""

    def step(self, batch: Batch, taps: Sequence[str] | None = None) -> StepOutput:
        """submit, sample and wait in one call."""

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
    def rope_frequencies(self, rope: Any, head_dim: int) -> Float32: ...
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
    ) -> Float32: ...
    def gated_activation(self, gate: Float32 | None, up: Float32, activation: str) -> Float32: ...
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
        temperature: Float32,
        top_k: Int32,
        top_p: Float32,
        min_p: Float32,
        seed: NDArray[np.uint64],
        sample_index: Int32,
        positions: Int32,
        masks: Int32 | None = None,
        num_logprobs: Int32 | None = None,
    ) -> Any:
        """The tokens, int32 (rows,).

        With num_logprobs (-1: none) a tuple: tokens; their logprobs, float32; finite, uint8;
        the best tokens and their logprobs, (rows, largest num_logprobs); and what a state of as
        many rows kept, row r's token in the last row but r.
        """

    def log_softmax(self, logits: Float32) -> Float32: ...
    def gumbel(self, seed: int, sample_index: int, position: int, vocab_size: int) -> Float32: ...
