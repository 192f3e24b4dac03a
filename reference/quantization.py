"""Quantized weights: what the codes of each format stand for, and products with them.

A quantized matrix (outputs, inputs) is a matrix of small whole numbers, the codes, and a scale
for each output (int8) or for each group of consecutive inputs of each output (int4), with which
`dequantize` makes numbers of them. `octavo.models.spec.WeightFormat` says which format it is.

Only weights are quantized. The activations that meet them are rounded to bfloat16, as with bf16
weights, and no further: rounding them to 8 bits costs SmolLM2-135M ten times as much as rounding
its weights does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.models.spec import WeightFormat
from octavo.reference.ops import Array, Float32, linear, round_to_bf16

Codes = npt.NDArray[np.integer[Any]]

OPS = ("quantized_linear",)


def dequantize(
    codes: Codes, scales: Float32, format: WeightFormat, zeros: Float32 | None = None
) -> Float32:
    """The numbers that the codes stand for.

    codes: (outputs, inputs), int8 from -127 to 127, or int4 from 0 to 15, one an element; scales
    and zeros: float32 (outputs, groups). int8: code * scale. int4: (levels[code] - zero) * scale.
    Returns float32 (outputs, inputs).
    """
    groups = np.zeros(codes.shape[1], dtype=np.int64)
    values = codes.astype(np.float32)
    if format.dtype == "int4":
        groups = np.arange(codes.shape[1]) // format.group_size
        values = np.array(format.levels, dtype=np.float32)[codes]
        if zeros is not None:
            values = values - zeros[:, groups]
    result: Float32 = values * scales[:, groups]
    return result


def quantized_linear(
    x: Array,
    codes: Codes,
    scales: Float32,
    format: WeightFormat,
    zeros: Float32 | None = None,
    bias: Array | None = None,
) -> Array:
    """x, rounded to bfloat16, times the dequantized matrix, plus bias.

    x: (rows, inputs); codes as the native core takes them: int8 (outputs, inputs), or int4 packed
    by `pack_int4`. Returns (rows, outputs).
    """
    if format.dtype == "int4":
        codes = unpack_int4(codes)[:, : x.shape[1]]
    return linear(round_to_bf16(x), dequantize(codes, scales, format, zeros), bias)


def round_to_int8(weight: Float32) -> tuple[npt.NDArray[np.int8], Float32]:
    """Round to nearest: 127 steps of each output's largest magnitude.

    weight: (outputs, inputs). Returns codes, int8 (outputs, inputs), and scales (outputs, 1).
    """
    largest = np.max(np.abs(weight), axis=1, keepdims=True)
    scales = np.where(largest > 0, largest / np.float32(127), 1).astype(np.float32)
    codes = np.clip(np.rint(weight / scales), -127, 127).astype(np.int8)
    return codes, scales


def pack_int4(codes: Codes) -> npt.NDArray[np.uint8]:
    """Two codes (0 to 15) a byte, the first in the low half.

    codes: (outputs, inputs), inputs even. Returns (outputs, inputs / 2).
    """
    low, high = codes[:, 0::2].astype(np.uint8), codes[:, 1::2].astype(np.uint8)
    packed: npt.NDArray[np.uint8] = low | (high << np.uint8(4))
    return packed


def unpack_int4(packed: Codes) -> npt.NDArray[np.uint8]:
    """What `pack_int4` packed: (outputs, bytes) -> (outputs, 2 * bytes)."""
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), dtype=np.uint8)
    codes[:, 0::2] = packed & 15
    codes[:, 1::2] = packed >> 4
    return codes
