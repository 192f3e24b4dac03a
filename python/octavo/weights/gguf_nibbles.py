"""Blocks of GGUF whose codes have 4 bits as octavo's int4, with no floats between.

d is a block's float16 number, s a whole number that it is multiplied by in some types:

    format    a number is               octavo's int4, in groups of 32                  difference
    Q4_0      d * (code - 8)            levels -8 to 7, scale d                         none
    IQ4_NL    d * table[code]           levels: the table, scale d                      none
    IQ4_XS    d * s * table[code]       levels: the table, scale d * s                  none
    Q4_1      d * code + m              levels 16 * code - 120, scale d / 16,           d / 32
                                        zero point round(-16 m / d) - 120
    Q4_K      d * s * code - dmin * m   as Q4_1, with d * s for d and -dmin * m for m   d * s / 32

octavo's zero points are whole numbers, so an offset that is no whole number of steps has no zero
point. With levels that lie 16 apart it is at most half of a sixteenth of a step away from one. Zero
points go from -120 to 120, which is enough for every group with 0 between its least and its
greatest number. A group without it is rounded again, to 16 numbers between 0 and the one that is
farthest from 0. If all of its numbers are the same it stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from octavo.models.spec import UNIFORM_LEVELS, WeightFormat
from octavo.weights.gguf_blocks import (
    GROUP,
    BlockFormat,
    Bytes,
    Codes,
    Float32,
    copy_rows,
    read_halves,
    view_halves,
)

FINE_LEVELS = tuple(range(-120, 121, 16))
# llama.cpp's kvalues_iq4nl.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_LARGEST_ZERO = 120
FINE_DIFFERENCE = "within a 32nd of a step"


class Groups(NamedTuple):
    """Of blocks, by groups of 32 numbers: steps (blocks, groups), and offsets in formats with one.

    A number is step * (code or level) + offset. Steps are float16 where scales are the file's.
    """

    steps: npt.NDArray[Any]
    offsets: Float32 | None = None


@dataclass(frozen=True)
class NibbleFormat(BlockFormat):
    """A type with codes of 4 bits.

    run: bytes of codes whose lower halves come before their upper halves; the codes are the last of
    a block. read_groups: (blocks, bytes) -> `Groups`.
    """

    run: int
    read_groups: Callable[[Bytes], Groups]

    def convert(self, blocks: Bytes) -> Codes:
        """As `BlockFormat.convert`."""
        codes = np.empty((len(blocks), self.inputs // 2), np.uint8)
        _pair_halves(blocks[:, self.block_bytes - self.inputs // 2 :], self.run, codes)
        found = self.read_groups(blocks)
        if found.offsets is None:
            return Codes(codes, found.steps)
        return Codes(codes, *_place_zeros(found, found.offsets, codes))


def _pair_halves(codes: Bytes, run: int, out: Bytes) -> None:
    """From ggml's order of codes to octavo's, two neighbours a byte.

    codes: (blocks, bytes); of each run of bytes, the lower halves are its first codes and the upper
    halves the ones after them. out: of the same shape.
    """
    together = np.empty(codes.shape, np.uint8)
    copy_rows(together, codes)
    words = together.view("<u2").reshape(-1)
    halves = out.reshape(-1, 2, run // 2)
    for half in range(2):
        fours = words >> np.uint16(4 * half)
        fours &= np.uint16(0x0F0F)
        fours |= fours >> np.uint16(4)
        # The lower byte of each word.
        copy_rows(halves[:, half], fours.astype(np.uint8).reshape(-1, run // 2))


def _place_zeros(groups: Groups, offsets: Float32, codes: Bytes) -> tuple[Float32, Float32]:
    """Scales and zero points, float32 (blocks, groups). `codes` of some groups are changed."""
    steps = groups.steps
    exact = np.float32(-16) * offsets / steps - np.float32(_LARGEST_ZERO)
    zeros = np.rint(exact)
    scales = steps / np.float32(16)
    others = ~(np.abs(exact) <= np.float32(_LARGEST_ZERO + 0.5))  # or no number
    if others.any():
        of_groups = codes.reshape(*steps.shape, GROUP // 2)
        scales[others], zeros[others], of_groups[others] = _round_again(
            steps[others], offsets[others], of_groups[others]
        )
    return scales, np.clip(zeros, -_LARGEST_ZERO, _LARGEST_ZERO)


def _round_again(steps: Float32, offsets: Float32, packed: Bytes) -> tuple[Float32, Float32, Bytes]:
    """Scales, zero points and codes of groups whose numbers have one sign, or are all the same.

    steps, offsets: (groups,); packed: (groups, 16).
    """
    codes = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)
    values = steps[:, None] * codes + offsets[:, None]
    low, high = np.minimum(values.min(axis=1), 0), np.maximum(values.max(axis=1), 0)
    wider = ((high - low) / np.float32(15)).astype(np.float32)
    places = np.rint((values - low[:, None]) / wider[:, None])
    scales = wider / np.float32(16)
    zeros = np.where(low < 0, np.float32(_LARGEST_ZERO), np.float32(-_LARGEST_ZERO))
    # All the same: level 8, so that the scale is exact.
    same = steps == 0
    places[same], zeros[same], scales[same] = 8, 0, offsets[same] / np.float32(8)
    usable = np.isfinite(scales) & np.isfinite(places).all(axis=1)
    scales[~usable & np.isfinite(scales)] = 0
    places[~usable] = 0
    found = places.astype(np.uint8)
    return scales, zeros, found[:, 0::2] | found[:, 1::2] << np.uint8(4)


def _read_q4_0(blocks: Bytes) -> Groups:
    return Groups(view_halves(blocks, 0))


def _read_q4_1(blocks: Bytes) -> Groups:
    return Groups(read_halves(blocks, 0), read_halves(blocks, 2))


def _read_iq4_xs(blocks: Bytes) -> Groups:
    """float16 d; 16 bits, of which two are the upper ones of each scale; 8 lower halves; codes."""
    upper = np.ascontiguousarray(blocks[:, 2:4]).view("<u2")
    upper = upper >> np.arange(0, 16, 2, dtype=np.uint16) & np.uint16(3)
    lower = np.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), axis=-1).reshape(-1, 8)
    scales = (lower | upper << np.uint16(4)).astype(np.float32) - np.float32(32)
    return Groups(read_halves(blocks, 0) * scales)


def read_q4_k(blocks: Bytes) -> Groups:
    """float16 d and dmin; 8 scales and 8 minima of 6 bits in 12 bytes; codes.

    Bytes 0 to 3 and 4 to 7 have the first four scales and minima, and in their upper two bits those
    of the last four, whose lower four bits are in bytes 8 to 11, scales below minima.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate((first & 63, third & 15 | first >> 2 & 48), axis=1)
    minima = np.concatenate((second & 63, third >> 4 | second >> 2 & 48), axis=1)
    return Groups(read_halves(blocks, 0) * scales, read_halves(blocks, 2) * minima * np.float32(-1))


