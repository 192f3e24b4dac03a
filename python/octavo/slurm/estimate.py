"""How long a job's rows should take, from `octavo plan`'s speeds: to be compared with its limit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from octavo.config import EngineConfig, Environment
from octavo.errors import InvalidArgumentError
from octavo.plan.devices import Device
from octavo.plan.plan import ModelToPlan, Plan, Request, make_plan
from octavo.slurm.job import JobRequest, Row

# Assumed: bytes a second that a shared file system gives one node, seconds for Python and the
# driver to start, and for a build of octavo.
_READ, _START, _BUILD, _BUILD_CUDA = 0.5e9, 20.0, 180.0, 900.0
_BYTES_A_TOKEN = 4  # of English
_BENCH_PROMPT, _BENCH_DECODED, _BENCH_RUNS = 512, 128, 12  # five timed, and the gates
_ANSWER = 256  # tokens of the longest, by default
_EVAL_TOKENS, _EVAL_WINDOW = 45_000, 512  # the default text in windows that overlap by half
_DIFF_TOKENS, _NUMPY = 60, 10e9  # operations a second of the reference
_GPU_SECONDS = {"lease": 560.0, "lease-2": 560.0}
_GPU_ALL = 5400.0


@dataclass(frozen=True)
class Estimate:
    """Seconds, by row. plan: of the largest row; it says whether the memory does."""

    plan: Plan | None
    seconds: dict[str, float]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """What a batch's input asks for: lines, and tokens of all prompts together (a guess)."""

    prompts: int
    tokens: int


def sizes_of(path: Path) -> Sizes:
    """Of a file with one prompt a line. Raises OSError."""
    with path.open("rb") as file:
        lengths = [len(line) for line in file if line.strip()]
    return Sizes(len(lengths), sum(lengths) // _BYTES_A_TOKEN)


def estimate(
    request: JobRequest,
    rows: list[Row],
    model: ModelToPlan | None,
    num_bytes: int,
    device: Device,
    environment: Environment,
    *,
    builds: bool,
    sizes: Sizes | None = None,
) -> Estimate:
    """The seconds of each row. model: None for a job without one. num_bytes: of its files."""
    notes = ["each row starts Python and reads the weights at 0.5 GB/s (assumed)"]
    build = (_BUILD_CUDA if device.is_gpu else _BUILD) if builds else 0.0
    if builds:
        notes.append(f"octavo is built first, which takes {build / 60:.0f} minutes (assumed)")
    if model is None:
        known = [_GPU_SECONDS[word] for word in request.extra if word in _GPU_SECONDS]
        return Estimate(None, {"gpu": sum(known) if known else _GPU_ALL}, tuple(notes))
    start = _START + num_bytes / _READ
    plan_for = partial(_plan_row, request, model, device, environment)
    plans = {row.name: plan_for(row, sizes) for row in rows}
    max_tokens = _max_tokens(request, model.spec.max_position_embeddings)
    of_kind: dict[str, Callable[[Plan], float]] = {
        "bench": _bench_seconds,
        "batch": partial(_batch_seconds, sizes or Sizes(0, 0), max_tokens),
        "eval": lambda plan: 2 * _EVAL_TOKENS / plan.speed.prefill,
        "diff": lambda plan: 2.0 * num_bytes * _DIFF_TOKENS / _NUMPY,
        "serve": lambda plan: 0.0,
    }
    seconds = {name: start + of_kind[request.kind](plan) for name, plan in plans.items()}
    first = next(iter(seconds))
    seconds[first] += build
    largest = max(plans.values(), key=lambda plan: plan.memory.total)
    return Estimate(largest, seconds, tuple(notes))


def _plan_row(
    request: JobRequest,
    model: ModelToPlan,
    device: Device,
    environment: Environment,
    row: Row,
    sizes: Sizes | None,
) -> Plan:
    """The plan of one row: its format, its batch size, and as many tokens as it needs."""
    options, longest = _options(row.words), model.spec.max_position_embeddings
    names = {"--dtype": "dtype", "--kv-dtype": "kv_dtype", "--quantize": "quantize"}
    given: dict[str, Any] = {names[name]: options[name] for name in names if name in options}
    config = EngineConfig(**given)
    if request.kind == "batch":
        count = _whole(options, "--max-num-seqs") or config.max_num_seqs
        mean = sizes.tokens // max(1, sizes.prompts) if sizes else 0
        count = max(1, min(count, sizes.prompts if sizes else 1))
        asked = Request(mean + _max_tokens(request, longest), count)
    elif request.kind == "bench":
        asked = Request(_BENCH_PROMPT, _whole(options, "--batch", "-b") or 1)
    else:
        asked = Request(_EVAL_WINDOW, 1)
    ranks = request.tensor_parallel_size
    asked = replace(asked, context=min(asked.context, longest), ranks=ranks)
    return make_plan(model, config, asked, device, environment)


def _max_tokens(request: JobRequest, longest: int) -> int:
    """Of `octavo batch`: the longest answer of lines that name none. longest: of the model."""
    given = _whole(_options(request.extra), "--max-tokens", "-n")
    return _ANSWER if given is None else longest if given < 0 else given


def _options(words: Sequence[str]) -> dict[str, str]:
    """Options and their values: `--name value`, `--name=value`, `-n value` and `-nvalue`."""
    parts: list[str] = []
    for word in words:
        joined = re.fullmatch(r"(--[\w-]+)=(.*)|(-\w)(.+)", word)
        parts += [part for part in joined.groups() if part is not None] if joined else [word]
    return dict(pairwise(parts))


def _whole(options: Mapping[str, str], *names: str) -> int | None:
    """The number of the option with one of these names, the first of several; None without it.

    Raises InvalidArgumentError for another value.
    """
    for name in names:
        if name in options:
            first = options[name].partition(",")[0]
            if not re.fullmatch(r"-?[0-9]{1,9}", first):
                raise InvalidArgumentError(
                    f"{name} is {options[name]!r}; expected a whole number: render the job again"
                )
            return int(first)
    return None


def _bench_seconds(plan: Plan) -> float:
    once = _BENCH_PROMPT / plan.speed.prefill + _BENCH_DECODED * plan.speed.decode_step
    return _BENCH_RUNS * once


def _batch_seconds(sizes: Sizes, max_tokens: int, plan: Plan) -> float:
    """Every answer at its longest."""
    waves = math.ceil(sizes.prompts / plan.request.concurrency)
    return sizes.tokens / plan.speed.prefill + waves * max_tokens * plan.speed.decode_step
