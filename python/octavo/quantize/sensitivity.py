"""Which matrices a model can least afford in 4 bits: measured, one part of a layer at a time.

A part is what kernels take together: q, k and v; o; gate and up; down. (vLLM fuses them too, and
loads them only where they have one format.) The model runs in float32; one part is replaced by what
its codes stand for, a piece of text is scored, and the part is put back.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.config import EngineConfig, Environment
from octavo.errors import InvalidArgumentError
from octavo.eval.measures import compare
from octavo.eval.scorer import Int32, Scorer
from octavo.eval.windows import Window, make_windows
from octavo.models.layer import linear_nodes
from octavo.models.spec import ModelSpec, WeightFormat
from octavo.progress import StageProgress, stdout_console
from octavo.quantization.plan import GROUP_SIZES, Scheme, plan_formats, stored_bits
from octavo.quantization.rounding import quantize_matrix
from octavo.tables import Figures
from octavo.weights.checkpoint import Checkpoint
from octavo.weights.model_files import ModelFiles

Float32 = npt.NDArray[np.float32]

_WINDOW = 512


@dataclass(frozen=True)
class PartCost:
    """What it costs to quantize one part of one layer.

    name: "layers.3.gate_up". weights: how many. bits: a weight, stored; int8_bits: in int8 instead.
    kl: mean KL divergence, in nats, of the model with this part quantized from the float model.
    """

    name: str
    matrices: tuple[str, ...]
    weights: int
    bits: float
    int8_bits: float
    kl: float

    @property
    def more_bits(self) -> float:
        """Bits that int8 takes more."""
        return self.weights * (self.int8_bits - self.bits)

    @property
    def kl_per_megabit(self) -> float:
        """What int8 would save of the divergence for each million bits that it takes more."""
        return 1e6 * self.kl / self.more_bits if self.more_bits > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "kl_per_megabit": self.kl_per_megabit}


@dataclass(frozen=True)
class Sensitivity:
    """All parts, those first that gain the most from each bit. bits: a weight, of all together."""

    parts: tuple[PartCost, ...]
    bits: float
    num_scored: int

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        parts = [part.to_json() for part in self.parts]
        return {"bits_per_weight": self.bits, "num_scored": self.num_scored, "parts": parts}


def measure_sensitivity(
    files: ModelFiles,
    checkpoint: Checkpoint,
    scheme: Scheme,
    tokens: Int32,
    environment: Environment,
    importance: Mapping[str, Float32] | None = None,
    max_windows: int = 2,
    progress: StageProgress = lambda *_: None,
) -> Sensitivity:
    """Score the model with each part quantized by `scheme` and all others left as they are.

    tokens: int32, the text; windows of 512 tokens are taken from its beginning. importance: as
    `octavo.quantize.importance` measures it. Raises what loading the model raises, and
    InvalidArgumentError where the text is too short. Memory: the model in float32, and the logits
    of the windows.
    """
    window = min(_WINDOW, files.spec.max_position_embeddings)
    scorer = Scorer(
        files,
        checkpoint,
        EngineConfig(dtype="f32", kv_dtype="f32"),
        window,
        partial(progress, "loading"),
        environment,
    )
    meter = _Meter(scorer, tokens, make_windows(len(tokens), window, window, max_windows))
    formats, _ = plan_formats(files.spec, scheme)
    shapes = {name: node.matrix.shape for name, node in linear_nodes(files.spec).items()}
    costs = []
    parts = layer_parts(files.spec)
    for number, (name, matrices) in enumerate(parts.items()):
        progress("measuring sensitivity", number, len(parts))
        for matrix in matrices:
            weight = checkpoint[matrix + ".weight"].to_float32()
            share = None if importance is None else importance.get(matrix)
            rounded = quantize_matrix(weight, formats[matrix], scheme.method, importance=share)
            scorer.load_weight(matrix + ".weight", rounded.decode(formats[matrix]))
        weights = sum(math.prod(shapes[matrix]) for matrix in matrices)
        bits = sum(stored_bits(formats[matrix], shapes[matrix]) for matrix in matrices)
        eight = sum(stored_bits(WeightFormat("int8"), shapes[matrix]) for matrix in matrices)
        kl = meter.divergence()
        costs.append(PartCost(name, matrices, weights, bits / weights, eight / weights, kl))
        for matrix in matrices:
            scorer.load_weight(matrix + ".weight", checkpoint[matrix + ".weight"].to_float32())
    progress("measuring sensitivity", len(parts), len(parts))
    ordered = sorted(costs, key=lambda part: -part.kl_per_megabit)
    return Sensitivity(tuple(ordered), scheme_bits(files.spec, scheme), meter.num_scored)


class _Meter:
    """How far a model has come from what it was when the meter was made."""

    def __init__(self, scorer: Scorer, tokens: Int32, windows: Sequence[Window]) -> None:
        self._scorer, self._tokens, self._windows = scorer, tokens, windows
        self._expected = list(self._logits())
        self.num_scored = sum(len(logits) for _, logits in self._expected)

    def _logits(self) -> Iterator[tuple[int, Float32]]:
        for window in self._windows:
            yield from self._scorer.logits(self._tokens, window)

    def divergence(self) -> float:
        """Mean KL of the model as it is now from the model as it was, in nats."""
        apart = [
            compare(logits, before, self._tokens[first : first + len(logits)]).kl
            for (first, logits), (_, before) in zip(self._logits(), self._expected, strict=True)
        ]
        return float(np.concatenate(apart).mean())


def layer_parts(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """ "layers.0.qkv" -> the names of its matrices, in the order of execution.

    Matrices with the same input are a part, named after them: "qkv", "gate_up". Experts of a layer
    are two parts, "layers.0.experts.gate_up" and "layers.0.experts.down".
    """
    parts = {}
    for _, group in groupby(linear_nodes(spec).items(), key=lambda item: item[1].inputs):
        names = tuple(name for name, _ in group)
        layer = names[0].rpartition(".")[0].removesuffix(".0" if ".experts." in names[0] else "")
        kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
        parts[f"{layer}.{('' if max(map(len, kinds)) == 1 else '_').join(kinds)}"] = names
    return parts


def scheme_bits(spec: ModelSpec, scheme: Scheme) -> float:
    """Bits a weight that the scheme takes, of the matrices of all layers together."""
    shapes = {name: node.matrix.shape for name, node in linear_nodes(spec).items()}
    formats, _ = plan_formats(spec, scheme)
    bits = sum(stored_bits(formats[name], shape) for name, shape in shapes.items())
    return bits / sum(map(math.prod, shapes.values()))


def check_bits(bits: float, scheme: Scheme, bits_per_weight: float) -> None:
    """Raise InvalidArgumentError where the scheme alone, of `bits` a weight, has more of them."""
    if not bits <= bits_per_weight:  # also where that is no number
        kept = 16 if scheme.symmetric else 20  # bits a group for its scale and zero point
        spared = {size: kept / scheme.group_size - kept / size for size in GROUP_SIZES}
        wider = [size for size in GROUP_SIZES if bits - spared[size] <= bits_per_weight]
        least = math.ceil(1000 * bits) / 1000
        raise InvalidArgumentError(
            f"bits_per_weight is {bits_per_weight:g}; {scheme.name} in groups of "
            f"{scheme.group_size} takes {least:.3f} by itself: expected that or more"
            + (f", or a group_size of {wider[0]}" if wider else "")
        )


def spend_bits(sensitivity: Sensitivity, scheme: Scheme, bits_per_weight: float) -> Scheme:
    """`scheme` with int8 for the parts that gain the most by it, to at most so many bits a weight.

    Parts are taken in the order of what they gain for each bit, while they fit. Raises what
    `check_bits` raises.
    """
    check_bits(sensitivity.bits, scheme, bits_per_weight)
    weights = sum(part.weights for part in sensitivity.parts)
    left = weights * (bits_per_weight - sensitivity.bits)
    chosen: list[str] = []
    for part in sensitivity.parts:
        if 0 < part.more_bits <= left:
            left -= part.more_bits
            chosen.extend(part.matrices)
    return replace(scheme, int8=(*scheme.int8, *chosen))


def print_sensitivity(sensitivity: Sensitivity, chosen: Collection[str] = ()) -> None:
    """Every part with what quantizing it alone costs, on standard output.

    chosen: matrices that take int8, marked.
    """
    title = (
        f"Each part alone in 4 bits, by what int8 would save: mean KL over "
        f"{sensitivity.num_scored:,} tokens"
    )
    rows = [
        (
            part.name,
            f"{part.weights:,}",
            f"{part.bits:.2f}",
            f"{part.kl:.5f}",
            f"{part.kl_per_megabit:.5f}",
            "int8" if part.bits >= 8 or set(part.matrices) <= set(chosen) else "4 bits",
        )
        for part in sensitivity.parts
    ]
    headings = ("part", "weights", "bits", "KL", "KL saved a Mbit", "takes")
    console = stdout_console()
    console.print(Figures(headings, rows, ("part",), ("weights", "KL"), title))
    console.print(f"{sensitivity.bits:.3f} bits a weight, without int8 for any of them")
