"""Matrices that a checkpoint holds in another form than numbers, and the source that reads them.

Each published format is a `StoredMatrix` of its own: which tensors it consists of, and how they are
decoded. What octavo's kernels compute in runs as codes. Everything else is converted to bfloat16
while it is loaded, a matrix at a time and a block of rows at a time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from octavo.errors import WeightsError
from octavo.models.spec import WeightFormat
from octavo.weights.safetensors import SafetensorsFile
from octavo.weights.tensor import (
    ITEM_SIZE,
    Stored,
    Tensor,
    TensorDType,
    TensorInfo,
    TensorSource,
    float32_to_bf16,
)

FLOATS = tuple(ITEM_SIZE)
CONVERTED = WeightFormat("bf16")  # the format of a matrix that no kernel computes in
_BITS: dict[str, int] = {"bf16": 16, "int8": 8, "int4": 4}
_BLOCK = 1 << 16  # weights that are decoded at a time: their scratch stays in the cache

Float32 = npt.NDArray[np.float32]
Infos = Mapping[str, TensorInfo]


class Entry(NamedTuple):
    """A tensor of a stored matrix: the types and shapes it may have (no shapes: any)."""

    types: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] = ()
    optional: bool = False


Self = TypeVar("Self", bound="StoredMatrix")


@dataclass(frozen=True)
class StoredMatrix(ABC):
    """How a checkpoint holds a matrix, or several in one.

    module: its name without an ending. shape: (outputs, inputs). format: in which it runs, codes or
    `CONVERTED`. The configuration says most of it; `settled` looks at the tensors for the rest.
    scale_dtype: of the scales as they are read.
    """

    module: str
    shape: tuple[int, int]
    format: WeightFormat
    scale_dtype: TensorDType = "f32"

    @property
    @abstractmethod
    def label(self) -> str:
        """What the format is called, for people: "AWQ, 4 bits, groups of 128"."""

    @abstractmethod
    def entries(self, infos: Infos) -> dict[str, Entry]:
        """The tensors that it consists of, by name. infos: of the files, for what they decide."""

    @abstractmethod
    def settled(self: Self, files: SafetensorsFile) -> Self:
        """The same matrix with the format that its tensors allow; their shapes are checked already.

        Raises WeightsError for contents that contradict the format.
        """

    @abstractmethod
    def weight(self, files: SafetensorsFile, first: int, last: int) -> Tensor:
        """Rows first to last - 1: int8 or int4 codes as the core takes them, or bf16."""

    def scales(self, files: SafetensorsFile, first: int, last: int) -> Tensor:
        """Of these rows: (rows, groups), in scale_dtype. For codes only."""
        raise NotImplementedError

    def zeros(self, files: SafetensorsFile, first: int, last: int) -> Tensor:
        """Zero points of these rows: float32 (rows, groups). For codes with zero points only."""
        raise NotImplementedError

    @property
    def converted(self) -> bool:
        """Whether it becomes bfloat16."""
        return self.format == CONVERTED

    @property
    def is_own(self) -> bool:
        """Whether octavo writes such matrices itself."""
        return False

    def described(self, infos: Infos, share: float) -> Stored:
        """For people. share: of its weights that are meant. infos: of the files."""
        held = sum(infos[name].num_bytes for name in self.entries(infos) if name in infos)
        format = None if self.converted else self.format
        return Stored(self.label, round(share * held), format, rounded=self.converted)

    def is_plain(self, infos: Infos) -> bool:
        """Whether the files hold the module as plain numbers after all.

        Configurations do not always list the modules that were left out (routers of experts).
        """
        info = infos.get(self.module + ".weight")
        missing = (name not in infos for name in self.codes_names)
        return info is not None and info.dtype in FLOATS and all(missing)

    @property
    def codes_names(self) -> tuple[str, ...]:
        """The tensors of which one shows that the module is stored so, "M.weight" left out."""
        return ()

    def infos(self) -> dict[str, TensorInfo]:
        """Of "M.weight", and for codes "M.weight_scale" and "M.weight_zero_point"."""
        outputs, inputs = self.shape
        name, dtype = self.module + ".weight", self.format.dtype
        found = {name: TensorInfo(dtype, self.shape, outputs * inputs * _BITS[dtype] // 8)}
        if self.converted:
            return found
        shape = (outputs, self.format.num_groups(inputs))
        count = math.prod(shape)
        size = ITEM_SIZE[self.scale_dtype] * count
        found[name + "_scale"] = TensorInfo(self.scale_dtype, shape, size)
        if self.format.has_zeros:
            found[name + "_zero_point"] = TensorInfo("f32", shape, 4 * count)
        return found


class StoredSource(TensorSource):
    """A `TensorSource` in which every stored matrix is codes, scales and zero points, or bf16.

    Of the matrix M, "M.weight" is int8, int4 or bf16, "M.weight_scale" as stored,
    "M.weight_zero_point" float32 (outputs, groups). All other tensors are those of `files`.
    """

    def __init__(self, files: SafetensorsFile, matrices: Iterable[StoredMatrix]) -> None:
        """matrices: settled."""
        self._files = files
        self._matrices = {matrix.module: matrix for matrix in matrices}
        infos = dict(files.infos)
        for matrix in self._matrices.values():
            for name in matrix.entries(files.infos):
                infos.pop(name, None)
            infos.update(matrix.infos())
        self.infos = infos

    def read(self, name: str) -> Tensor:
        """The tensor, decoded if it belongs to a stored matrix."""
        return self.read_rows(name, 0, self.infos[name].shape[0] if self.infos[name].shape else 0)

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first to last - 1, decoded."""
        module, _, part = name.rpartition(".")
        matrix = self._matrices.get(module)
        if matrix is None or part == "bias":
            whole = self._files.read(name)
            return Tensor(whole.data[first:last], whole.dtype) if whole.shape else whole
        read = {
            "weight": matrix.weight,
            "weight_scale": matrix.scales,
            "weight_zero_point": matrix.zeros,
        }[part]
        return read(self._files, first, last)


