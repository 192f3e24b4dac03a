"""A plan: does a model fit a device, with how many sequences, how fast; and if not, what would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from octavo.config import EngineConfig, Environment, RuntimeOptions
from octavo.errors import InvalidArgumentError
from octavo.models.kv_groups import with_kv_groups
from octavo.models.spec import ModelSpec, WeightFormat
from octavo.plan.devices import Device
from octavo.plan.memory import Memory, memory_of
from octavo.plan.speed import Speed, predict
from octavo.quantization.plan import resolved_formats
from octavo.runtime.loader import resolve_options
from octavo.weights.tensor import TensorDType

# Of a device's memory: the rest is left for fragments, and for what others take.
USABLE = 0.95
_MOST_REMEDIES = 4
_RANKS: tuple[dict[str, Any], ...] = tuple({"tensor_parallel": n} for n in (2, 4, 8))


@dataclass(frozen=True)
class Request:
    """What is asked. context: tokens of a sequence, prompt and answer. ranks: tensor parallel."""

    context: int
    concurrency: int
    ranks: int = 1

    def __post_init__(self) -> None:
        for name, value in (("--context", self.context), ("--concurrency", self.concurrency)):
            if value < 1:
                raise InvalidArgumentError(f"{name} is {value}; expected 1 or more")
        if self.ranks not in (1, 2, 4, 8):
            raise InvalidArgumentError(
                f"--tensor-parallel is {self.ranks}; expected 1, 2, 4 or 8 devices"
            )


@dataclass(frozen=True)
class ModelToPlan:
    """A model as the plan sees it. stored: formats of matrices that its files hold quantized."""

    spec: ModelSpec
    dtype: TensorDType
    stored: dict[str, WeightFormat]


@dataclass(frozen=True)
class Plan:
    """What a request needs and gets. largest: the most sequences of that length that fit.

    remedies: where it does not fit, changes each of which makes it fit, the smallest first.
    """

    request: Request
    spec: ModelSpec
    options: RuntimeOptions
    device: Device
    memory: Memory
    usable: int
    largest: int
    speed: Speed
    remedies: tuple[dict[str, Any], ...]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.usable

    def to_json(self) -> dict[str, Any]:
        """As JSON values, in bytes, seconds and tokens a second."""
        options = self.options
        return {
            "device": asdict(self.device),
            "request": asdict(self.request),
            "dtype": options.dtype,
            "kv_dtype": options.kv_dtype,
            "formats": sorted({format.dtype for format in options.formats.values()}),
            "memory": {**asdict(self.memory), "total": self.memory.total, "usable": self.usable},
            "fits": self.fits,
            "largest_concurrency": self.largest,
            "speed": asdict(self.speed),
            "remedies": list(self.remedies),
        }


def make_plan(
    model: ModelToPlan,
    config: EngineConfig,
    request: Request,
    device: Device,
    environment: Environment,
) -> Plan:
    """Plan a request. Raises InvalidArgumentError for one that no memory would make possible."""
    spec, options = resolve(model, config, request, environment, is_gpu=device.is_gpu)
    _check_ranks(spec, request.ranks)
    memory = _memory(spec, options, request, device)
    usable = int(device.memory * USABLE)
    one = memory.kv_cache // request.concurrency
    largest = max(0, (usable - memory.total + memory.kv_cache) // one)
    speed = predict(
        spec,
        options,
        device,
        request.concurrency,
        request.context - 1,
        max(1, request.context - 1),
        request.ranks,
    )
    remedies: tuple[dict[str, Any], ...] = ()
    if memory.total > usable:
        remedies = _remedies(model, config, request, device, environment)
    return Plan(request, spec, options, device, memory, usable, int(largest), speed, remedies)


def resolve(
    model: ModelToPlan,
    config: EngineConfig,
    request: Request,
    environment: Environment,
    *,
    is_gpu: bool,
) -> tuple[ModelSpec, RuntimeOptions]:
    """The model with its KV groups, and the options with which it would be loaded."""
    spec = with_kv_groups(model.spec, request.context)
    config = replace(
        config,
        max_model_len=request.context,
        max_num_seqs=request.concurrency,
        max_num_batched_tokens=max(config.max_num_batched_tokens, request.concurrency),
    )
    kind = "cuda" if is_gpu else "cpu"
    options = resolve_options(spec, model.dtype, config, environment, kind)
    formats = resolved_formats(spec, model.stored, config.quantize, config.keep_embedding)
    return spec, replace(options, formats=formats, overlap_steps=is_gpu)


def _memory(spec: ModelSpec, options: RuntimeOptions, request: Request, device: Device) -> Memory:
    return memory_of(
        spec,
        options,
        request.concurrency,
        device.reserved,
        is_gpu=device.is_gpu,
        ranks=request.ranks,
    )


def _check_ranks(spec: ModelSpec, ranks: int) -> None:
    for layer in spec.layers:
        if layer.num_kv_heads % ranks:
            raise InvalidArgumentError(
                f"--tensor-parallel is {ranks}, which does not divide the model's "
                f"{layer.num_kv_heads} KV heads; expected a divisor of them"
            )


def _remedies(
    model: ModelToPlan,
    config: EngineConfig,
    request: Request,
    device: Device,
    environment: Environment,
) -> tuple[dict[str, Any], ...]:
    """Changes of as few options as possible after which the request fits."""
    usable = int(device.memory * USABLE)

    def fits(changes: dict[str, Any]) -> bool:
        asked = replace(request, ranks=changes.get("tensor_parallel", request.ranks))
        if any(layer.num_kv_heads % asked.ranks for layer in model.spec.layers):
            return False
        fields = {name: value for name, value in changes.items() if name != "tensor_parallel"}
        changed = replace(config, **fields)
        spec, options = resolve(model, changed, asked, environment, is_gpu=device.is_gpu)
        return _memory(spec, options, asked, device).total <= usable

    found = [changes for changes in _candidates(config) if fits(changes)]
    for name in ("concurrency", "context"):
        most = _most(name, model, config, request, device, environment)
        if most:
            found.append({name: most})
    if not found and device.is_gpu:  # octavo does not run on several GPUs yet: the last way out
        ways = ({**changes, **ranks} for changes in ({}, *_candidates(config)) for ranks in _RANKS)
        found = [changes for changes in ways if fits(changes)]
    found.sort(key=len)
    return tuple(found[:_MOST_REMEDIES])


def _candidates(config: EngineConfig) -> Iterator[dict[str, Any]]:
    """Changes of weights and cache."""
    weights: list[dict[str, Any]] = [{}]
    if config.quantize is None:
        weights += [{"quantize": "int8"}, {"quantize": "int4"}]
    elif config.quantize in ("int8", "w8a8"):
        weights += [{"quantize": "int4"}]
    caches: list[dict[str, Any]] = [{}]
    if config.kv_dtype != "int8":
        caches += [{"kv_dtype": "int8"}]
    yield from filter(None, ({**a, **b} for a, b in product(weights, caches)))


def _most(
    name: str,
    model: ModelToPlan,
    config: EngineConfig,
    request: Request,
    device: Device,
    environment: Environment,
) -> int:
    """The largest value of a field of the request that fits with the rest; 0: none does."""
    low, high = 0, getattr(request, name)
    usable = int(device.memory * USABLE)
    while low < high - 1:
        middle = (low + high) // 2
        asked = replace(request, **{name: middle})
        spec, options = resolve(model, config, asked, environment, is_gpu=device.is_gpu)
        if _memory(spec, options, asked, device).total <= usable:
            low = middle
        else:
            high = middle
    return low
