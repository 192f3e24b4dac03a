"""Blocks of a GGUF file as octavo's int4: codes, scales and zero points, with no floats between.

A block has a float16 number d, in some formats whole numbers s that it is multiplied by, and codes.
What becomes of the formats whose codes have 4 bits (layouts: ggml-common.h and ggml-quants.c of
https://github.com/ggml-org/ggml):

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
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from octavo.models.spec import WeightFormat

Bytes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

GROUP = 32
FINE_LEVELS = tuple(range(-120, 121, 16))
# llama.cpp's kvalues_iq4nl.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_LARGEST_ZERO = 120
_CHUNK = 1 << 17  # bytes of blocks converted in one go: they and their results stay in cache


class Groups(NamedTuple):
    """Of blocks, by groups of 32 numbers: steps (blocks, groups), and offsets in formats with one.

    A number is step * (code or level) + offset.
    """

    steps: Float32
    offsets: Float32 | None = None


@dataclass(frozen=True)
class BlockFormat:
    """How the blocks of a GGUF type become int4.

    format: octavo's. exact: whether the numbers are the same; else they are within a 32nd of a
    step. first: where the codes begin in a block. code_bytes: of a block. run: bytes of codes whose
    lower halves come before their upper halves. read_groups: (blocks, bytes) -> `Groups`.
    """

    format: WeightFormat
    exact: bool
    first: int
    code_bytes: int
    run: int
    read_groups: Callable[[Bytes], Groups]


class Codes(NamedTuple):
    """A matrix as int4: codes uint8 (rows, inputs / 2), scales and zeros float32 (rows, groups)."""

    codes: Bytes
    scales: Float32
    zeros: Float32 | None


def convert_blocks(raw: Bytes, kind: str) -> Codes:
    """Rows of a matrix as int4. raw: (rows, bytes of a row), whole blocks. kind: in BLOCK_FORMATS.

    NaNs and infinities among the scales of a damaged file stay such; zero points are always valid.
    """
    source = BLOCK_FORMATS[kind]
    num_rows = len(raw)
    block_bytes = source.first + source.code_bytes
    blocks = raw.reshape(-1, block_bytes)
    groups = 2 * source.code_bytes // GROUP
    codes = np.empty((len(blocks), source.code_bytes), np.uint8)
    scales = np.empty((len(blocks), groups), np.float32)
    zeros = np.empty_like(scales) if source.format.has_zeros else None
    step = max(1, _CHUNK // block_bytes)
    for begin in range(0, len(blocks), step):
        part = slice(begin, begin + step)
        _pair_halves(blocks[part, source.first :], source.run, codes[part])
        with np.errstate(all="ignore"):  # scales of a damaged block may be anything
            found = source.read_groups(blocks[part])
            if zeros is None or found.offsets is None:
                scales[part] = found.steps
            else:
                scales[part], zeros[part] = _place_zeros(found, found.offsets, codes[part])

    def by_rows(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values.reshape(num_rows, -1)

    return Codes(by_rows(codes), by_rows(scales), None if zeros is None else by_rows(zeros))


def _pair_halves(codes: Bytes, run: int, out: Bytes) -> None:
    """From ggml's order of codes to octavo's, two neighbours a byte.

    codes: (blocks, bytes); of each run of bytes, the lower halves are its first codes and the upper
    halves the ones after them. out: of the same shape.
    """
    words = np.ascontiguousarray(codes).view("<u2").reshape(-1, run // 2)
    halves = out.reshape(-1, 2, run // 2)
    lower = words & np.uint16(0x0F0F)
    lower |= lower >> np.uint16(4)
    np.copyto(halves[:, 0], lower, casting="unsafe")  # the lower byte of each word
    upper = words >> np.uint16(4)
    upper &= np.uint16(0x0F0F)
    upper |= upper >> np.uint16(4)
    np.copyto(halves[:, 1], upper, casting="unsafe")


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


def _halves(blocks: Bytes, first: int) -> Float32:
    """The float16 number at byte `first` of each block: (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, first : first + 2]).view("<f2").astype(np.float32)


def _read_q4_0(blocks: Bytes) -> Groups:
    return Groups(_halves(blocks, 0))


def _read_q4_1(blocks: Bytes) -> Groups:
    return Groups(_halves(blocks, 0), _halves(blocks, 2))


def _read_iq4_xs(blocks: Bytes) -> Groups:
    """float16 d; 16 bits, of which two are the upper ones of each scale; 8 lower halves; codes."""
    upper = np.ascontiguousarray(blocks[:, 2:4]).view("<u2")
    upper = upper >> np.arange(0, 16, 2, dtype=np.uint16) & np.uint16(3)
    lower = np.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), axis=-1).reshape(-1, 8)
    scales = (lower | upper << np.uint16(4)).astype(np.float32) - np.float32(32)
    return Groups(_halves(blocks, 0) * scales)


def _read_q4_k(blocks: Bytes) -> Groups:
    """float16 d and dmin; 8 scales and 8 minima of 6 bits in 12 bytes; codes.

    Bytes 0 to 3 and 4 to 7 have the first four scales and minima, and in their upper two bits those
    of the last four, whose lower four bits are in bytes 8 to 11, scales below minima.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate((first & 63, third & 15 | first >> 2 & 48), axis=1)
    minima = np.concatenate((second & 63, third >> 4 | second >> 2 & 48), axis=1)
    return Groups(_halves(blocks, 0) * scales, _halves(blocks, 2) * minima * np.float32(-1))


def _int4(*, fine: bool = False, **changes: Any) -> WeightFormat:
    if fine:
        changes = {"has_zeros": True, "levels": FINE_LEVELS}
    return WeightFormat("int4", GROUP, scale_dtype="f32", **changes)


BLOCK_FORMATS: Mapping[str, BlockFormat] = MappingProxyType(
    {
        "Q4_0": BlockFormat(_int4(), True, 2, 16, 16, _read_q4_0),
        "IQ4_NL": BlockFormat(_int4(levels=IQ4_LEVELS), True, 2, 16, 16, _read_q4_0),
        "IQ4_XS": BlockFormat(_int4(levels=IQ4_LEVELS), True, 8, 128, 16, _read_iq4_xs),
        "Q4_1": BlockFormat(_int4(fine=True), False, 4, 16, 16, _read_q4_1),
        "Q4_K": BlockFormat(_int4(fine=True), False, 16, 128, 32, _read_q4_k),
    }
)
"""Every type of GGUF that becomes codes; the others are decoded to floats."""
