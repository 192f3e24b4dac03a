"""Measure the machine, then for each case its gate and its speed: what `octavo bench` does."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from octavo.bench.cases import (
    BYTES,
    Case,
    Peak,
    Work,
    embedding_cases,
    least_seconds,
    streamed_bytes,
    work_of,
)
from octavo.bench.peak import measure, measure_cuda
from octavo.config import EngineConfig, Environment, RuntimeOptions
from octavo.errors import InvalidArgumentError
from octavo.machine import processor, resident_memory, threads_of_rank
from octavo.models.adapter import Adapter
from octavo.models.shards import shard_spec
from octavo.models.spec import ModelSpec
from octavo.progress import StageProgress
from octavo.quantization.plan import describe_dtypes, expert_bytes
from octavo.runtime.loader import LoadedRuntime, load_runtime
from octavo.runtime.session import Float32, Session
from octavo.weights.adapter import read_adapter
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.hub import resolve_model
from octavo.weights.model_files import read_model
from octavo.weights.pooling import for_runner

GATE_STEPS = 4  # decoded tokens whose logits are compared
# Where matrix products may sum in another order in company: the largest difference of two logits,
# in parts of the logits' standard deviation. bf16 has 8 bits of precision: one step of rounding
# more or less at each of a model's layers stays well below it, a wrong token or key does not.
LOGIT_TOLERANCE = 0.1


@dataclass(frozen=True)
class Gate:
    """Whether a sequence's logits are the same alone and in company.

    The same bits, where the device promises them; else nearly the same numbers (LOGIT_TOLERANCE).
    logits_hash: of the sequence alone; the same on every machine that rounds alike.
    """

    passed: bool
    logits_hash: str


@dataclass(frozen=True)
class Row:
    """A case measured. Speeds in tokens a second; all but the gate empty where that failed.

    limit: which of the machine's limits the case meets first; percent_of_limit: how much of the
    speed at that limit was reached (None where the machine was not measured).
    """

    case: Case
    gate: Gate
    samples: tuple[float, ...] = ()
    bytes_per_second: float | None = None
    flops: float | None = None
    limit: str | None = None
    percent_of_limit: float | None = None

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.samples) if self.samples else None

    @property
    def deviation(self) -> float:
        """Standard deviation of the samples; 0 of a single one."""
        return statistics.stdev(self.samples) if len(self.samples) > 1 else 0.0

    def to_json(self) -> dict[str, Any]:
        """As JSON values; mean and deviation beside the samples."""
        more = {"name": self.case.name, "mean": self.mean, "deviation": self.deviation}
        return {**asdict(self), **more}


@dataclass(frozen=True)
class Loading:
    """What it took to load the model. kv_bytes: as much cache as the cases need.

    resident_bytes: what the process took before, and at most until it was loaded, files mapped into
    memory included; None where the system does not tell. Of several ranks' processes, the first.
    """

    seconds: float
    kv_bytes: int
    resident_bytes_before: int | None
    resident_bytes_at_most: int | None


@dataclass(frozen=True)
class BenchResult:
    """All that `octavo bench` tells: weight_bytes, num_threads and peak are those of all ranks."""

    model: str
    num_parameters: int
    weight_bytes: int
    weights: str  # what the matrices are kept in
    dtype: str
    kv_dtype: str
    load_format: str
    device: str
    isa: str
    num_threads: int
    processor: str
    native: dict[str, Any]
    date: str
    peak: Peak | None
    rows: tuple[Row, ...]
    loading: Loading | None = None
    tensor_parallel_size: int = 1
    adapters: tuple[str, ...] = ()  # their folders; sequences have them in turn
    embeds: bool = False  # an embedding model: gates compare states, not logits

    @property
    def passed(self) -> bool:
        """Whether every gate did."""
        return all(row.gate.passed for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "rows": [row.to_json() for row in self.rows]}


def bench(
    model: str | None,
    config: EngineConfig,
    cases: Sequence[Case],
    repetitions: int,
    environment: Environment,
    progress: StageProgress = lambda *_: None,
    measured: Callable[[Row], None] = lambda _: None,
    adapters: Sequence[Path] = (),
) -> BenchResult:
    """Measure every case `repetitions` times. config: sizes of batch and cache are set here.

    measured: called with each case's row as soon as it is there. adapters: folders of LoRA
    adapters, which the sequences have in turn; what they read and compute is not in the limits.

    Of an embedding model (config.runner) only the prompts are measured, up to their hidden states.

    Raises what loading raises, and InvalidArgumentError for cases that the model has no room for.
    """
    if repetitions < 1:
        raise InvalidArgumentError(f"repetitions is {repetitions}; expected 1 or more")
    from octavo import _native

    files, pooling = for_runner(
        read_model(resolve_model(model, environment)),
        config.runner,
        has_weights=config.load_format != "dummy",
    )
    embeds = pooling is not None
    cases = embedding_cases(cases) if embeds else cases
    before, started = resident_memory(), time.perf_counter()
    checkpoint = open_checkpoint(files, config.load_format, config.seed)
    loras = [read_adapter(folder, files, checkpoint) for folder in adapters]
    loaded = load_runtime(
        files,
        checkpoint,
        replace(fit_config(config, cases), max_adapters=len(loras)),
        partial(progress, f"loading {files.path.name}"),
        environment,
    )
    seconds, after = time.perf_counter() - started, resident_memory()
    residents = before.now if before else None, after.peak if after else None
    loading = Loading(seconds, loaded.runtime.memory()["kv_cache"], *residents)
    info = _native.build_info()
    options = loaded.options
    ranks = options.world_size
    threads = ranks * threads_of_rank(options.num_threads, ranks)
    peak = measure_peak(loaded, threads, progress)
    runner = Runner(loaded, files.spec, peak, loras, embeds=embeds)
    rows = []
    for number, case in enumerate(cases):
        progress(f"{case.name}, batch {case.batch}", number, len(cases))
        rows.append(runner.measure(case, repetitions))
        measured(rows[-1])
    return BenchResult(
        model=files.path.name,
        num_parameters=checkpoint.num_parameters,
        weight_bytes=runner.weight_bytes,
        weights=describe_dtypes(options.formats, options.dtype),
        dtype=options.dtype,
        kv_dtype=options.kv_dtype,
        load_format=config.load_format,
        device=loaded.device,
        isa=str(info["isa"]) if options.isa == "auto" else options.isa,
        num_threads=threads,
        processor=str(info["device_name"]) if loaded.device == "cuda" else processor(),
        native=info,
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        peak=peak,
        rows=tuple(rows),
        loading=loading,
        tensor_parallel_size=ranks,
        adapters=tuple(map(str, adapters)),
        embeds=embeds,
    )


def fit_config(config: EngineConfig, cases: Sequence[Case]) -> EngineConfig:
    """The configuration with room for every case and its gate, and no more."""
    rooms = [max(case.longest, case.depth + GATE_STEPS) for case in cases]
    batches = [max(case.batch, 2) for case in cases]  # a gate has two sequences at least
    blocks = [-(-room // config.block_size) for room in rooms]
    held = max(batch * each for batch, each in zip(batches, blocks, strict=True))
    return replace(
        config,
        max_model_len=max(rooms),
        max_num_seqs=max(batches),
        max_num_batched_tokens=max(config.max_num_batched_tokens, *batches),
        num_kv_blocks=max(held, *blocks),
    )


def measure_peak(loaded: LoadedRuntime, num_threads: int, progress: StageProgress) -> Peak | None:
    """The limits of the machine, or of the GPUs in use together; None for emulated ones."""
    if loaded.device not in ("cpu", "cuda"):
        return None
    progress("measuring the machine", 0, 1)
    if loaded.device == "cpu":
        return measure(loaded.options, num_threads)
    peak, gpus = measure_cuda(), loaded.options.world_size
    return replace(peak, bandwidth=gpus * peak.bandwidth, flops=gpus * peak.flops)


class Runner:
    """Runs cases on one loaded model."""

    def __init__(
        self,
        loaded: LoadedRuntime,
        spec: ModelSpec,
        peak: Peak | None,
        adapters: Sequence[Adapter] = (),
        *,
        embeds: bool = False,
    ) -> None:
        """embeds: an embedding model, whose steps end before the head."""
        self._embeds = embeds
        self._session = Session(loaded, adapters)
        self._runtime = loaded.runtime
        self._spec = spec
        self._options: RuntimeOptions = loaded.options
        self._peak = peak
        self.weight_bytes = loaded.runtime.memory()["weights"]
        embed = self._options.formats.get("embed")
        kind = self._options.dtype if embed is None else embed.dtype
        # All ranks have parts of the same size, and read and compute the same.
        self._ranks = self._options.world_size
        self._part = shard_spec(spec, 0, self._ranks)
        self._part_bytes = streamed_bytes(
            self._part, self.weight_bytes // self._ranks, BYTES[kind], embeds=embeds
        )
        self.step_bytes = self._ranks * self._part_bytes
        self._expert_bytes = expert_bytes(self._part, self._options.formats, self._options.dtype)

    def measure(self, case: Case, repetitions: int) -> Row:
        """Gate, one run to warm up, then the timed ones. No figure where the gate fails."""
        gate = self.gate(case)
        if not gate.passed:
            return Row(case, gate)
        seconds = self.time(case, repetitions)
        work = self.work(case)
        mean = statistics.fmean(seconds)
        samples = tuple(case.tokens / s for s in seconds)
        row = Row(case, gate, samples, work.num_bytes / mean, work.num_operations / mean)
        if self._peak is None:
            return row
        least, limit = least_seconds(work, self._peak)
        return replace(row, limit=limit, percent_of_limit=100 * least / mean)

    def work(self, case: Case) -> Work:
        """The least that one run of a case reads and computes, in all ranks together."""
        kv_dtype, chunk = self._options.kv_dtype, self._session.chunk
        work = work_of(case, self._part, self._part_bytes, kv_dtype, chunk, self._expert_bytes)
        return Work(self._ranks * work.num_bytes, self._ranks * work.num_operations)

    def tokens(self, sequence: int, count: int) -> list[int]:
        """Random tokens of a sequence: the same in every case, and a longer run begins alike."""
        bits = np.random.Philox(key=sequence).random_raw(count)
        return [int(value) % self._spec.vocab_size for value in bits]

    def gate(self, case: Case) -> Gate:
        """Logits alone against logits in company, bit for bit."""
        return self._gate_decode(case) if case.kind == "decode" else self._gate_prefill(case)

    def _gate_prefill(self, case: Case) -> Gate:
        """The prompt alone, and beside another sequence in chunks of another size."""
        prompt = self.tokens(0, case.num_tokens)
        self._session.restart(2)
        alone = self.prefill(prompt)
        chunk = max(1, min(self._session.chunk - 1, case.num_tokens // 3 + 1))
        num_steps = -(-case.num_tokens // chunk)
        self._session.restart(2)
        beside = self.prefill(prompt, chunk, self.tokens(1, num_steps))
        return Gate(self._same(alone, beside), hash_of(alone))

    def _gate_decode(self, case: Case) -> Gate:
        """The first and the last sequence, each alone, against themselves in the batch."""
        batch = max(case.batch, 2)
        prompts = [self.tokens(index, case.depth + 1) for index in range(batch)]
        together = self.decode_logits(prompts, GATE_STEPS)
        # Where bits may differ, so may later tokens: the first step's logits are compared.
        steps = GATE_STEPS if self._session.is_exact else 1
        passed = True
        for index in (batch - 1, 0):
            alone = self.decode_logits([prompts[index]], GATE_STEPS, first_adapter=index)
            passed &= self._same(alone[:steps], together[:steps, index : index + 1])
        return Gate(passed, hash_of(alone))  # of the first sequence

    def _same(self, left: Float32, right: Float32) -> bool:
        """Bit for bit where the device promises that, else within LOGIT_TOLERANCE."""
        if self._session.is_exact:
            return hash_of(left) == hash_of(right)
        return bool(np.abs(left - right).max() <= LOGIT_TOLERANCE * left.std())

    def prefill(
        self, prompt: Sequence[int], chunk: int | None = None, companion: Sequence[int] = ()
    ) -> Float32:
        """Feed sequence 0 a prompt in chunks; the logits of its last token, (vocab_size,).

        Of an embedding model the states of its last token, (hidden_size,).
        companion: tokens of sequence 1, one of which goes into each step while there are any.
        """
        chunk = self._session.chunk if chunk is None else chunk
        beside = list(companion)
        row: Float32
        for start in range(0, len(prompt), chunk):
            new = {0: prompt[start : start + chunk]}
            if beside:
                new[1] = [beside.pop()]
            if self._embeds:
                row = self._session.states(new)[len(new[0]) - 1]
            elif start + chunk < len(prompt):
                self._session.step(new, ())
            else:
                row = self._session.step(new).logits[0]
        return row

    def decode(self, first: Sequence[int], num_tokens: int) -> None:
        """Greedy tokens for all sequences, each beginning with its token of `first`.

        A step is queued before the one before it is read: its tokens stay on the device.
        """
        tickets: deque[int] = deque()
        new = {index: [token] for index, token in enumerate(first)}
        for _ in range(num_tokens):
            if len(tickets) == 2:
                self._runtime.wait(tickets.popleft())
            tickets.append(self._session.submit(new))
            new = {index: [-1 - index] for index in new}
        for ticket in tickets:
            self._runtime.wait(ticket)

    def decode_logits(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, first_adapter: int = 0
    ) -> Float32:
        """The logits of each prompt's last token and of greedy tokens behind it.

        Returns float32 (num_tokens, sequences, vocab_size).
        """
        self._session.restart(len(prompts), first_adapter=first_adapter)
        self._feed([prompt[:-1] for prompt in prompts])
        new = {index: [prompt[-1]] for index, prompt in enumerate(prompts)}
        found = []
        for _ in range(num_tokens):
            step = self._session.step(new)
            found.append(step.logits)
            new = {index: [token] for index, token in enumerate(step.token_ids.tolist())}
        return np.stack(found)

    def _feed(self, prompts: Sequence[Sequence[int]]) -> None:
        for index, prompt in enumerate(prompts):
            self._session.feed(prompt, index)

    def time(self, case: Case, repetitions: int, *, warm_up: bool = True) -> list[float]:
        """Seconds of each run; with `warm_up`, after one that does not count."""
        prompts = [self.tokens(index, case.longest) for index in range(case.batch)]
        self._session.restart(case.batch)
        self._feed([prompt[: case.depth] for prompt in prompts])
        first = [prompt[case.depth] for prompt in prompts]
        seconds = []
        for _ in range(repetitions + warm_up):
            self._session.rewind(case.depth)
            start = time.perf_counter()
            if case.kind == "decode":
                self.decode(first, case.num_tokens)
            else:
                self.prefill(prompts[0])
            seconds.append(time.perf_counter() - start)
        return seconds[int(warm_up) :]


def hash_of(logits: Float32) -> str:
    """The first 16 digits of the SHA-256 of the numbers as little-endian float32."""
    data = np.ascontiguousarray(logits, dtype="<f4")
    return hashlib.sha256(data.tobytes()).hexdigest()[:16]
