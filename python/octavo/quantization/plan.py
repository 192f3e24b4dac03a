"""Which format every matrix of a model takes: the one place where that is decided.

int8: codes with a scale an output (in files also with one for each group of inputs). w8a8: the
same, and their activations are rounded to 8 bits too: fastest, but much less exact. int4: a scale,
and optionally a zero point, for each group of inputs. int4-nonuniform: the same without zero
points; its 16 levels are closer together near 0. The embedding and the head are always rounded to
int8: in 4 bits they would cost too much accuracy, and in 16 they are half of a small model's bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from octavo.errors import InvalidArgumentError
from octavo.models.layer import linear_nodes, weight_shapes
from octavo.models.spec import UNIFORM_LEVELS, ModelSpec, WeightFormat
from octavo.quantization.levels import NONUNIFORM_LEVELS

SCHEMES = ("int8", "w8a8", "int4", "int4-nonuniform")
METHODS = ("rtn", "search", "weighted")
GROUP_SIZES = (32, 64, 128)
# 4.5 bits a weight, as llama.cpp's Q4_0; with wider groups, models are smaller but clearly worse.
DEFAULT_GROUP_SIZE = 32
EMBEDDINGS = ("embed", "lm_head")
_FLOAT_BITS = {"f32": 32, "bf16": 16, "f16": 16}
_CODE_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Scheme:
    """The quantization that a user asks for.

    name: "int8", "w8a8", "int4" or "int4-nonuniform". group_size: of both kinds of int4.
    symmetric: of int4. method: how int4 is rounded, "rtn" to nearest by the largest magnitude,
    "search" for the scale of least squared error, or "weighted" for the same with errors weighted
    by importance (see `octavo.quantize.importance`; where it was not measured, this is "search").
    int8: patterns of names ("layers.0.*", "*.down"): matrices of an int4 model that take int8.
    """

    name: str
    group_size: int = DEFAULT_GROUP_SIZE
    symmetric: bool = True
    method: str = "search"
    int8: tuple[str, ...] = ()

    @property
    def has_groups(self) -> bool:
        """Whether the scheme has 4 bits."""
        return self.name.startswith("int4")

    def __post_init__(self) -> None:
        _check("scheme", self.name, SCHEMES)
        _check("group_size", self.group_size, GROUP_SIZES)
        _check("method", self.method, METHODS)
        if self.name != "int4" and not self.symmetric:
            raise InvalidArgumentError(
                f"{self.name} was asked for asymmetric; expected int4, or symmetric {self.name}: "
                "8 bits have one scale an output, and levels that are not uniform no zero points"
            )
        if self.int8 and not self.has_groups:
            raise InvalidArgumentError(
                f"matrices were named for int8, but the scheme is {self.name}; expected int4 or "
                "int4-nonuniform"
            )


def _check(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise InvalidArgumentError(
            f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}"
        )


def embedding_formats(spec: ModelSpec) -> dict[str, WeightFormat]:
    """int8 for the embedding, and for the head where it is not the embedding."""
    names = ("embed",) if spec.tie_word_embeddings else EMBEDDINGS
    return dict.fromkeys(names, WeightFormat("int8"))


def plan_formats(spec: ModelSpec, scheme: Scheme) -> tuple[dict[str, WeightFormat], list[str]]:
    """The formats of the layers' matrices, and notes for the user about them.

    If the group does not divide a width, the largest smaller one of 32, 64 and 128 that does is
    taken; if none does, the matrix is rounded to int8. Raises InvalidArgumentError for a pattern in
    `scheme.int8` that matches no matrix.
    """
    nodes = linear_nodes(spec)
    for pattern in scheme.int8:
        if not any(fnmatchcase(name, pattern) for name in nodes):
            raise InvalidArgumentError(
                f"int8 is asked for {pattern!r}, which no matrix is called; expected names such as "
                f"{next(iter(nodes))!r}, or patterns of them such as '*.down'"
            )
    formats: dict[str, WeightFormat] = {}
    others: dict[str, set[str]] = {}
    for name, node in nodes.items():
        if any(fnmatchcase(name, pattern) for pattern in scheme.int8):
            formats[name] = WeightFormat("int8")
            continue
        formats[name] = format = _format_for(node.matrix.inputs, scheme)
        if scheme.has_groups and format.group_size != scheme.group_size:
            taken = f"groups of {format.group_size}" if format.group_size else "int8"
            others.setdefault(f"{taken} (width {node.matrix.inputs})", set()).add(
                name.rsplit(".", 1)[1]
            )
    notes = [
        f"{', '.join(sorted(parts))}: {taken}, since {scheme.group_size} does not divide the width"
        for taken, parts in others.items()
    ]
    return formats, notes


def resolved_formats(
    spec: ModelSpec, stored: Mapping[str, WeightFormat], quantize: str | None, keep_embedding: bool
) -> dict[str, WeightFormat]:
    """The formats in memory of a model that is loaded so; stored: of matrices in its files."""
    formats = dict(stored)
    if quantize is not None:
        formats = plan_formats(spec, Scheme(quantize))[0] | formats
    if formats and not keep_embedding:
        formats = {**embedding_formats(spec), **formats}
    return formats


def _format_for(inputs: int, scheme: Scheme) -> WeightFormat:
    if scheme.has_groups:
        levels = UNIFORM_LEVELS if scheme.name == "int4" else NONUNIFORM_LEVELS
        for group_size in reversed(GROUP_SIZES):
            if group_size <= scheme.group_size and inputs % group_size == 0:
                return WeightFormat("int4", group_size, not scheme.symmetric, levels)
    return WeightFormat("int8", activation_bits=8 if scheme.name == "w8a8" else 16)


def describe_format(format: WeightFormat) -> str:
    """WeightFormat("int4", 64, True) -> "int4, groups of 64, asymmetric"."""
    if format.activation_bits == 8:
        return f"{format.dtype}, activations in 8 bits"
    if not format.is_grouped:
        return format.dtype
    if format.dtype == "int8":
        return f"int8, groups of {format.group_size}"
    kind = "asymmetric" if format.has_zeros else "symmetric"
    if format.levels != UNIFORM_LEVELS and not format.has_zeros:
        kind = "non-uniform"
    return f"int4, groups of {format.group_size}, {kind}"


def describe_formats(spec: ModelSpec, formats: Mapping[str, WeightFormat]) -> list[str]:
    """One line a format, with the kinds of matrices that have it, the most weights first."""
    kinds: dict[str, dict[str, int]] = {}
    for name, shape in weight_shapes(spec).items():
        base = name.removesuffix(".weight")
        if base in formats:
            kind = kinds.setdefault(describe_format(formats[base]), {})
            part = base.rsplit(".", 1)[-1]
            kind[part] = kind.get(part, 0) + math.prod(shape)
    ordered = sorted(kinds.items(), key=lambda item: -sum(item[1].values()))
    return [f"{format} ({', '.join(parts)})" for format, parts in ordered]


def weight_bytes(spec: ModelSpec, formats: Mapping[str, WeightFormat], dtype: str) -> int:
    """Bytes that the weights take in memory.

    dtype: of the matrices that `formats` does not name, "f32", "bf16" or "f16". Vectors and
    routers are float32.
    """
    return _bytes_of(weight_shapes(spec), formats, dtype)


def expert_bytes(spec: ModelSpec, formats: Mapping[str, WeightFormat], dtype: str) -> int:
    """The same of the experts' matrices alone."""
    shapes = weight_shapes(spec).items()
    return _bytes_of({name: shape for name, shape in shapes if ".experts." in name}, formats, dtype)


