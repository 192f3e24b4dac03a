"""Options of the engine: frozen, validated, and Python's only reader of environment variables."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from octavo.errors import InvalidArgumentError
from octavo.files import expand_home
from octavo.models.kv_groups import KvGroups
from octavo.models.spec import ModelSpec, WeightFormat
from octavo.speculative_config import SpeculativeConfig, read_speculative_config

DType = Literal["auto", "f32", "bf16", "f16"]
KVDType = Literal["auto", "f32", "bf16", "f16", "int8"]
LoadFormat = Literal["auto", "dummy"]
Runner = Literal["auto", "generate", "pooling"]
DEVICES = ("auto", "cpu", "cuda", "cuda_emulated")  # the last in builds for tests alone
DTYPES = ("auto", "f32", "bf16", "f16")
KV_DTYPES = (*DTYPES, "int8")
# Other names of the same, as torch and vLLM write them.
_DTYPE_NAMES = {
    **dict.fromkeys(("float32", "float", "fp32"), "f32"),
    **dict.fromkeys(("float16", "half", "fp16"), "f16"),
    "bfloat16": "bf16",
}
LOAD_FORMATS = ("auto", "dummy")
RUNNERS = ("auto", "generate", "pooling")
QUANTIZE = ("int8", "w8a8", "int4", "int4-nonuniform")
ISAS = (
    "auto",
    "scalar",
    *("avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx"),
    *("neon", "neon_dotprod"),
    "amx_emulated",  # in builds for tests alone
)


@dataclass(frozen=True)
class Environment:
    """What octavo takes from environment variables; read once by `read_environment`."""

    # OCTAVO_HOME, else $XDG_CACHE_HOME/octavo, else ~/.cache/octavo: pulled models. None: this user
    # has no home directory (a container with --user 12345).
    home: Path | None
    num_threads: int  # OCTAVO_NUM_THREADS; 0: the physical cores this process may use
    isa: str  # OCTAVO_ISA: "auto", or the instruction set to force on the CPU
    # OCTAVO_API_KEY: what clients of `octavo serve` must present; None: nothing.
    api_key: str | None = field(default=None, repr=False)

    @property
    def models(self) -> Path:
        """Where pulled models lie, one directory each; InvalidArgumentError without a home."""
        return self._folder("models", "pulled models", "give the model's own directory")

    @property
    def logs(self) -> Path:
        """Where `--event-log auto` writes; InvalidArgumentError without a home."""
        return self._folder("logs", "event logs", "name a file")

    def _folder(self, name: str, what: str, otherwise: str) -> Path:
        if self.home is None:
            raise InvalidArgumentError(
                f"there is no folder for {what}: HOME is not set, and this user is not in the "
                f"password file; set OCTAVO_HOME to a folder, or {otherwise}"
            )
        return self.home / name


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Parse OCTAVO_* variables; an InvalidArgumentError names the variable and its value."""
    variables = os.environ if variables is None else variables
    if home := variables.get("OCTAVO_HOME"):
        home_path = expand_home(home)
    else:
        home_path = expand_home(variables.get("XDG_CACHE_HOME") or "~/.cache") / "octavo"
    threads = variables.get("OCTAVO_NUM_THREADS") or "0"
    if not threads.isdecimal() or int(threads) > 1024:
        raise InvalidArgumentError(
            f"OCTAVO_NUM_THREADS is {threads!r}; expected an integer from 0 (all cores) to 1024"
        )
    isa = variables.get("OCTAVO_ISA") or "auto"
    check_choice("OCTAVO_ISA", isa, ISAS)
    api_key = variables.get("OCTAVO_API_KEY") or None
    found = None if home_path.parts[:1] == ("~",) else home_path
    return Environment(home=found, num_threads=int(threads), isa=isa, api_key=api_key)