def _int4(
    *, levels: tuple[int, ...] = UNIFORM_LEVELS, scale_dtype: Literal["f16", "f32"] = "f32"
) -> WeightFormat:
    return WeightFormat("int4", GROUP, levels == FINE_LEVELS, levels, scale_dtype)


NIBBLE_FORMATS: Mapping[str, BlockFormat] = MappingProxyType(
    {
        "Q4_0": NibbleFormat(
            *(_int4(scale_dtype="f16"), "", 18, 32, 16, _read_q4_0), native="Q4_0"
        ),
        "IQ4_NL": NibbleFormat(
            *(_int4(levels=IQ4_LEVELS, scale_dtype="f16"), "", 18, 32, 16, _read_q4_0),
            native="Q4_0",  # only what the codes stand for differs
        ),
        "IQ4_XS": NibbleFormat(_int4(levels=IQ4_LEVELS), "", 136, 256, 16, _read_iq4_xs),
        "Q4_1": NibbleFormat(_int4(levels=FINE_LEVELS), FINE_DIFFERENCE, 20, 32, 16, _read_q4_1),
        "Q4_K": NibbleFormat(
            *(_int4(levels=FINE_LEVELS), FINE_DIFFERENCE, 144, 256, 32, read_q4_k), native="Q4_K"
        ),
    }
)
"""By the type's name."""
