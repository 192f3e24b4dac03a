"""A plan: does a model fit a device, with how many sequences, how fast; and if not, what would."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from octavo.config import EngineConfig, Environment, RuntimeOptions
from octavo.errors import InvalidArgumentError
from octavo.models.kv_groups import with_kv_groups
from octavo.models.spec import ModelSpec, WeightFormat
from octavo.plan.devices import Device
from octavo.plan.memory import Memory, memory_of, part_of
from octavo.plan.speed import Speed, predict
from octavo.quantization.plan import resolved_formats
from octavo.runtime.loader import resolve_options
from octavo.weights.model_files import ModelFiles
from octavo.weights.pooling import for_runner
from octavo.weights.tensor import TensorDType

# Of a device's memory: the rest is left for fragments, and for what others take.
USABLE = 0.95
_MOST_REMEDIES = 5
_STORED: dict[str, TensorDType] = {"float32": "f32", "float16": "f16"}  # by config.json's names
# Options that are fields of the request, and those fields.
_OF_REQUEST = {"concurrency": "concurrency", "context": "context", "tensor_parallel_size": "ranks"}
_RANKS = (2, 4, 8)  # to which remedies go


@dataclass(frozen=True)
class Request:
    """What is asked. context: tokens of a sequence, prompt and answer.

    ranks: GPUs, or processes with a share of the cores each, that the model is divided among.
    """

    context: int
    concurrency: int
    ranks: int = 1

    def __post_init__(self) -> None:
        for name, field in _OF_REQUEST.items():
            if (value := getattr(self, field)) < 1:
                option = name.replace("_", "-")
                raise InvalidArgumentError(f"--{option} is {value}; expected 1 or more")


@dataclass(frozen=True)
class ModelToPlan:
    """A model as the plan sees it.

    stored: formats of matrices that its files hold quantized. embeds: it gives embeddings, and has
    no head.
    """

    spec: ModelSpec
    dtype: TensorDType
    stored: dict[str, WeightFormat]
    embeds: bool = False

    @classmethod
    def of(cls, files: ModelFiles, runner: str = "auto") -> ModelToPlan:
        """A model by its config.json; weights in a format that it does not name are bf16.

        runner: as of `find_pooling`.
        """
        files, pooling = for_runner(files, runner, has_weights=False)
        named = str(files.config.get("dtype") or files.config.get("torch_dtype"))
        stored = {name: matrix.format for name, matrix in files.quantized.items()}
        return cls(files.spec, _STORED.get(named, "bf16"), stored, pooling is not None)


@dataclass(frozen=True)
class Plan:
    """What a request needs and gets. largest: the most sequences of that length that fit.

    spec, options, memory and usable are those of each rank; of a CPU's memory a rank has a share.
    remedies: where it does not fit, changes each of which makes it fit, the smallest first.
    embeds: an embedding model; of its speed only the prompt's counts.
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
    embeds: bool = False

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
            "speed": {"prefill": self.speed.prefill} if self.embeds else asdict(self.speed),
            "remedies": list(self.remedies),
        }


@dataclass(frozen=True)
class _Asked:
    """A request, with all that its memory depends on."""

    model: ModelToPlan
    config: EngineConfig
    request: Request
    device: Device
    environment: Environment

    @property
    def usable(self) -> int:
        return int(self.device.of_rank(self.request.ranks).memory * USABLE)

    def resolve(self) -> tuple[ModelSpec, RuntimeOptions]:
        return resolve(
            *(self.model, self.config, self.request, self.environment), is_gpu=self.device.is_gpu
        )

    def memory(self) -> Memory:
        spec, options = self.resolve()
        device, request = self.device, self.request
        return memory_of(
            *(spec, options, request.concurrency, device.reserved),
            is_gpu=device.is_gpu,
            embeds=self.model.embeds,
        )

    def changed(self, **changes: Any) -> _Asked:
        """The same with other values: options of the command, without their dashes."""
        of_request = {
            _OF_REQUEST[name]: changes.pop(name) for name in _OF_REQUEST if name in changes
        }
        config, request = replace(self.config, **changes), replace(self.request, **of_request)
        return replace(self, config=config, request=request)

    def fits_with(self, **changes: Any) -> bool:
        """Whether it fits with other values, as `changed` takes them."""
        asked = self.changed(**changes)
        try:
            return asked.memory().total <= asked.usable
        except InvalidArgumentError:  # a model that cannot be divided so
            return False

    def most(self, name: str, end: int) -> int:
        """The largest value of an option below `end` that fits with the rest; 0: none does."""
        return bisect_left(range(1, end), True, key=lambda n: not self.fits_with(**{name: n}))


def make_plan(
    model: ModelToPlan,
    config: EngineConfig,
    request: Request,
    device: Device,
    environment: Environment,
) -> Plan:
    """Plan a request. Raises InvalidArgumentError for one that no memory would make possible."""
    asked = _Asked(model, config, request, device, environment)
    spec, options = asked.resolve()
    memory = asked.memory()
    one = memory.kv_cache // request.concurrency
    speed = predict(
        *(spec, options, device.of_rank(request.ranks), request.concurrency),
        depth=request.context - 1,
        prompt=prompt_tokens(request, embeds=model.embeds),
        embeds=model.embeds,
    )
    plan = Plan(request, spec, options, device, memory, asked.usable, 0, speed, (), model.embeds)
    largest = asked.most("concurrency", max(0, asked.usable - memory.weights) // one + 2)
    return replace(plan, largest=largest, remedies=() if plan.fits else _remedies(asked))


def prompt_tokens(request: Request, *, embeds: bool) -> int:
    """Tokens of the longest prompt: one is left for an answer, where there is one."""
    return request.context if embeds else max(1, request.context - 1)


def resolve(
    model: ModelToPlan,
    config: EngineConfig,
    request: Request,
    environment: Environment,
    *,
    is_gpu: bool,
) -> tuple[ModelSpec, RuntimeOptions]:
    """The model with its KV groups, or a rank's part, and the options with which it is loaded."""
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
    return part_of(spec, replace(options, formats=formats, overlap_steps=is_gpu), request.ranks)


def as_options(changes: Mapping[str, Any]) -> str:
    """A remedy as it is typed: {"kv_dtype": "int8"} -> "--kv-dtype int8"."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changes.items())


def _remedies(asked: _Asked) -> tuple[dict[str, Any], ...]:
    """Changes of as few options as possible after which the request fits."""
    candidates = list(_candidates(asked.config))
    more: list[dict[str, Any]] = []
    if asked.device.is_gpu:  # processes of one machine share its memory
        more = [{"tensor_parallel_size": n} for n in _RANKS if n > asked.request.ranks]
    found = [changes for changes in candidates if asked.fits_with(**changes)]
    found += [ranks for ranks in more if asked.fits_with(**ranks)][:1]
    found += _fewer(asked, {})
    if not found:
        found = [remedy for changes in candidates for remedy in _fewer(asked, changes)]
    if not found:
        ways = [{**changes, **ranks} for changes in candidates for ranks in more]
        found = [changes for changes in ways if asked.fits_with(**changes)]
    found.sort(key=len)
    return tuple(found[:_MOST_REMEDIES])


def _fewer(asked: _Asked, changes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The changes with as many sequences, or as long ones, as then fit."""
    for name in ("concurrency", "context"):
        most = asked.changed(**changes).most(name, getattr(asked.request, name))
        if most:
            yield {**changes, name: most}


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
