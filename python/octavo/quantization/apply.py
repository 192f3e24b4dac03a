"""Quantizing a checkpoint while it is loaded, and decoding its codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from octavo.errors import InvalidArgumentError
from octavo.models.spec import ModelSpec, WeightFormat
from octavo.quantization.plan import Scheme, embedding_formats, plan_formats
from octavo.quantization.rounding import QuantizedMatrix, quantize_matrix
from octavo.reference.quantization import dequantize, round_to_int8, unpack_int4
from octavo.weights.checkpoint import Checkpoint
from octavo.weights.tensor import Tensor, TensorInfo, TensorSource

_FLOATS = ("f32", "f16", "bf16")


def quantize_checkpoint(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    scheme: Scheme | None,
    *,
    keep_embedding: bool = False,
    importance: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> Checkpoint:
    """The same weights in the formats in which they run; `checkpoint` itself if nothing changes.

    scheme: how to round the layers' matrices that are floats; None leaves them as they are.
    If matrices are quantized, here or in the files, embedding and head are rounded to int8 too,
    unless keep_embedding is set. int8 matrices stay floats here, and the native core rounds them
    while packing; int4 is rounded when a weight is read. importance: for method "weighted", by name
    without ".weight", as `measure_importance` returns it.
    Raises InvalidArgumentError for a scheme on a checkpoint of which all is quantized already.
    """
    formats = dict(checkpoint.formats)
    if scheme is not None and scheme.name == "w8a8" and _all_int8(formats):
        formats = {name: replace(format, activation_bits=8) for name, format in formats.items()}
    elif scheme is not None:
        planned, _ = plan_formats(spec, scheme)
        if planned.keys() <= formats.keys():
            raise InvalidArgumentError(
                f"quantize is {scheme.name!r}, but the model's weights are quantized already: "
                "leave it out, or give the model that they were made from"
            )
        formats = planned | formats
    if not formats:
        return checkpoint
    if not keep_embedding:
        formats = {**embedding_formats(spec), **formats}
    if formats == checkpoint.formats:
        return checkpoint
    method = scheme.method if scheme else "rtn"
    source = RoundingSource(checkpoint, formats, method, importance or {})
    return Checkpoint(source, formats=formats, dtype=checkpoint.dtype, stored=checkpoint.stored)


def _all_int8(formats: Mapping[str, WeightFormat]) -> bool:
    """Whether the codes of a quantized checkpoint can be run as W8A8."""
    return bool(formats) and all(
        format.dtype == "int8" and not format.is_grouped for format in formats.values()
    )


class RoundingSource(TensorSource):
    """A `TensorSource` over a checkpoint; rounds to int4 the float matrices that should be."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        formats: Mapping[str, WeightFormat],
        method: str,
        importance: Mapping[str, npt.NDArray[np.float32]],
    ) -> None:
        self._checkpoint = checkpoint
        self._importance = importance
        self._method = method
        self._rounded: dict[str, WeightFormat] = {}
        self._latest: tuple[str, QuantizedMatrix] | None = None
        infos: dict[str, TensorInfo] = {}
        for name, info in checkpoint.infos.items():
            infos[name] = info
            base = name.removesuffix(".weight")
            format = formats.get(base)
            if format is None or format.dtype != "int4" or info.dtype not in _FLOATS:
                continue
            outputs, inputs = info.shape
            groups = (outputs, format.num_groups(inputs))
            self._rounded[base] = format
            infos[name] = TensorInfo("int4", info.shape, outputs * inputs // 2)
            infos[base + ".scale"] = TensorInfo("f32", groups, 4 * groups[0] * groups[1])
            if format.has_zeros:
                infos[base + ".zero"] = infos[base + ".scale"]
        self.infos = infos

    def read(self, name: str) -> Tensor:
        """The tensor; the matrix rounded last is cached, since its scales and zeros follow."""
        base, _, part = name.rpartition(".")
        if base not in self._rounded or part == "bias":
            return self._checkpoint[name]
        matrix = self._matrix(base)
        if part == "weight":
            return Tensor(matrix.codes, "int4")
        values = matrix.scales if part == "scale" else matrix.zeros
        if values is None:
            raise KeyError(name)
        return Tensor(values, "f32")

    def _matrix(self, base: str) -> QuantizedMatrix:
        if self._latest is None or self._latest[0] != base:
            weight = self._checkpoint[base + ".weight"].to_float32()
            share = self._importance.get(base)
            format = self._rounded[base]
            self._latest = base, quantize_matrix(weight, format, self._method, importance=share)
        return self._latest[1]


def dequantized(checkpoint: Checkpoint, name: str) -> npt.NDArray[np.float32]:
    """A weight as the numbers that the model computes with, float32.

    Codes are decoded; a float matrix that runs as int8 is rounded as in the native core.
    """
    tensor = checkpoint[name]
    base = name.removesuffix(".weight")
    format = checkpoint.formats.get(base) if name.endswith(".weight") else None
    if format is None:
        return tensor.to_float32()
    if tensor.dtype in _FLOATS:
        codes, scales = round_to_int8(tensor.to_float32())
        return dequantize(codes, scales, format)
    scales = checkpoint[base + ".scale"].to_float32()
    zeros = checkpoint[base + ".zero"].to_float32() if format.has_zeros else None
    values = unpack_int4(tensor.data) if tensor.dtype == "int4" else tensor.data
    return dequantize(values, scales, format, zeros)
