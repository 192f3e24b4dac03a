"""The matrices of a GGUF model that run as the file has them: as codes, never as floats.

Types with 4 bits become octavo's int4 (`gguf_blocks`). Every other block type is decoded to floats:
octavo's int8 has one scale a row, where Q8_0 has one for each 32 inputs, and there are no codes of
5 or 6 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from octavo.models.family import WeightSource
from octavo.models.spec import WeightFormat
from octavo.weights.gguf import PLAIN_KINDS
from octavo.weights.gguf_blocks import BLOCK_FORMATS, Codes, convert_blocks
from octavo.weights.gguf_parts import GgufParts
from octavo.weights.tensor import Stored, Tensor, TensorInfo, TensorSource


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
        known = BLOCK_FORMATS.get(tensor.kind) if as_stored else None
        stored[name.removesuffix(".weight")] = (
            Stored(tensor.kind, num_bytes, known.format, known.exact)
            if known
            else Stored(tensor.kind, num_bytes)
        )
    return stored


class GgufCodes(TensorSource):
    """A `TensorSource` over a GGUF model in which some matrices are codes.

    Of such a matrix M, "M.weight" is int4, "M.weight_scale" float32 (outputs, groups), and so is
    "M.weight_zero_point", if its type has offsets. All other tensors are those of `parts`.
    """

    def __init__(self, parts: GgufParts, modules: Mapping[str, WeightFormat]) -> None:
        """modules: the tensors that are codes, by name without ".weight"."""
        self._parts = parts
        self._modules = modules
        self._latest: tuple[tuple[str, int, int], Codes] | None = None
        infos = dict(parts.infos)
        for module, format in modules.items():
            outputs, inputs = parts.infos[module + ".weight"].shape
            groups = (outputs, format.num_groups(inputs))
            infos[module + ".weight"] = TensorInfo("int4", (outputs, inputs), outputs * inputs // 2)
            for part in ("weight_scale", "weight_zero_point")[: 1 + format.has_zeros]:
                infos[f"{module}.{part}"] = TensorInfo("f32", groups, 4 * math.prod(groups))
        self.infos = infos

    def read(self, name: str) -> Tensor:
        """The whole tensor."""
        return self.read_rows(name, 0, self.infos[name].shape[0])

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first to last - 1; those converted last are kept, since their scales follow."""
        module, _, part = name.rpartition(".")
        if module not in self._modules or part == "bias":
            return self._parts.read_rows(name, first, last)
        place = module, first, last
        if self._latest is None or self._latest[0] != place:
            weight = module + ".weight"
            raw = self._parts.read_bytes(weight, first, last).reshape(last - first, -1)
            self._latest = place, convert_blocks(raw, self._parts.tensors[weight].kind)
        found = self._latest[1]
        if part == "weight":
            return Tensor(found.codes, "int4")
        values = found.scales if part == "weight_scale" else found.zeros
        if values is None:
            raise KeyError(name)
        return Tensor(values, "f32")

    def rows_at_once(self, name: str) -> int:
        """All rows of codes; else as `GgufParts` says."""
        if name in self._parts.infos and self.infos[name] == self._parts.infos[name]:
            return self._parts.rows_at_once(name)
        return super().rows_at_once(name)
