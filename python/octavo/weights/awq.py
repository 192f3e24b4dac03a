"""Checkpoints of AWQ (Lin et al. 2024) in the packing "gemm", as AutoAWQ writes them.

Of a matrix M of (outputs, inputs) with groups of consecutive inputs:

    M.qweight  int32 (inputs, outputs / 8)   eight outputs in a word
    M.qzeros   int32 (groups, outputs / 8)   the same, zero points from 0 to 15
    M.scales   float (groups, outputs)

Nibble j of a word, from the lowest, is output 8 * word + (0, 2, 4, 6, 1, 3, 5, 7)[j]. A weight is
(code - zero) * scale. Source: AutoAWQ 0.2.9, awq/utils/packing_utils.py (`dequantize_gemm`) and
awq/modules/linear/gemm.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.models.fields import Fields
from octavo.weights.grouped import Bytes, Float32, GroupedMatrix, nibbles
from octavo.weights.safetensors import SafetensorsFile
from octavo.weights.stored import CONVERTED, FLOATS, Entry, Infos

_OUTPUT_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
_NO_ZEROS = 0x88888888  # every zero point is 8, the middle


@dataclass(frozen=True)
class AwqMatrix(GroupedMatrix):
    """A matrix in the packing "gemm"."""

    @property
    def label(self) -> str:
        """As `StoredMatrix.label`."""
        return f"AWQ, 4 bits, {self.grouping}"

    @property
    def scale_name(self) -> str:
        """As `GroupedMatrix.scale_name`."""
        return self.module + ".scales"

    @property
    def codes_names(self) -> tuple[str, ...]:
        """As `StoredMatrix.codes_names`."""
        return (self.module + ".qweight",)

    def entries(self, infos: Infos) -> dict[str, Entry]:
        """As `StoredMatrix.entries`."""
        outputs, inputs = self.shape
        return {
            self.module + ".qweight": Entry(("I32",), ((inputs, outputs // 8),)),
            self.module + ".qzeros": Entry(("I32",), ((self.num_groups, outputs // 8),)),
            self.scale_name: Entry(FLOATS, ((self.num_groups, outputs),)),
        }

    def has_zero_points(self, files: SafetensorsFile) -> bool:
        """As `GroupedMatrix.has_zero_points`."""
        words = files.read_array(self.module + ".qzeros").view(np.uint32)
        return bool(np.any(words != _NO_ZEROS))

    def packed(self, files: SafetensorsFile, first: int, last: int) -> Bytes:
        """As `GroupedMatrix.packed`; an odd number of inputs gets a last one of 0."""
        begin, end = first // 8, -(-last // 8)
        words = files.read_array(self.module + ".qweight")[:, begin:end]
        if len(words) % 2:
            words = np.concatenate([words, np.zeros_like(words[:1])])
        raw = np.ascontiguousarray(words).view(np.uint8)  # (inputs, 4 bytes a word)
        result = np.empty((8 * (end - begin), len(raw) // 2), np.uint8)
        even, odd = raw[0::2], raw[1::2]
        # Input 2k in the low half of a byte, 2k + 1 in the high half; byte b of a word holds
        # nibbles 2b and 2b + 1. One pass a byte keeps the scratch at an eighth of the matrix.
        for byte in range(4):
            this, next = even[:, byte::4], odd[:, byte::4]
            result[_OUTPUT_OF_NIBBLE[2 * byte] :: 8] = ((this & 15) | (next << 4)).T
            result[_OUTPUT_OF_NIBBLE[2 * byte + 1] :: 8] = ((this >> 4) | (next & 0xF0)).T
        return result[first - 8 * begin : last - 8 * begin]

    def stored_scales(self, files: SafetensorsFile, first: int, last: int) -> npt.NDArray[Any]:
        """As `GroupedMatrix.stored_scales`."""
        scales: npt.NDArray[Any] = files.read_array(self.scale_name)
        of_rows: npt.NDArray[Any] = scales[:, first:last].T
        return of_rows

    def stored_zeros(self, files: SafetensorsFile, first: int, last: int) -> Float32:
        """As `GroupedMatrix.stored_zeros`."""
        words = files.read_array(self.module + ".qzeros")
        fields = nibbles(words).reshape(len(words), -1, 8)
        zeros = np.empty(fields.shape, np.float32)
        zeros[:, :, _OUTPUT_OF_NIBBLE] = fields
        found: Float32 = zeros.reshape(len(words), -1)[:, first:last].T - np.float32(8)
        return found


def read_awq(fields: Fields, module: str, shape: tuple[int, int]) -> AwqMatrix:
    """The matrix as the configuration says. fields: quantization_config, or AutoAWQ's older file.

    Raises UnsupportedModelError with the field that octavo does not read.
    """
    values = fields.values
    version = values.get("version", values.get("format", "gemm"))
    if not isinstance(version, str) or version.lower() != "gemm":
        name = "version" if "version" in values else "format"
        raise fields.error(name, version, "'gemm' (AutoAWQ can write the model in it)")
    fields.refuse_unless("backend", ("auto", "autoawq", "legacy_awq"), "'autoawq'")
    bits = "bits" if "bits" in values else "w_bit"
    if fields.integer(bits, 1, 16, default=4) != 4:
        raise fields.error(bits, values[bits], "4")
    size = read_group_size(
        fields, "q_group_size" if "q_group_size" in values else "group_size", shape
    )
    outputs, inputs = shape
    if inputs % size or outputs % 8:
        has = f"{module} has {inputs} inputs and {outputs} outputs"
        expected = f"a divisor of the inputs, with a multiple of 8 outputs; {has}"
        raise fields.error("group_size", size, expected)
    format = AwqMatrix(module, shape, CONVERTED, group_size=size)
    has_zeros = fields.boolean("zero_point", True)
    return AwqMatrix(
        module, shape, format.running_format(has_zeros, format.groups()), group_size=size
    )


def read_group_size(fields: Fields, name: str, shape: tuple[int, int]) -> int:
    """The group size of a matrix of (outputs, inputs); -1 stands for a whole row."""
    size = fields.integer(name, -1, 2**20, default=128)
    if size == 0:
        raise fields.error(name, size, "-1 (a whole row), or 1 or more inputs")
    return shape[1] if size == -1 else size