@dataclass(frozen=True)
class EngineConfig:
    """How to run a model.

    device: "auto" takes CUDA when a device is there, else the CPU.
    dtype: the format of the weights, "f32", "bf16" or, on CUDA, "f16". "auto" on the CPU keeps bf16
        as bf16 and holds every other format as f32 (which represents f16 exactly; bf16 would not);
        on CUDA it keeps bf16 and f16 and rounds f32 to bf16. On CUDA activations between the ops
        are kept in it too, but for the residual stream, which is float32.
    kv_dtype: the format of the KV cache; "auto" follows dtype. "int8" keeps each head of each
        token with a scale of its own, in a little over half the memory of bf16. Over "bf16"
        attention rounds its queries and weights too, whatever dtype is (docs/numbers.md).
    quantize: rounds the weights of a float model while it is loaded: "int8" (a scale an output),
        "w8a8" (the same, activations in 8 bits too: faster, less exact), "int4" (groups of 32,
        scales of least squared error) or "int4-nonuniform" (the same on levels that lie closer
        together near 0: half the loss); None takes them as they are stored.
    keep_embedding: in a quantized model, keeps embedding and head in `dtype`; they are rounded to
        int8 otherwise.
    load_format: "auto" reads the model's files; "dummy" makes seeded random weights from the
        configuration alone, for benchmarks.
    runner: what the model is for: "generate" for texts, "pooling" for embeddings; "auto" goes by
        its files (docs/embeddings.md).
    max_model_len: the longest prompt plus answer, in tokens; None takes the model's own limit.
    max_num_seqs: how many sequences a step carries at most.
    max_num_batched_tokens: how many tokens a step carries at most; a longer prompt is computed
        in chunks of this size.
    block_size: tokens in one block of the KV cache, a multiple of 16.
    num_kv_blocks: size of the KV cache, of all KV groups together; None sizes it by
        `kv_memory_fraction`.
    kv_memory_fraction: which part of the memory still free after loading the KV cache may take.
    num_threads: CPU threads of each rank; 0 takes OCTAVO_NUM_THREADS, else its share of the
        physical cores, or of a control group's quota.
    deterministic: CUDA: an answer's bits do not depend on what else is computed with it (on the CPU
        they never do), at some cost in speed.
    enforce_eager: CUDA: launches every kernel of a step by itself, instead of recording steps as
        CUDA graphs and replaying them.
    enable_prefix_caching: keep the keys and values of prompts that have been computed, and reuse
        them for a later prompt that begins alike.
    max_adapters: how many LoRA adapters may be in memory at a time, used or not.
    max_waiting_requests, max_waiting_tokens: how many requests, and prompt tokens of them, may
        wait for a place in a step; one more is refused with a QueueFullError. None: any number.
    event_log_capacity: how many scheduling decisions are kept to be asked about.
    overlap_steps: schedule and pack the next step while the device computes this one. None: on
        devices of their own; on the CPU Python would take time from the computation.
    priority_ageing_seconds: a request of priority p queues as if it had come p times so much later
        than it did, so that one level of priority is worth so many seconds of waiting.
    seed: of dummy weights, and of requests that name no seed of their own.
    tensor_parallel_size: among how many ranks, processes of this machine, the model is divided:
        each has a GPU, or a share of the cores, of its own.
    speculative_config: how drafts are made, so that a step can give an answer several tokens: a
        SpeculativeConfig, or its fields as a dict or JSON. None: no drafts. Answers stay the same.
    """

    device: str = "auto"
    dtype: DType = "auto"
    kv_dtype: KVDType = "auto"
    quantize: Literal["int8", "w8a8", "int4", "int4-nonuniform"] | None = None
    keep_embedding: bool = False
    load_format: LoadFormat = "auto"
    runner: Runner = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 16
    num_kv_blocks: int | None = None
    kv_memory_fraction: float = 0.5
    num_threads: int = 0
    isa: str = "auto"
    deterministic: bool = False
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    max_adapters: int = 8
    max_waiting_requests: int | None = None
    max_waiting_tokens: int | None = None
    priority_ageing_seconds: float = 30.0
    event_log_capacity: int = 65536
    overlap_steps: bool | None = None
    seed: int = 0
    tensor_parallel_size: int = 1
    speculative_config: SpeculativeConfig | Mapping[str, Any] | str | None = None

    def __post_init__(self) -> None:
        drafts = read_speculative_config(self.speculative_config)
        object.__setattr__(self, "speculative_config", drafts)
        check_choice("device", self.device, DEVICES)
        for name, choices in (("dtype", DTYPES), ("kv_dtype", KV_DTYPES)):
            object.__setattr__(self, name, dtype_name(getattr(self, name)))
            check_choice(name, getattr(self, name), choices)
        if self.quantize is not None:
            check_choice("quantize", self.quantize, QUANTIZE)
        check_choice("load_format", self.load_format, LOAD_FORMATS)
        check_choice("runner", self.runner, RUNNERS)
        check_choice("isa", self.isa, ISAS)
        _check_positive("max_num_seqs", self.max_num_seqs)
        _check_positive("max_num_batched_tokens", self.max_num_batched_tokens)
        _check_positive("block_size", self.block_size)
        _check_positive("event_log_capacity", self.event_log_capacity)
        _check_positive("tensor_parallel_size", self.tensor_parallel_size)
        if not 0 <= self.max_adapters <= 1024:
            raise InvalidArgumentError(f"max_adapters is {self.max_adapters}; expected 0 to 1024")
        if self.max_model_len is not None:
            _check_positive("max_model_len", self.max_model_len)
        for name in ("num_kv_blocks", "max_waiting_requests", "max_waiting_tokens"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if not 0.0 <= self.priority_ageing_seconds < math.inf:
            raise InvalidArgumentError(
                f"priority_ageing_seconds is {self.priority_ageing_seconds!r}; expected a number "
                f"of seconds, 0 or more (0 makes all priorities equal)"
            )
        if self.block_size % 16:
            raise InvalidArgumentError(
                f"block_size is {self.block_size}; expected a multiple of 16 (the kernels' tile)"
            )
        if not 0.0 < self.kv_memory_fraction <= 1.0:
            raise InvalidArgumentError(
                f"kv_memory_fraction is {self.kv_memory_fraction!r}; expected above 0, at most 1"
            )
        if not 0 <= self.num_threads <= 1024:
            raise InvalidArgumentError(
                f"num_threads is {self.num_threads}; expected 0 (all cores) to 1024"
            )


@dataclass(frozen=True)
class RuntimeOptions:
    """An `EngineConfig` with every "auto" resolved: for the native `Runtime` and the scheduler."""

    dtype: Literal["f32", "bf16", "f16"]
    kv_dtype: Literal["f32", "bf16", "f16", "int8"]
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_threads: int = 0
    isa: str = "auto"
    deterministic: bool = False
    graphs: bool = True
    # Which of the machine's devices of that name.
    device_index: int = 0
    # Places for LoRA adapters.
    max_adapters: int = 0
    # Which of how many ranks this is (runtime/ranks.py).
    rank: int = 0
    world_size: int = 1
    # Sequences of more tokens have the rope's other frequencies (`ModelSpec.rope_switch`); 0: none.
    rope_switch: int = 0
    # Of matrices kept in another format than dtype, by name without ".weight": "layers.3.q".
    formats: Mapping[str, WeightFormat] = field(default_factory=dict)
    # For the scheduler alone.
    enable_prefix_caching: bool = True
    max_waiting_requests: int | None = None
    max_waiting_tokens: int | None = None
    priority_ageing_seconds: float = 30.0
    event_log_capacity: int = 65536
    overlap_steps: bool = False
    # Branches of drafts that a step may have beside max_num_seqs sequences.
    num_spare_seqs: int = 0

    @property
    def num_in_flight_tokens(self) -> int:
        """The most tokens of one sequence that steps in flight compute."""
        return (2 if self.overlap_steps else 1) * self.max_num_batched_tokens

    def kv_groups(self, spec: ModelSpec) -> KvGroups:
        """How many blocks of the KV cache a sequence of this model takes."""
        return KvGroups(self.block_size, spec.kv_windows, self.num_in_flight_tokens)


def resolve_device(device: str, available: Sequence[str]) -> str:
    """The device to run on: "auto" takes the last of those available, which is the fastest."""
    return available[-1] if device == "auto" else device


def dtype_name(given: object) -> str:
    """octavo's name of a format: bf16 for "bfloat16" and for torch.bfloat16; numpy.float32, too."""
    name = given.__name__ if isinstance(given, type) else str(given).removeprefix("torch.")
    return _DTYPE_NAMES.get(name, name)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """InvalidArgumentError for a value that is none of the choices."""
    if value not in choices:
        usual = [choice for choice in choices if "emulated" not in choice]  # those are for tests
        raise InvalidArgumentError(f"{name} is {value!r}; expected one of {', '.join(usual)}")


def _check_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidArgumentError(f"{name} is {value!r}; expected an integer, 1 or more")
