"""Quantized weights: what the codes of each format stand for, and products with them.

A quantized matrix (outputs, inputs) is a matrix of small whole numbers, the codes, and a scale
for each output (int8) or for each group of consecutive inputs of each output (int4, and int8 in
groups). `dequantize` computes the weights from them. `octavo.models.spec.WeightFormat` says which
format it is.

The activations x of such a product become whole numbers too, of 16 bits, with a scale a row. Then
a product is an exact sum of whole numbers, with the same bits in any order. That loses no more
than bfloat16 activations do, while 8 bits would cost SmolLM2-135M ten times as much as rounding
its weights does (`activation_bits` 8 does this, where it is asked for).

For weights in groups there is a second definition, `grouped_activations` "bf16": x is rounded to
bfloat16 and the weights are not rounded. The CPU's instruction set amx computes this one, all its
others "whole" (`octavo._native.grouped_activations` tells). AMX's tiles multiply bytes 64 inputs at
a time, bfloat16 numbers 32. With bytes, groups of 32 inputs would fill half of a step and need two
passes: a third of the speed. Codes, and levels less zero points, are exact in bfloat16, and so is
each product in float32. Rounding activations to bfloat16 costs SmolLM2-135M a mean KL of 1e-4,
while its weights in int4 cost 0.066 or more. (On CUDA, activations are bfloat16 or float16
throughout, and are not rounded again for quantized weights.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.models.spec import UNIFORM_LEVELS, WeightFormat
from octavo.reference.ops import Array, Float32, linear, round_to_bf16

Codes = npt.NDArray[np.integer[Any]]

OPS = ("quantized_linear", "quantized_embed")
GROUPED_ACTIVATIONS = ("whole", "bf16")


def dequantize(
    codes: Codes, scales: Float32, format: WeightFormat, zeros: Float32 | None = None
) -> Float32:
    """The numbers that the codes stand for.

    codes: (outputs, inputs), int8 from -128 to 127, or int4 from 0 to 15, one an element; scales
    and zeros: float32 (outputs, groups). int8: code * scale. int4: (levels[code] - zero) * scale.
    Returns float32 (outputs, inputs).
    """
    groups = np.arange(codes.shape[1]) // (format.group_size or codes.shape[1])
    values = codes.astype(np.float32)
    if format.dtype == "int4":
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
    *,
    grouped_activations: str = "whole",
) -> Array:
    """x, rounded as `rounded_product` says, times the dequantized matrix, plus bias.

    x: (rows, inputs); codes as the native core takes them: int8 (outputs, inputs), or int4 packed
    by `pack_int4`. grouped_activations: "whole", or "bf16". Returns (rows, outputs).

    The native core sums blocks of at most 512 inputs of one group: whole numbers exactly, rounding
    to float32 only when it adds up blocks (csrc/cpu/kernels/linear_integer.h); bfloat16 numbers in
    float32, and then adds each block's sum times its group's scale.
    """
    if format.dtype == "int4":
        codes = unpack_int4(codes)[:, : x.shape[1]]
    weight = dequantize(codes, scales, format, zeros)
    return rounded_product(x, weight, bias, format, grouped_activations=grouped_activations)


def quantized_embed(
    token_ids: Array,
    width: int,
    codes: Codes,
    scales: Float32,
    format: WeightFormat,
    zeros: Float32 | None = None,
) -> Float32:
    """Rows of a dequantized table: (tokens, width). codes: as for `quantized_linear`."""
    if format.dtype == "int4":
        codes = unpack_int4(codes)[:, :width]
    return dequantize(codes, scales, format, zeros)[token_ids]


def rounded_product(
    x: Array,
    weight: Float32,
    bias: Array | None,
    format: WeightFormat,
    *,
    grouped_activations: str = "whole",
) -> Array:
    """x, rounded as a matrix of `format` asks, times the numbers that its codes stand for.

    x is rounded to whole numbers, row by row (`round_activations`); for weights in groups with
    `grouped_activations` "bf16" to bfloat16 instead. x: (rows, inputs); weight: (outputs, inputs),
    not rounded; bias: (outputs,). Returns (rows, outputs), in the type of x.
    """
    check_grouped_activations(grouped_activations)
    if format.is_grouped and grouped_activations == "bf16":
        return linear(round_to_bf16(x), weight, bias)
    steps, step = round_activations(x, format.activation_bits)
    y: Array = linear(steps.astype(x.dtype), weight) * step
    return y if bias is None else y + bias.astype(x.dtype, copy=False)


def check_grouped_activations(given: str) -> None:
    """Raises ValueError for a value that is not in GROUPED_ACTIVATIONS."""
    if given not in GROUPED_ACTIVATIONS:
        raise ValueError(f"grouped_activations is {given!r}; expected one of {GROUPED_ACTIVATIONS}")


def round_activations(x: Array, bits: int = 16) -> tuple[npt.NDArray[np.int16], Array]:
    """Each row as whole numbers times a scale, which makes its largest magnitude the limit.

    The limit is 127 for 8 bits and 127 * 256 + 127 for 16, so that a number is 256 * high + low
    with two signed bytes. A row of (almost) zeros has scale 0, one that holds a NaN or an infinity
    scale NaN; both have numbers 0. x: (rows, width). Returns int16 (rows, width) and (rows, 1).
    """
    limit = np.float32(127 if bits == 8 else 127 * 256 + 127)
    values = x.astype(np.float32)
    largest = np.max(np.abs(values), axis=1, keepdims=True)
    usable = np.isfinite(largest) & (largest >= np.float32(2.0**-100))
    safe = np.where(usable, largest, 1).astype(np.float32)
    steps = np.clip(np.rint(np.where(usable, values, 0) * (limit / safe)), -limit, limit)
    scale = np.where(usable, safe / limit, np.where(np.isfinite(largest), 0, np.nan))
    return steps.astype(np.int16), scale.astype(x.dtype)


def round_to_int8(weight: Float32, group_size: int = 0) -> tuple[npt.NDArray[np.int8], Float32]:
    """Round to nearest: 127 steps of the largest magnitude, the scale in bfloat16.

    Of each output, or of each group of inputs, if there is a group size; it divides the inputs.
    One that holds a NaN or an infinity has a NaN for its scale, and zeros for its codes.
    weight: (outputs, inputs). Returns codes, int8 (outputs, inputs), and scales (outputs, groups).
    """
    groups = weight.reshape(len(weight), -1, group_size or weight.shape[1])
    largest = np.max(np.abs(groups), axis=2, keepdims=True)
    scales = round_to_bf16((largest / np.float32(127)).astype(np.float32))
    scales = np.where(np.isfinite(largest), np.where(scales > 0, scales, 1), np.nan)
    scales = scales.astype(np.float32)
    codes = np.nan_to_num(np.clip(np.rint(groups / scales), -127, 127)).astype(np.int8)
    return codes.reshape(weight.shape), scales[:, :, 0]


def round_to_int4(
    weight: Float32, format: WeightFormat
) -> tuple[npt.NDArray[np.uint8], Float32, Float32 | None]:
    """Round to nearest: the scale spans each group's largest magnitude.

    Non-uniform levels: the largest magnitude becomes the level of largest magnitude, with a scale
    below zero where their signs differ; of two equally near levels the upper one is taken; a group
    of weights near zero gets scale 0, since no level is 0.
    Uniform levels, -8 to 7, symmetric: fifteen steps from the largest magnitude to its opposite.
    Asymmetric: fifteen steps from the group's least to its greatest weight; 0 is always within
    this range and always a level.
    Scales are rounded to bfloat16 before codes are chosen.

    weight: (outputs, inputs), inputs a multiple of the group. Returns codes, uint8 from 0 to 15,
    (outputs, inputs); scales (outputs, groups); zeros (outputs, groups), or None.
    """
    outputs, inputs = weight.shape
    groups = weight.reshape(outputs, -1, format.group_size)
    if format.levels != UNIFORM_LEVELS:
        return *_round_to_levels(groups, np.array(format.levels)), None
    low, high = np.minimum(groups.min(axis=2), 0), np.maximum(groups.max(axis=2), 0)
    span = high - low if format.has_zeros else 2 * np.maximum(-low, high)
    scales = round_to_bf16((span / 15).astype(np.float32)).astype(np.float32)
    scales = np.where(scales > 0, scales, 1).astype(np.float32)
    zeros = np.clip(np.rint(-8 - low / scales), -8, 7) if format.has_zeros else None
    # A product with the reciprocal, not a quotient: the rounding that production code can afford.
    steps = np.rint(groups * (1 / scales).astype(np.float32)[:, :, None])
    steps = steps if zeros is None else steps + zeros[:, :, None]
    codes = (np.clip(steps, -8, 7) + 8).astype(np.uint8).reshape(outputs, inputs)
    return codes, scales, None if zeros is None else zeros.astype(np.float32)


def _round_to_levels(
    groups: Float32, levels: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.uint8], Float32]:
    """groups: (outputs, groups, members). Returns codes (outputs, inputs), scales."""
    places = np.abs(groups).argmax(axis=2)[:, :, None]
    largest = np.take_along_axis(groups, places, axis=2)[:, :, 0]
    furthest = np.float32(levels[np.abs(levels).argmax()])
    scales = round_to_bf16((largest / furthest).astype(np.float32)).astype(np.float32)
    nothing = np.abs(largest) < np.float32(1e-30) * np.abs(furthest)
    scales = np.where(nothing, 0, scales).astype(np.float32)
    inverse = (1 / np.where(nothing, 1, scales)).astype(np.float32)
    steps = groups * inverse[:, :, None]
    distances = np.abs(steps[..., None].astype(np.float64) - levels[::-1])
    codes = (15 - distances.argmin(axis=3)).astype(np.uint8)
    return codes.reshape(len(groups), -1), scales


def pack_int32(values: Codes, bits: int) -> npt.NDArray[np.int32]:
    """Signed whole numbers in 32-bit words, as a `compressed-tensors` file holds them.

    Element i of a row lies in word i // (32 / bits), the first in the lowest bits, with
    2^(bits - 1) added so that it is never negative; the last word is filled up with zero bits.
    values: (rows, width) from -2^(bits-1) to 2^(bits-1) - 1; bits: 4 or 8.
    Returns (rows, ceil(width * bits / 32)).
    """
    per_word = 32 // bits
    rows, width = values.shape
    padded = np.zeros((rows, -(-width // per_word) * per_word), dtype=np.uint32)
    padded[:, :width] = values.astype(np.int64) + (1 << (bits - 1))
    words = np.zeros((rows, padded.shape[1] // per_word), dtype=np.uint32)
    for place in range(per_word):
        words |= padded[:, place::per_word] << np.uint32(place * bits)
    return words.view(np.int32)


def unpack_int32(words: npt.NDArray[np.int32], bits: int, width: int) -> npt.NDArray[np.int8]:
    """What `pack_int32` packed: (rows, words) -> (rows, width)."""
    per_word = 32 // bits
    unsigned = words.view(np.uint32)
    values = np.empty((words.shape[0], words.shape[1] * per_word), dtype=np.int8)
    for place in range(per_word):
        part = (unsigned >> np.uint32(place * bits)) & np.uint32((1 << bits) - 1)
        values[:, place::per_word] = part.astype(np.int32) - (1 << (bits - 1))
    return values[:, :width]


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
