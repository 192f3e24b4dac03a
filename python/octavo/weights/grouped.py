"""Whole-number codes in groups: what AWQ, GPTQ and compressed-tensors have in common.

A weight is (code - zero) * scale, with the scale and the zero point of its group. octavo's kernels
compute with 4 and 8 bits in groups of consecutive inputs, a multiple of 32, and with 8 bits in one
scale an output; zero points they have for 4 bits. Such matrices run as the codes of the file, bit
for bit. The others (groups whose inputs are scattered by act-order, 8 bits with zero points, groups
of another size) become bfloat16: each weight is rounded once, by at most one part in 512.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from octavo.models.spec import UNIFORM_LEVELS, WeightFormat
from octavo.weights.safetensors import SafetensorsFile
from octavo.weights.stored import CONVERTED, StoredMatrix, contents_error, convert_rows
from octavo.weights.tensor import Tensor

Bytes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Self = TypeVar("Self", bound="GroupedMatrix")


@dataclass(frozen=True)
class GroupedMatrix(StoredMatrix):
    """A matrix of codes. group_size: inputs that share a scale; all of them for one an output.

    levels, activation_bits: as in `WeightFormat`, for formats that have them.
    """

    bits: int = 4
    group_size: int = 0
    levels: tuple[int, ...] = UNIFORM_LEVELS
    activation_bits: Literal[8, 16] = 16

    @property
    def num_groups(self) -> int:
        """Scales of a row in the file."""
        return -(-self.shape[1] // self.group_size)

    @property
    def grouping(self) -> str:
        """What shares a scale, for people."""
        whole = self.group_size >= self.shape[1]
        return "a scale an output" if whole else f"groups of {self.group_size}"

    @property
    @abstractmethod
    def scale_name(self) -> str:
        """The tensor of the scales."""

    @property
    def order_name(self) -> str:
        """The tensor with the group of each input, if there is one: act-order."""
        return ""

    @abstractmethod
    def has_zero_points(self, files: SafetensorsFile) -> bool:
        """Whether a zero point differs from the middle of the codes, 8 or 128."""

    @abstractmethod
    def packed(self, files: SafetensorsFile, first: int, last: int) -> Bytes:
        """The codes of these rows: 8 bits one a byte, 4 bits two a byte, the first in the low half.

        Codes are from 0 to 15 or 255. Returns uint8 (rows, at least inputs * bits / 8).
        """

    @abstractmethod
    def stored_scales(self, files: SafetensorsFile, first: int, last: int) -> npt.NDArray[Any]:
        """The scales of these rows as stored: (rows, groups)."""

    @abstractmethod
    def stored_zeros(self, files: SafetensorsFile, first: int, last: int) -> Float32:
        """The zero points of these rows, less the middle of the codes: (rows, groups)."""

    def running_format(self, has_zeros: bool, groups: npt.NDArray[np.int64]) -> WeightFormat:
        """The format whose weights are exactly those of the file, or `CONVERTED`.

        groups: the group of each input.
        """
        size, inputs = self.group_size, self.shape[1]
        if self.bits == 8 and has_zeros:
            return CONVERTED
        if self.bits == 8 and bool(np.all(groups == groups[0])):
            return WeightFormat("int8", activation_bits=self.activation_bits)
        whole = size % 32 == 0 and inputs % size == 0
        if whole and bool(np.all(groups.reshape(-1, size) == groups[::size, None])):
            dtype: Literal["int4", "int8"] = "int4" if self.bits == 4 else "int8"
            return WeightFormat(dtype, size, has_zeros, self.levels)
        return CONVERTED

    def groups(self, files: SafetensorsFile | None = None) -> npt.NDArray[np.int64]:
        """The group of each input; without files as if there were no act-order."""
        inputs = self.shape[1]
        if files is None or self.order_name not in files.infos:
            return np.arange(inputs) // self.group_size
        groups = files.read_array(self.order_name).astype(np.int64)
        if groups.min() < 0 or groups.max() >= self.num_groups:
            found = f"a group {groups.min() if groups.min() < 0 else groups.max()}"
            raise contents_error(self.order_name, found, f"groups 0 to {self.num_groups - 1}")
        return groups

    def settled(self: Self, files: SafetensorsFile) -> Self:
        """As `StoredMatrix.settled`: looks at zero points and at the order of the groups."""
        format = self.running_format(self.has_zero_points(files), self.groups(files))
        dtypes: tuple[Literal["f32", "f16", "bf16"], ...] = ("f32", "f16", "bf16")
        stored = next(d for d in dtypes if d == files.infos[self.scale_name].dtype)
        if format.is_grouped:
            format = replace(format, scale_dtype=stored)
        return replace(self, format=format, scale_dtype=stored)

    def weight(self, files: SafetensorsFile, first: int, last: int) -> Tensor:
        """As `StoredMatrix.weight`."""
        packed, inputs = self.packed(files, first, last), self.shape[1]
        if self.converted:
            return self._converted(files, packed, first, last)
        if self.bits == 4:
            return Tensor(np.ascontiguousarray(packed[:, : inputs // 2]), "int4")
        codes = np.ascontiguousarray(packed[:, :inputs] ^ np.uint8(0x80))
        return Tensor(codes.view(np.int8), "int8")

    def _converted(self, files: SafetensorsFile, packed: Bytes, first: int, last: int) -> Tensor:
        """The codes `packed` of these rows as bfloat16 numbers."""
        groups, inputs = self.groups(files), self.shape[1]
        scales = self.stored_scales(files, first, last)
        zeros = self.stored_zeros(files, first, last) + np.float32(1 << (self.bits - 1))

        def decode(row: int, end: int) -> Float32:
            rows = slice(row - first, end - first)
            codes = (nibbles(packed[rows]) if self.bits == 4 else packed[rows])[:, :inputs]
            scale = Tensor(scales[rows], self.scale_dtype).to_float32()
            values: Float32 = codes - np.take(zeros[rows], groups, axis=1)
            values *= np.take(scale, groups, axis=1)
            return values

        return convert_rows(first, last, inputs, decode)

    def scales(self, files: SafetensorsFile, first: int, last: int) -> Tensor:
        """As `StoredMatrix.scales`; groups in the order of the inputs."""
        scales = self.stored_scales(files, first, last)[:, self._places(files)]
        return Tensor(np.ascontiguousarray(scales), self.scale_dtype)

    def zeros(self, files: SafetensorsFile, first: int, last: int) -> Tensor:
        """As `StoredMatrix.zeros`; groups in the order of the inputs."""
        zeros = self.stored_zeros(files, first, last)[:, self._places(files)]
        return Tensor(np.ascontiguousarray(zeros), "f32")

    def _places(self, files: SafetensorsFile) -> npt.NDArray[np.int64]:
        """Which stored groups the running format has, in order."""
        groups = self.groups(files)
        return groups[:: self.group_size] if self.format.is_grouped else groups[:1]


def nibbles(words: npt.NDArray[Any]) -> Bytes:
    """The 4-bit fields of little-endian words along the last axis, the lowest first."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    fields = np.empty((*raw.shape[:-1], 2 * raw.shape[-1]), np.uint8)
    fields[..., 0::2], fields[..., 1::2] = raw & 15, raw >> 4
    return fields
