"""Checkpoints in FP8 (e4m3), in the spellings of four writers.

Of a matrix M of (outputs, inputs):

    M.weight            float8_e4m3fn (outputs, inputs)
    M.weight_scale_inv  or M.weight_scale: one number, one an output, or one a block of outputs and
                        inputs (ceil(outputs / 128), ceil(inputs / 128)); float, or e8m0 powers of 2

A weight is value * scale, also where the scale is called `inv`. Scales of activations may lie
beside them (input_scale, activation_scale, input_scale_ub); octavo does not round activations to
FP8, so it does not need them. No kernel of octavo multiplies FP8, so the weights become bfloat16:
value * scale in float32, rounded once, as transformers does where it has no kernel either.

Sources: transformers 5.24, integrations/finegrained_fp8.py (`Fp8Dequantize`) and
integrations/fbgemm_fp8.py; compressed-tensors 0.20, compressors/naive_quantized/base.py; the type
itself: Micikevicius et al. 2022, "FP8 formats for deep learning".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from octavo.models.fields import Fields
from octavo.weights.safetensors import SafetensorsFile
from octavo.weights.stored import CONVERTED, FLOATS, Entry, Infos, StoredMatrix, convert_rows
from octavo.weights.tensor import Tensor

Float32 = npt.NDArray[np.float32]
_SCALES = ("weight_scale_inv", "weight_scale")
_OF_ACTIVATIONS = ("input_scale", "activation_scale", "input_scale_ub")


def e4m3_values() -> Float32:
    """The numbers that the 256 bytes stand for: 4 bits of exponent (bias 7), 3 of mantissa.

    There are no infinities; the two bytes with all these bits set are NaN.
    """
    codes = np.arange(256)
    exponents, mantissas = (codes >> 3) & 15, (codes & 7) / 8
    values = np.where(exponents > 0, 1 + mantissas, mantissas) * 2.0 ** (
        np.maximum(exponents, 1) - 7.0
    )
    values = np.where(codes & 127 == 127, np.nan, values)
    return np.where(codes > 127, -values, values).astype(np.float32)


def e8m0_values() -> Float32:
    """Powers of two: byte b is 2^(b - 127), and 255 is NaN."""
    values = 2.0 ** (np.arange(256) - 127.0)
    return np.where(np.arange(256) == 255, np.nan, values).astype(np.float32)


@dataclass(frozen=True)
class Float8Matrix(StoredMatrix):
    """A matrix in FP8. block: (outputs, inputs) that share a scale; None: all, or all of an output.

    method: the writer's name, for people.
    """

    block: tuple[int, int] | None = None
    method: str = "FP8"

    @property
    def label(self) -> str:
        """As `StoredMatrix.label`."""
        kind = "scales a tensor or an output"
        if self.block is not None:
            kind = f"blocks of {self.block[0]} x {self.block[1]}"
        return f"FP8, {kind}"

    def scale_name(self, infos: Infos) -> str:
        """The tensor of the scales: the one of the two names that the files have."""
        names = [f"{self.module}.{name}" for name in _SCALES]
        return next((name for name in names if name in infos), names[self.block is None])

    def entries(self, infos: Infos) -> dict[str, Entry]:
        """As `StoredMatrix.entries`."""
        outputs, inputs = self.shape
        shapes: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1), (outputs, 1), (outputs,))
        if self.block is not None:
            shapes = ((-(-outputs // self.block[0]), -(-inputs // self.block[1])),)
        beside = {
            f"{self.module}.{name}": Entry(FLOATS, ((), (1,), (1, 1)), optional=True)
            for name in _OF_ACTIVATIONS
        }
        return {
            self.module + ".weight": Entry(("F8_E4M3",), (self.shape,)),
            self.scale_name(infos): Entry((*FLOATS, "F8_E8M0"), shapes),
            **beside,
        }

    def settled(self, files: SafetensorsFile) -> Float8Matrix:
        """As `StoredMatrix.settled`: nothing is left to decide."""
        return self

    def weight(self, files: SafetensorsFile, first: int, last: int) -> Tensor:
        """As `StoredMatrix.weight`."""
        scales = self._scales(files)
        block_rows, block_columns = self.block or (
            self.shape[0] if len(scales) == 1 else 1,
            self.shape[1],
        )
        codes = files.read_array(self.module + ".weight")
        values = e4m3_values()

        def decode(row: int, end: int) -> Float32:
            factors = scales[np.arange(row, end) // block_rows]
            if scales.shape[1] > 1:
                factors = np.repeat(factors, block_columns, axis=1)[:, : self.shape[1]]
            decoded: Float32 = np.take(values, codes[row:end])
            decoded *= factors
            return decoded

        return convert_rows(first, last, self.shape[1], decode)

    def _scales(self, files: SafetensorsFile) -> Float32:
        """float32 (1 or outputs, 1), or (blocks of outputs, blocks of inputs)."""
        name = self.scale_name(files.infos)
        if files.infos[name].dtype == "F8_E8M0":
            scales = e8m0_values()[files.read_array(name)]
        else:
            scales = files.read(name).to_float32()
        found: Float32 = scales.reshape(-1, 1) if self.block is None else scales
        return found


def read_fp8(fields: Fields, module: str, shape: tuple[int, int]) -> Float8Matrix:
    """The matrix of quant_method "fp8" or "fbgemm_fp8" as the configuration says.

    Raises UnsupportedModelError with the field that octavo does not read.
    """
    fields.refuse_unless("fmt", ("e4m3",), "'e4m3'")
    fields.refuse_unless("expert_dtype", ("fp8",), "'fp8'")
    fields.refuse_unless("activation_scheme", ("dynamic", "static"), "'dynamic' or 'static'")
    block = fields.values.get("weight_block_size")
    return Float8Matrix(
        module, shape, CONVERTED, block=None if block is None else read_block(fields, block)
    )


def read_block(fields: Fields, value: object, name: str = "weight_block_size") -> tuple[int, int]:
    """[outputs, inputs] of a block; compressed-tensors once wrote "128x128"."""
    sizes: object = value
    if isinstance(value, str):
        sizes = [int(size) if size.isascii() and size.isdigit() else 0 for size in value.split("x")]
    if not isinstance(sizes, list) or len(sizes) != 2:
        raise fields.error(name, value, "two whole numbers, [128, 128]")
    rows, columns = sizes
    if not all(type(size) is int and 0 < size <= 2**20 for size in sizes):
        raise fields.error(name, value, "two whole numbers above 0, [128, 128]")
    return rows, columns
