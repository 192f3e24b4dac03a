"""The matrices of a GGUF model as codes: read block by block, with no matrix of floats between."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.machine import usable_cores
from octavo.models.family import WeightSource
from octavo.models.spec import WeightFormat
from octavo.weights.gguf import PLAIN_KINDS
from octavo.weights.gguf_blocks import BlockFormat, convert_blocks
from octavo.weights.gguf_bytes import BYTE_FORMATS
from octavo.weights.gguf_nibbles import NIBBLE_FORMATS
from octavo.weights.gguf_parts import GgufParts
from octavo.weights.tensor import ITEM_SIZE, Stored, Tensor, TensorDType, TensorInfo, TensorSource

BLOCK_FORMATS: Mapping[str, BlockFormat] = MappingProxyType({**NIBBLE_FORMATS, **BYTE_FORMATS})
"""Of every type but plain numbers, by the type's name."""

_RUN = 3 << 20  # weights that are converted at a time


def stored_kinds(parts: GgufParts, weight_map: Mapping[str, WeightSource]) -> dict[str, Stored]:
    """How the file holds each matrix of a block type, by octavo's name without ".weight"."""
    stored = {}
    for name, wanted in weight_map.items():
        tensor = parts.tensors[wanted.tensor]
        if tensor.kind in PLAIN_KINDS or len(tensor.shape) < 2:
            continue
        count = math.prod(wanted.shape)
        num_bytes = tensor.num_bytes * count // max(1, math.prod(tensor.shape))
        is_matrix = len(wanted.shape) == 2
        as_stored = is_matrix and wanted.transform in ("plain", "unpermute")
        known = BLOCK_FORMATS[tensor.kind] if as_stored else None
        stored[name.removesuffix(".weight")] = (
            Stored(tensor.kind, num_bytes, known.format, known.difference)
            if known
            else Stored(tensor.kind, num_bytes)
        )
    return stored


@dataclass
class _Scales:
    """Scales and zero points of the matrix that is being read; `known`: of which rows."""

    module: str
    parts: dict[str, npt.NDArray[Any]]
    known: npt.NDArray[np.bool_]


class GgufCodes(TensorSource):
    """A `TensorSource` over a GGUF model in which some matrices are codes.

    Of such a matrix M, "M.weight" is int8 or int4, "M.weight_scale" (outputs, groups) as its format
    says, and "M.weight_zero_point" float32, if it has zero points. All other tensors are those of
    `parts`.
    """

    def __init__(self, parts: GgufParts, modules: Mapping[str, WeightFormat]) -> None:
        """modules: the tensors that are codes, by name without ".weight"."""
        self._parts = parts
        self._modules = modules
        self._scales: _Scales | None = None
        self._pool = ThreadPoolExecutor(usable_cores())
        infos = dict(parts.infos)
        for module, format in modules.items():
            weight = module + ".weight"
            outputs, inputs = parts.infos[weight].shape
            count = outputs * inputs // (1 if format.dtype == "int8" else 2)
            infos[weight] = TensorInfo(format.dtype, (outputs, inputs), count)
            groups = (outputs, format.num_groups(inputs))
            for part, dtype in _scale_dtypes(format).items():
                size = ITEM_SIZE[dtype] * math.prod(groups)
                infos[f"{module}.{part}"] = TensorInfo(dtype, groups, size)
        self.infos = infos

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        return self.read_rows(name, 0, self.infos[name].shape[0])

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first to last - 1. Scales of the matrix that was read last are known already."""
        module, _, part = name.rpartition(".")
        if module not in self._modules or part == "bias":
            return self._parts.read_rows(name, first, last)
        scales = self._scales_of(module)
        if part == "weight":
            return self._convert(scales, first, last)
        if not scales.known[first:last].all():
            self._convert(scales, first, last)
        dtype = _scale_dtypes(self._modules[module])[part]
        return Tensor(scales.parts[part][first:last], dtype)

    def _scales_of(self, module: str) -> _Scales:
        if self._scales is None or self._scales.module != module:
            parts = {}
            for part, dtype in _scale_dtypes(self._modules[module]).items():
                shape = self.infos[f"{module}.{part}"].shape
                parts[part] = np.empty(shape, np.float16 if dtype == "f16" else np.float32)
            rows = self.infos[module + ".weight"].shape[0]
            self._scales = _Scales(module, parts, np.zeros(rows, np.bool_))
        return self._scales

    def _convert(self, scales: _Scales, first: int, last: int) -> Tensor:
        """The codes of these rows; keeps their scales, since they follow."""
        weight = scales.module + ".weight"
        raw = self._parts.read_bytes(weight, first, last).reshape(last - first, -1)
        source = BLOCK_FORMATS[self._parts.tensors[weight].kind]
        codes, *rest = convert_blocks(raw, source, self._pool)
        for whole, values in zip(scales.parts.values(), rest, strict=False):
            whole[first:last] = values
        scales.known[first:last] = True
        is_int8 = self._modules[scales.module].dtype == "int8"
        return Tensor(codes, "int8" if is_int8 else "int4")

    def rows_at_once(self, name: str) -> int:
        """Of codes so many that they are little beside the model; else as `GgufParts` says."""
        module, _, part = name.rpartition(".")
        if module in self._modules and part == "weight":
            return max(1, _RUN // max(1, self.infos[name].shape[1]))
        if name in self._parts.infos:
            return self._parts.rows_at_once(name)
        return super().rows_at_once(name)


def _scale_dtypes(format: WeightFormat) -> dict[str, TensorDType]:
    """What is beside the codes, by its ending, and its type."""
    found: dict[str, TensorDType] = {"weight_scale": format.scale_dtype}
    return found | ({"weight_zero_point": "f32"} if format.has_zeros else {})