def convert_rows(
    first: int, last: int, width: int, decode: Callable[[int, int], Float32]
) -> Tensor:
    """Rows first to last - 1 rounded to bfloat16, decoded block by block.

    decode: of two numbers of rows, the float32 values (rows, width) between them.
    """
    result = np.empty((last - first, width), np.uint16)
    step = max(1, _BLOCK // max(1, width))
    with np.errstate(over="ignore", invalid="ignore"):  # of damaged scales; the loader warns
        for row in range(first, last, step):
            end = min(row + step, last)
            result[row - first : end - first] = float32_to_bf16(decode(row, end))
    return Tensor(result, "bf16")


def with_alike_experts(settled: Mapping[str, StoredMatrix]) -> dict[str, StoredMatrix]:
    """The same with one format for the experts of a layer, which the core multiplies together.

    settled: octavo's name -> matrix. Where the contents of some need more than those of others, all
    get zero points, or all are converted.
    """
    stacks: dict[str, set[WeightFormat]] = {}
    for name, matrix in settled.items():
        stacks.setdefault(stack_of(name), set()).add(matrix.format)
    found = {}
    for name, matrix in settled.items():
        formats = stacks[stack_of(name)]
        common = replace(matrix.format, has_zeros=any(each.has_zeros for each in formats))
        found[name] = replace(matrix, format=CONVERTED if CONVERTED in formats else common)
    return found


def stack_of(name: str) -> str:
    """The matrices that the core multiplies together have the same: a layer's gates and ups.

    "layers.0.experts.3.up" -> "layers.0.experts.gate"; other names as they are.
    """
    prefix, experts, rest = name.partition(".experts.")
    part = rest.partition(".")[2]
    return prefix + experts + ("gate" if part == "up" else part) if experts else name


def contents_error(name: str, found: object, expected: str) -> WeightsError:
    """For a tensor whose contents contradict its format."""
    return WeightsError(f"{name} holds {found}; expected {expected}. Fetch the model again")
