"""Blocks of GGUF that become octavo's int8 in groups of 32: codes of 8 bits with a float16 scale.

d and m are float16 numbers of a block, s and t whole numbers of a part of 32 or 16 of its numbers:

    type    a number is             parts   scale of a group          difference
    Q8_0    d * code                32      d                         none
    Q5_0    d * (code - 16)         32      d                         none
    Q6_K    d * s * (code - 32)     16      the larger d * s, / 4     an 8th of the larger step
    Q3_K    d * s * (code - 4)      16      the larger d * s, / 32    a 64th of the larger step
    Q5_1    d * code + m            32      its largest / 127         an 8th of a step
    Q5_K    d * s * code - m * t    32      its largest / 127         an 8th of a step
    Q2_K    d * s * code - m * t    16      its largest / 127         an 80th of the larger step
    others  (the package gguf)              its largest / 127         half of a scale

Two parts of 16 share a scale. For Q6_K and Q3_K it makes whole numbers, 4 or 32 times the file's,
of the part with the larger step d * s, which so keeps its numbers but for the rounding of the scale
to float16 (2^-12 of a number); those of the other part go to the nearest. (With scales of opposite
signs, one number of the other part may be twice as far off: 128 is no code.) Where a minimum puts 0
outside of a group's numbers, the scale and the difference are larger in proportion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from octavo.models.spec import WeightFormat
from octavo.weights.gguf_blocks import (
    GROUP,
    BlockFormat,
    Bytes,
    Codes,
    Float32,
    read_halves,
    view_halves,
)
from octavo.weights.gguf_nibbles import read_q4_k

ROUNDED = "rounded to 8 bits in groups of 32"
_FORMAT = WeightFormat("int8", GROUP, scale_dtype="f16")
_PLACES = np.arange(0, 8, 2, dtype=np.uint8)[:, None]  # of four codes of 2 bits in a byte


class Numbers(NamedTuple):
    """Numbers of blocks: step * code + offset, or code * step in types without offsets.

    codes: int8 (blocks, inputs), from `least` to `greatest`. steps, offsets: (blocks, parts); steps
    are float16 where scales are the file's.
    """

    codes: npt.NDArray[np.int8]
    least: int
    greatest: int
    steps: npt.NDArray[Any]
    offsets: Float32 | None = None


@dataclass(frozen=True)
class ByteFormat(BlockFormat):
    """A type whose codes have at most 8 bits. read: (blocks, bytes) -> `Numbers`."""

    read: Callable[[Bytes], Numbers]

    def convert(self, blocks: Bytes) -> Codes:
        """As `BlockFormat.convert`."""
        numbers = self.read(blocks)
        return _round(numbers) if self.difference else Codes(numbers.codes, numbers.steps)


@dataclass(frozen=True)
class DecodedFormat(BlockFormat):
    """A type that the package gguf decodes to floats, a few blocks at a time."""

    kind: str

    def convert(self, blocks: Bytes) -> Codes:
        """As `BlockFormat.convert`."""
        import gguf

        values = gguf.dequantize(blocks, gguf.GGMLQuantizationType[self.kind])
        groups = np.ascontiguousarray(values, np.float32).reshape(len(blocks), -1, GROUP)
        scales, inverse = _scales(np.abs(groups).max(axis=2) / np.float32(127))
        return Codes(_to_codes(groups * inverse[:, :, None]).reshape(len(blocks), -1), scales)


def _round(numbers: Numbers) -> Codes:
    """The nearest codes, with scales that are chosen as the table above says."""
    steps, offsets = numbers.steps, numbers.offsets
    count, parts = steps.shape
    groups = numbers.codes.shape[1] // GROUP
    together = (count, groups, parts // groups)
    if offsets is None:
        of_group = steps.reshape(together)
        first = np.abs(of_group).argmax(axis=2)[:, :, None]
        larger = np.take_along_axis(of_group, first, axis=2)[:, :, 0]
        scales, inverse = _scales(larger * np.float32(-numbers.least / 128))
    else:
        ends = (offsets + steps * np.float32(end) for end in (numbers.least, numbers.greatest))
        farthest = np.maximum(*map(np.abs, ends)).reshape(together).max(axis=2)
        scales, inverse = _scales(farthest / np.float32(127))
    size = numbers.codes.shape[1] // parts
    inverse = np.repeat(inverse, parts // groups, axis=1)
    values = np.multiply(numbers.codes, np.repeat(steps * inverse, size, axis=1), dtype=np.float32)
    if offsets is not None:
        values += np.repeat(offsets * inverse, size, axis=1)
    return Codes(_to_codes(values), scales)


def _scales(wanted: Float32) -> tuple[npt.NDArray[np.float16], Float32]:
    """Scales in float16, and what numbers are multiplied by to become codes: 0 for a scale of 0."""
    scales = wanted.astype(np.float16)
    usable = (scales != 0) & np.isfinite(scales)
    return scales, np.where(usable, 1 / scales.astype(np.float32), 0).astype(np.float32)


def _to_codes(values: Float32) -> npt.NDArray[np.int8]:
    """The nearest whole numbers; `values` is changed. Numbers that are none become 0."""
    np.rint(values, out=values)
    np.clip(values, -128, 127, out=values)
    if not np.isfinite(values.sum()):
        np.nan_to_num(values, copy=False)
    return values.astype(np.int8)


def _read_q8_0(blocks: Bytes) -> Numbers:
    return Numbers(blocks[:, 2:].view(np.int8), -128, 127, view_halves(blocks, 0))


def _fives(low: Bytes, high: Bytes) -> npt.NDArray[np.int8]:
    """Codes of 5 bits. low: (blocks, 16), lower halves first; high: (blocks, 4), a bit each."""
    codes = np.concatenate((low & 15, low >> 4), axis=1)
    codes |= np.unpackbits(high, axis=1, bitorder="little") << np.uint8(4)
    return codes.view(np.int8)


def _read_q5_0(blocks: Bytes) -> Numbers:
    codes = _fives(blocks[:, 6:], blocks[:, 2:6]) - np.int8(16)
    return Numbers(codes, -16, 15, view_halves(blocks, 0))


def _read_q5_1(blocks: Bytes) -> Numbers:
    codes = _fives(blocks[:, 8:], blocks[:, 4:8])
    return Numbers(codes, 0, 31, read_halves(blocks, 0), read_halves(blocks, 2))


def _twos(low: Bytes) -> Bytes:
    """(blocks, 64), codes of 2 bits, in each half 32 inputs a place -> (blocks, 2, 4, 32)."""
    codes: Bytes = low.reshape(-1, 2, 1, 32) >> _PLACES & np.uint8(3)
    return codes


def _read_q2_k(blocks: Bytes) -> Numbers:
    """16 bytes of a scale and a minimum each; codes; float16 d and dmin."""
    codes = _twos(blocks[:, 16:80]).reshape(len(blocks), -1).view(np.int8)
    steps = read_halves(blocks, 80) * (blocks[:, :16] & 15)
    offsets = read_halves(blocks, 82) * (blocks[:, :16] >> 4) * np.float32(-1)
    return Numbers(codes, 0, 3, steps, offsets)


def _read_q3_k(blocks: Bytes) -> Numbers:
    """32 bytes of third bits; codes; 12 bytes of scales of 6 bits; float16 d.

    The first eight bytes of scales have the lower halves of scales i and i + 8, the last four the
    upper two bits of scales i, i + 4, i + 8 and i + 12.
    """
    upper = blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    codes = _twos(blocks[:, 32:96]).reshape(-1, 8, 32) | upper << np.uint8(2)
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    scales = np.concatenate((low & 15, low >> 4), axis=1)
    scales |= (high[:, None, :] >> _PLACES & np.uint8(3)).reshape(-1, 16) << np.uint8(4)
    steps = read_halves(blocks, 108) * (scales.astype(np.float32) - np.float32(32))
    return Numbers((codes - np.uint8(4)).view(np.int8).reshape(len(blocks), -1), -4, 3, steps)


def _read_q5_k(blocks: Bytes) -> Numbers:
    """As Q4_K, with 32 bytes of fifth bits, of one group in each place, before the codes."""
    low = blocks[:, 48:].reshape(-1, 4, 1, 32) >> np.array([[0], [4]], np.uint8) & np.uint8(15)
    upper = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    codes = low.reshape(-1, 8, 32) | upper << np.uint8(4)
    return Numbers(codes.reshape(len(blocks), -1).view(np.int8), 0, 31, *read_q4_k(blocks))


def _read_q6_k(blocks: Bytes) -> Numbers:
    """128 bytes of lower halves; 64 of upper two bits; 16 scales, int8; float16 d."""
    low = blocks[:, :128].reshape(-1, 2, 1, 64) >> np.array([[0], [4]], np.uint8) & np.uint8(15)
    codes = low.reshape(-1, 2, 4, 32) | _twos(blocks[:, 128:192]) << np.uint8(4)
    steps = read_halves(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return Numbers((codes - np.uint8(32)).view(np.int8).reshape(len(blocks), -1), -32, 31, steps)


def _decoded() -> dict[str, BlockFormat]:
    sizes = {"TQ1_0": 54, "TQ2_0": 66, "IQ1_S": 50, "IQ1_M": 56, "IQ2_XXS": 66, "IQ2_XS": 74}
    sizes |= {"IQ2_S": 82, "IQ3_XXS": 98, "IQ3_S": 110}
    return {kind: DecodedFormat(_FORMAT, ROUNDED, size, 256, kind) for kind, size in sizes.items()}


_rounded: Callable[..., BlockFormat] = partial(ByteFormat, _FORMAT, ROUNDED)

BYTE_FORMATS: Mapping[str, BlockFormat] = MappingProxyType(
    {
        "Q8_0": ByteFormat(_FORMAT, "", 34, 32, _read_q8_0, native="Q8_0"),
        "Q5_0": ByteFormat(_FORMAT, "", 22, 32, _read_q5_0),
        "Q5_1": _rounded(24, 32, _read_q5_1),
        "Q2_K": _rounded(84, 256, _read_q2_k),
        "Q3_K": _rounded(110, 256, _read_q3_k),
        "Q5_K": _rounded(176, 256, _read_q5_k, native="Q5_K"),
        "Q6_K": _rounded(210, 256, _read_q6_k, native="Q6_K"),
        **_decoded(),
    }
)
"""By the type's name."""
