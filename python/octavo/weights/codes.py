"""Codes as a `compressed-tensors` directory holds them: reading, checking, packing.

Of a matrix M of (outputs, inputs), layout "pack-quantized" has

    M.weight_packed      int32 (outputs, ceil(inputs * bits / 32)), see `pack_words`
    M.weight_scale       float (outputs, groups)
    M.weight_shape       int (2,): outputs and inputs
    M.weight_zero_point  int32 (ceil(outputs / 8), groups), of asymmetric matrices: packed
                         downwards; before compressed-tensors 0.10 int8 (outputs, groups)
    M.weight_g_idx       int32 (inputs,): the group of each input, with actorder "group"

"int-quantized" has M.weight int8 (outputs, inputs) and everything else alike, and "octavo" is
"pack-quantized" with M.weight for M.weight_packed. A scheme of one scale a tensor has one number.
A weight is (code - zero point) * scale, with codes and zero points from -8 to 7 or -128 to 127.
`octavo.reference.quantization.pack_int32` defines the packing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from octavo.errors import WeightsError
from octavo.models.spec import WeightFormat
from octavo.weights.grouped import Bytes, Float32, GroupedMatrix
from octavo.weights.safetensors import SafetensorsFile
from octavo.weights.stored import FLOATS, Entry, Infos
from octavo.weights.tensor import Tensor

Layout = Literal["pack-quantized", "int-quantized", "octavo"]


def pack_words(codes: npt.NDArray[Any], format_dtype: str) -> npt.NDArray[np.int32]:
    """Codes as the native core takes them -> weight_packed.

    codes: int8 (outputs, inputs), or uint8 (outputs, inputs / 2) with two int4 codes a byte. The
    little-endian words have the same bytes (int8: plus 128); a row is padded with zero bytes to
    whole words.
    """
    raw = codes.view(np.uint8) ^ np.uint8(0x80) if format_dtype == "int8" else codes
    padded = np.zeros((raw.shape[0], -(-raw.shape[1] // 4) * 4), np.uint8)
    padded[:, : raw.shape[1]] = raw
    return padded.view("<i4")


def pack_zeros(zeros: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """Zero points (outputs, groups) -> weight_zero_point (ceil(outputs / 8), groups)."""
    outputs, groups = zeros.shape
    padded = np.zeros((-(-outputs // 8) * 8, groups), np.uint32)
    padded[:outputs] = (zeros + 8).astype(np.uint32)
    words = np.zeros((padded.shape[0] // 8, groups), np.uint32)
    for place in range(8):
        words |= padded[place::8] << np.uint32(4 * place)
    return words.view(np.int32)


def unpack_zeros(words: npt.NDArray[np.int32], outputs: int, bits: int = 4) -> Float32:
    """The inverse of `pack_zeros`; 8 bits lie four in a word."""
    in_word, middle = 32 // bits, 1 << (bits - 1)
    zeros = np.empty((words.shape[0] * in_word, words.shape[1]), np.float32)
    for place in range(in_word):
        field = (words.view(np.uint32) >> np.uint32(bits * place)) & np.uint32(2 * middle - 1)
        zeros[place::in_word] = field
    return np.ascontiguousarray(zeros[:outputs] - middle)


@dataclass(frozen=True)
class CompressedMatrix(GroupedMatrix):
    """A matrix in one of the layouts.

    per_tensor: the one scale (and zero point) is of all outputs. ordered: there is a weight_g_idx.
    """

    layout: Layout = "pack-quantized"
    symmetric: bool = True
    per_tensor: bool = False
    ordered: bool = False

    @staticmethod
    def of(
        module: str, shape: tuple[int, int], format: WeightFormat, layout: Layout
    ) -> CompressedMatrix:
        """A matrix that octavo writes: codes in the format in which they run."""
        return CompressedMatrix(
            module,
            shape,
            format,
            bits=8 if format.dtype == "int8" else 4,
            group_size=format.group_size or shape[1],
            levels=format.levels,
            activation_bits=format.activation_bits,
            layout=layout,
            symmetric=not format.has_zeros,
        )

    @property
    def label(self) -> str:
        """As `StoredMatrix.label`."""
        method = "octavo" if self.layout == "octavo" else f"compressed-tensors, {self.layout}"
        groups = "one scale" if self.per_tensor else self.grouping
        order = ", act-order" if self.ordered else ""
        return f"{method}, {self.bits} bits, {groups}{order}"

    @property
    def is_own(self) -> bool:
        """As `StoredMatrix.is_own`."""
        return not self.converted

    @property
    def words_name(self) -> str:
        """The tensor that holds the codes."""
        packed = self.layout == "pack-quantized"
        return self.module + (".weight_packed" if packed else ".weight")

    def is_plain(self, infos: Infos) -> bool:
        """As `StoredMatrix.is_plain`: this configuration does list what was left out."""
        return False

    @property
    def scale_name(self) -> str:
        """As `GroupedMatrix.scale_name`."""
        return self.module + ".weight_scale"

    @property
    def order_name(self) -> str:
        """As `GroupedMatrix.order_name`."""
        return self.module + ".weight_g_idx" if self.ordered else ""

    def entries(self, infos: Infos) -> dict[str, Entry]:
        """As `StoredMatrix.entries`; octavo writes the first type and shape of each."""
        outputs, inputs = self.shape
        name = self.module + "."
        whole: tuple[tuple[int, ...], ...] = ((outputs, self.num_groups),)
        if self.per_tensor:
            whole = ((1,), (), (1, 1))
        elif self.num_groups == 1:
            whole = (*whole, (outputs,))
        found = {
            name + "weight": Entry(("I8",), (self.shape,)),
            self.scale_name: Entry(FLOATS, whole),
        }
        if self.layout != "int-quantized":
            words = -(-inputs * self.bits // 32)
            found = {
                self.words_name: Entry(("I32",), ((outputs, words),)),
                name + "weight_shape": Entry(("I32", "I64"), ((2,),)),
                self.scale_name: Entry(FLOATS, whole),
            }
        if not self.symmetric:
            packed = (-(-outputs * self.bits // 32), self.num_groups)
            zero = Entry(("I8",), whole)
            if self._zeros_are_packed(infos):
                zero = Entry(("I32",), (packed,))
            found[name + "weight_zero_point"] = zero
        if self.ordered:
            found[self.order_name] = Entry(("I32", "I64"), ((inputs,),))
        return found

    def _zeros_are_packed(self, infos: Infos) -> bool:
        info = infos.get(self.module + ".weight_zero_point")
        return info is None or info.dtype != "I8"

    def settled(self, files: SafetensorsFile) -> CompressedMatrix:
        """As `StoredMatrix.settled`. Raises WeightsError for a wrong weight_shape."""
        if self.layout != "int-quantized":
            shape = tuple(int(size) for size in files.read_array(self.module + ".weight_shape"))
            if shape != self.shape:
                raise WeightsError(
                    f"{self.module}.weight_shape is {shape}; config.json makes it {self.shape}"
                )
        return super().settled(files)

    def has_zero_points(self, files: SafetensorsFile) -> bool:
        """As `GroupedMatrix.has_zero_points`: by the configuration."""
        return not self.symmetric

    def packed(self, files: SafetensorsFile, first: int, last: int) -> Bytes:
        """As `GroupedMatrix.packed`."""
        codes = files.read_array(self.words_name)[first:last]
        if self.layout == "int-quantized":
            signed: Bytes = codes.view(np.uint8) ^ np.uint8(0x80)
            return signed
        return np.ascontiguousarray(codes).view(np.uint8)

    def weight(self, files: SafetensorsFile, first: int, last: int) -> Tensor:
        """As `StoredMatrix.weight`; int8 codes that lie one a byte are a view."""
        if self.layout == "int-quantized" and not self.converted:
            return Tensor(files.read_array(self.words_name)[first:last], "int8")
        return super().weight(files, first, last)

    def stored_scales(self, files: SafetensorsFile, first: int, last: int) -> npt.NDArray[Any]:
        """As `GroupedMatrix.stored_scales`."""
        return self._of_rows(files.read(self.scale_name).data, first, last)

    def stored_zeros(self, files: SafetensorsFile, first: int, last: int) -> Float32:
        """As `GroupedMatrix.stored_zeros`."""
        if self.symmetric:
            return np.zeros((last - first, self.num_groups), np.float32)
        stored = files.read_array(self.module + ".weight_zero_point")
        if self._zeros_are_packed(files.infos):
            stored = unpack_zeros(stored, self.shape[0], self.bits)
        return self._of_rows(stored, first, last).astype(np.float32)

    def _of_rows(self, values: npt.NDArray[Any], first: int, last: int) -> npt.NDArray[Any]:
        """One number for each of these rows and each group."""
        if self.per_tensor:
            return np.broadcast_to(values.reshape(1, 1), (last - first, 1))
        return values.reshape(self.shape[0], -1)[first:last]
