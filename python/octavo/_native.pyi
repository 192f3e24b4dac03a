"""The native core. The same names exist in every build, with CUDA or without."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
SamplingRows = NDArray[np.void]  # of octavo.reference.sampling.SAMPLING_ROW

def build_info() -> dict[str, Any]:
    """What was built, and what it found.

    compiler, isas (compiled), isa (what "auto" takes here), physical_cores; cuda: whether the
    build has CUDA's runtime; num_devices: CUDA devices of this machine; device_name: of the
    first; cuda_runtime, cuda_driver: versions of CUDA, of the build and of the driver; products:
    whose kernels multiply many rows ("cuBLASLt 13.0.2", or octavo's own); collectives: what adds
    up the results of several GPUs ("NCCL 2.28.3", or none); cuda_emulated: whether the build has
    the device "cuda_emulated", for tests.
    """

def available_devices() -> list[str]:
    """The devices that a Runtime can be made for on this machine, slowest first."""

def available_isas() -> list[str]:
    """The instruction sets that are compiled in and that this machine has, slowest first."""

def grouped_activations(isa: str = "auto") -> str:
    """How an instruction set of the CPU rounds what meets weights in groups.

    "bf16", or "whole": to whole numbers of 16 bits, with a scale a row. Both are defined by
    `rounded_product` in octavo.reference.quantization. isa: as in RuntimeOptions; a ValueError
    names those that this machine and build have.
    """

def convert_gguf_blocks(
    kind: str,
    blocks: NDArray[np.uint8],
    codes: NDArray[np.uint8],
    scales: NDArray[np.uint8],
    zeros: Float32 | None,
) -> None:
    """Blocks of a GGUF file, (blocks, bytes), as octavo.weights.gguf_blocks converts them.

    kind: Q4_0, Q8_0, Q4_K, Q5_K or Q6_K. The others are written: codes and scales as bytes, zero
    points, of Q4_K, float32. All have a row for each block. Raises ValueError for other shapes.
    """

def search_scales(
    x: Float32,
    candidates: Sequence[float],
    levels: Sequence[float],
    has_zeros: bool,
    shares: Float32 | None,
    isa: str = "auto",
) -> tuple[Float32, Float32 | None]:
    """Scales of groups of weights for int4, as octavo.quantization.grid.Grid.search finds them.

    x, shares: (members, groups). candidates: `Grid.candidates`. levels: 16, ascending, or none for
    -8 to 7. Returns bfloat16 scales and zero points, (groups,), or None. Raises ValueError where
    shapes do not fit.
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
    block_tables: int32 (num_kv_groups, num_seqs, max_blocks), -1 behind the last block; anything
        before the group's window of the first new token. Groups share no block.
    logit_rows: int32 (num_rows,), indices into token_ids whose logits are wanted, ascending.
    sampling: (num_rows,) of octavo.reference.sampling.SAMPLING_ROW, which says what its fields
        mean: how each logit row is sampled. state_row is in 0 .. max_num_seqs - 1, or -1; the
        position is set by the step, whatever it is here. Left out: greedy, without logprobs.
    adapter_ids: int32 (num_seqs,), the place of each sequence's adapter, -1 for none.
    rope_sets: int32 (num_seqs,), 1 for a sequence of more than the model's rope_switch tokens, now
        or by its end: it turns by long_frequencies. All steps of it must agree. Left out: 0.
    """

    def __init__(
        self,
        token_ids: Int32,
        row_starts: Int32,
        context_lens: Int32,
        block_tables: Int32,
        logit_rows: Int32,
        sampling: SamplingRows | None = None,
        adapter_ids: Int32 | None = None,
        rope_sets: Int32 | None = None,
    ) -> None: ...

class StepOutput:
    """What a step gave; arrays have one entry a logit row of the batch."""

    @property
    def token_ids(self) -> Int32: ...
    @property
    def logprobs(self) -> Float32:
        """Log-probability of each sampled token; NaN where num_logprobs was -1."""
    @property
    def ranks(self) -> Int32:
        """Of each sampled token among all, by logit, from 1; 0 where num_logprobs was -1."""
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
    def states(self) -> Float32:
        """(rows, hidden_size), behind the final norm: of the rows that `submit` named, or none."""
    @property
    def taps(self) -> dict[str, Float32]:
        """(num_tokens, width) a tap; for "final_norm" and "logits" (num_rows, width)."""

class RankGroup:
    """The ranks of one model: processes of this machine that exchange results in shared memory.

    `octavo.runtime.ranks` makes them. They make the same calls of `Runtime` in the same order.
    """

    def __init__(self, file: int, rank: int, size: int) -> None:
        """file: a descriptor of memory_bytes(size) bytes of zeros, the same memory in all ranks."""

    @staticmethod
    def memory_bytes(size: int) -> int: ...
    def abort(self, why: str) -> None:
        """From any thread of any rank: ranks that wait for others get a RuntimeError, `why`."""

class Runtime:
    """One model, or a rank's part of one, on one device: weights, KV cache, and the step.

    Every call may raise ValueError (the message names the argument), MemoryError, or RuntimeError,
    which a process forked after this was made gets always: it has no threads to compute with. Not
    thread-safe.
    """

    def __init__(
        self, device: str, spec: Any, options: Any, group: RankGroup | None = None
    ) -> None:
        """device: "cpu" or "cuda"; spec: octavo.models.spec.ModelSpec; options: RuntimeOptions.

        group: the ranks of the model, of which `spec` is a part (`octavo.models.shards`).
        """

    def load(
        self, name: str, array: NDArray[Any], dtype: str, first_row: int | None = None
    ) -> None:
        """Take one weight, in octavo's names. dtype "f32", "f16", or "bf16" (raw bits, uint16).

        A matrix that options.formats names as quantized comes as codes, "int8" (int8) or "int4"
        (uint8, two codes a byte, the first in the low half), with its "NAME.scale" and, where the
        format has zeros, "NAME.zero", float (outputs, groups). An int8 matrix without groups may
        also come as numbers, which are rounded to 127 steps of each row's largest magnitude.
        first_row: the array is a run of the weight's rows from this one on; runs come in order.
        The array is copied or packed before the call returns.
        """

    def load_adapter(self, slot: int, matrices: Mapping[str, tuple[Float32, Float32]]) -> None:
        """Put a LoRA adapter into place 0 .. max_adapters - 1, after the steps queued so far.

        matrices: by octavo's name ("layers.3.q"; "embed" and "lm_head" are the ends), A of shape
        (rank, inputs) and scale * B of shape (outputs, rank); see `octavo.models.adapter.LowRank`.
        What was there before is freed.
        """

    def unload_adapter(self, slot: int) -> None:
        """Empty a place, after the steps queued so far; harmless where it is empty."""

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

    def submit(
        self,
        batch: Batch,
        taps: Sequence[str] | None = None,
        sample: bool = False,
        states: str | None = None,
    ) -> int:
        """Queue the forward pass and return a ticket at once; at most two may be in flight.

        taps: names from octavo.models.layer.tap_names, or ["*"] for all. sample: samples at
        once, without masks and adjustments, and `sample` must not be called: on a GPU a recorded
        step is then one graph. states: "rows" or "tokens": the hidden states of each logit row or
        each token come with the output. They cost a copy, while a step with taps is not recorded
        and computes every op by itself.
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

    def logits(self, ticket: int, rows: Int32 | None = None) -> Float32:
        """(num_rows, vocab), or of some rows: waits for the forward pass. The ticket stays open."""

    def set_logits(self, ticket: int, row: int, values: Float32) -> None:
        """Put other logits, float32 (vocab,), in a row's place, before the step is sampled."""

    def wait(self, ticket: int) -> StepOutput:
        """Wait for the ticket and close it (its sampling is queued first if it was not)."""

    def step(self, batch: Batch, taps: Sequence[str] | None = None) -> StepOutput:
        """submit, sample and wait in one call."""
