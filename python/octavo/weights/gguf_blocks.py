"""Blocks of a GGUF file as octavo's codes: what all types have in common, and the loop over blocks.

A block has a few float16 numbers, in some types whole numbers that they are multiplied by, and
codes (layouts: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml). Types whose
codes have 4 bits become int4 (`gguf_nibbles`), all others int8 in groups of 32 (`gguf_bytes`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from octavo.models.spec import WeightFormat

Bytes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

GROUP = 32
_CHUNK = 1 << 17  # bytes of blocks converted in one go: they and their results stay in cache
_SHARE = 1 << 19  # bytes of blocks that a thread takes: a task for each chunk would cost more


class Codes(NamedTuple):
    """A matrix as codes.

    codes: int8 (rows, inputs), or uint8 (rows, inputs / 2), two int4 codes a byte. scales: (rows,
    groups), float16 or float32 as the format has them. zeros: float32 (rows, groups), or None.
    """

    codes: npt.NDArray[Any]
    scales: npt.NDArray[Any]
    zeros: Float32 | None = None


@dataclass(frozen=True)
class BlockFormat(ABC):
    """How the blocks of a GGUF type become codes in groups of 32.

    format: octavo's. difference: of the numbers from those of the file, for people; "" for none.
    block_bytes, inputs: of a block. native: its name, where the native core has it, too: it gives
    the bits of `convert` in a fraction of the time.
    """

    format: WeightFormat
    difference: str
    block_bytes: int
    inputs: int
    native: str = field(default="", kw_only=True)

    @abstractmethod
    def convert(self, blocks: Bytes) -> Codes:
        """Blocks, (blocks, bytes), as a matrix of which each is a row.

        NaNs and infinities among the numbers of a damaged file show in the scales; zero points are
        always valid.
        """


def convert_blocks(raw: Bytes, source: BlockFormat, pool: Executor | None = None) -> Codes:
    """Rows of a matrix as codes, in shares on the threads of `pool`.

    raw: (rows, bytes of a row), whole blocks of `source`.
    """
    num_rows = len(raw)
    blocks = raw.reshape(-1, source.block_bytes)
    groups = source.inputs // GROUP
    dtype = np.float16 if source.format.scale_dtype == "f16" else np.float32
    is_int8 = source.format.dtype == "int8"
    codes = np.empty((len(blocks), source.inputs // (1 if is_int8 else 2)), np.uint8)
    found = Codes(
        codes.view(np.int8) if is_int8 else codes,
        np.empty((len(blocks), groups), dtype),
        np.empty((len(blocks), groups), np.float32) if source.format.has_zeros else None,
    )
    step = max(1, _CHUNK // source.block_bytes)

    def convert(begin: int, end: int) -> None:
        if source.native:
            from octavo import _native

            codes, scales = (each[begin:end].view(np.uint8) for each in found[:2])
            zeros = None if found.zeros is None else found.zeros[begin:end]
            _native.convert_gguf_blocks(source.native, blocks[begin:end], codes, scales, zeros)
            return
        for first in range(begin, end, step):
            part = slice(first, min(first + step, end))
            with np.errstate(all="ignore"):  # the numbers of a damaged block may be anything
                values = source.convert(blocks[part])
            copy_rows(found.codes[part], values.codes)
            found.scales[part] = values.scales
            if found.zeros is not None:
                found.zeros[part] = values.zeros

    shares = max(1, raw.nbytes // _SHARE)
    ends = [len(blocks) * k // shares for k in range(shares + 1)]
    for _ in (pool.map if pool else map)(convert, ends, ends[1:]):
        pass
    zeros = None if found.zeros is None else found.zeros.reshape(num_rows, -1)
    return Codes(found.codes.reshape(num_rows, -1), found.scales.reshape(num_rows, -1), zeros)


def copy_rows(to: npt.NDArray[Any], rows: npt.NDArray[Any]) -> None:
    """to = rows. Both (rows, bytes), numbers of a byte; whole rows are copied, not bytes."""
    if rows.strides[1] != 1:
        to[...] = rows
        return
    row = f"V{rows.shape[1]}"
    to.view(row)[...] = rows.view(row)


def view_halves(blocks: Bytes, first: int) -> npt.NDArray[np.float16]:
    """The float16 number at byte `first`, an even one, of each block: (blocks, 1), a view."""
    return np.ascontiguousarray(blocks).view("<f2")[:, first // 2 : first // 2 + 1]


def read_halves(blocks: Bytes, first: int) -> Float32:
    """`view_halves` in float32."""
    return view_halves(blocks, first).astype(np.float32)