def _bytes_of(
    shapes: Mapping[str, tuple[int, ...]], formats: Mapping[str, WeightFormat], dtype: str
) -> int:
    total = 0
    for name, shape in shapes.items():
        kept = "f32" if len(shape) == 1 or name.endswith(".router.weight") else dtype
        total += matrix_bytes(shape, formats.get(name.removesuffix(".weight")), kept)
    return total


def matrix_bytes(shape: tuple[int, ...], format: WeightFormat | None, dtype: str) -> int:
    """Bytes of a weight in memory: zero points are bytes there, scales of outputs float32.

    format: None for plain numbers of `dtype`.
    """
    if format is None:
        return math.prod(shape) * _FLOAT_BITS[dtype] // 8
    scale = _FLOAT_BITS[format.scale_dtype] if format.is_grouped else 32
    per_group = scale + 8 * format.has_zeros
    bits = math.prod(shape) * _CODE_BITS[format.dtype]
    return (bits + shape[0] * format.num_groups(shape[1]) * per_group) // 8


def stored_bits(format: WeightFormat, shape: tuple[int, int]) -> int:
    """The bits of a quantized matrix in a directory, with its scales and its shape."""
    outputs, inputs = shape
    words = outputs * -(-inputs * _CODE_BITS[format.dtype] // 32)
    groups = format.num_groups(inputs)
    zeros = -(-outputs // 8) * groups if format.has_zeros else 0
    return 32 * words + 16 * outputs * groups + 32 * zeros + 128


def describe_dtypes(formats: Mapping[str, WeightFormat], dtype: str) -> str:
    """The formats of the matrices: "int4 and int8" if quantized, else `dtype`.

    "w8a8" is int8 where the activations have 8 bits too.
    """
    names = {"w8a8" if each.activation_bits == 8 else each.dtype for each in formats.values()}
    return " and ".join(sorted(names)) or dtype
