"""Tensors as they lie in a file, and the sources they are read from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from octavo.models.spec import WeightFormat

TensorDType = Literal["f32", "f16", "bf16", "int8", "int4"]
ITEM_SIZE: dict[TensorDType, int] = {"f32": 4, "f16": 2, "bf16": 2}
_CHUNK = 1 << 16  # elements rounded in one go: they stay in cache


@dataclass(frozen=True)
class Tensor:
    """An array and its format.

    NumPy has no bfloat16, so a bf16 tensor's `data` is uint16 holding the raw bits. Codes, which
    mean nothing without their scales, are int8, or uint8 with two int4 codes a byte.
    """

    data: npt.NDArray[Any]  # float32, float16, uint16 (bf16), codes; any shape, C-contiguous
    dtype: TensorDType

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def to_float32(self) -> npt.NDArray[np.float32]:
        """The values as float32, exactly (a copy unless the tensor is float32 already).

        Raises TypeError for codes: `octavo.quantization.apply.dequantized` knows their scales.
        """
        if self.dtype not in ITEM_SIZE:
            raise TypeError(f"a tensor of {self.dtype} codes has no values without its scales")
        if self.dtype == "bf16":
            return (self.data.astype(np.uint32) << 16).view(np.float32)
        return self.data.astype(np.float32, copy=False)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's description in a header, before any of its data is read."""

    dtype: str  # "f32", "f16" and "bf16" can be loaded; any other name is for messages
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


class Stored(NamedTuple):
    """How a file holds a matrix in a format of another program.

    kind: the file's name of the format, such as "Q4_K". format: octavo's codes that it becomes.
    difference: of their numbers from those of the file, in words; "" for none. rounded: whether it
    is read as bfloat16 for any type of the weights.
    """

    kind: str
    num_bytes: int
    format: WeightFormat | None = None
    difference: str = ""
    rounded: bool = False


class TensorSource(ABC):
    """Tensors under the names of a checkpoint, with known shapes, read one at a time."""

    infos: Mapping[str, TensorInfo]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor; KeyError for a name that is not in `infos`."""

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first to last - 1 of it (its first axis)."""
        tensor = self.read(name)
        return Tensor(tensor.data[first:last], tensor.dtype)

    def rows_at_once(self, name: str) -> int:
        """How many rows to read in one go, so that little memory is needed besides the result."""
        return max(1, *self.infos[name].shape[:1])


def float32_to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round float32 to bfloat16 bits, ties to even; a NaN stays a (quiet) NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(-1)
    result = np.empty(bits.size, np.uint16)
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        rounded = chunk >> np.uint32(16)
        rounded &= np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += chunk
        rounded >>= np.uint32(16)
        out = result[start : start + _CHUNK]
        np.copyto(out, rounded, casting="unsafe")
        is_nan = (chunk & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        if is_nan.any():
            out[is_nan] = chunk[is_nan] >> np.uint32(16) | np.uint32(0x40)
    return result.reshape(values.shape)
