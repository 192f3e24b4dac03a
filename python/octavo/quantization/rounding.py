"""Rounding matrices to int8 and int4, block by block so that scratch stays in cache.

In NumPy, but for the search of int4's scales, which the native core does.

`octavo.reference.quantization` defines the codes, and has the same rules in plain form; tests
compare the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.machine import usable_cores
from octavo.models.spec import UNIFORM_LEVELS, WeightFormat
from octavo.quantization.grid import SMALLEST, Float32, Grid, to_scale
from octavo.reference.quantization import dequantize, pack_int4, unpack_int4

_BLOCK = 1 << 17  # elements of a block: half a MiB an array
_LEAST_SHARE = 1e-8


@dataclass(frozen=True)
class QuantizedMatrix:
    """Codes as the native core takes them.

    codes: int8 (outputs, inputs), or uint8 (outputs, inputs / 2) with two int4 codes a byte.
    scales: float32 (outputs, groups), all bfloat16 numbers, as in a directory.
    zeros: float32 (outputs, groups), whole numbers from -8 to 7, or None.
    """

    codes: npt.NDArray[Any]
    scales: Float32
    zeros: Float32 | None = None

    def decode(self, format: WeightFormat) -> Float32:
        """The numbers that the codes stand for, (outputs, inputs)."""
        codes = unpack_int4(self.codes) if format.dtype == "int4" else self.codes
        return dequantize(codes, self.scales, format, self.zeros)


def quantize_matrix(
    weight: Float32,
    format: WeightFormat,
    method: str = "search",
    num_threads: int | None = None,
    importance: Float32 | None = None,
) -> QuantizedMatrix:
    """Round a matrix to a format.

    weight: float32 (outputs, inputs). format: int8, or int4 whose group divides inputs; zero points
    need uniform levels. method "rtn": scales that just span the largest magnitude; else scales
    (and zero points) of least squared error among some twenty, then fitted to their codes by
    least squares. A group that holds a NaN or an infinity gets a NaN scale. num_threads: None takes
    the cores that this process may use, at most eight. importance: float32 (inputs,), the weight of
    each input's squared errors in the search; None: all the same.
    """
    if format.dtype == "int8":
        return _round_int8(weight)
    if weight.shape[1] % format.group_size:
        raise ValueError(
            f"a width of {weight.shape[1]} in groups of {format.group_size}; expected a group "
            "that divides the width"
        )
    if format.levels != UNIFORM_LEVELS and format.has_zeros:
        raise ValueError("levels of their own with zero points; expected one or the other")
    grid = Grid(format)
    outputs, inputs = weight.shape
    groups = inputs // format.group_size
    codes = np.empty((outputs, inputs // 2), np.uint8)
    scales = np.empty((outputs, groups), np.float32)
    zeros = np.empty((outputs, groups), np.float32) if format.has_zeros else None

    shares = None if importance is None else _shares(importance, format.group_size)

    def work(rows: slice) -> None:
        block = np.ascontiguousarray(weight[rows].reshape(-1, format.group_size).T)
        count = len(range(*rows.indices(outputs)))
        counts = None if shares is None else np.tile(shares, (1, count))
        found, scale, zero = _round_block(block, grid, method, counts)
        codes[rows] = pack_int4(np.ascontiguousarray(found.T).reshape(count, inputs))
        scales[rows] = scale.reshape(count, groups)
        if zeros is not None and zero is not None:
            zeros[rows] = zero.reshape(count, groups)

    threads = usable_cores() if num_threads is None else num_threads
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        for _ in pool.map(work, _row_blocks(outputs, inputs)):
            pass
    return QuantizedMatrix(codes, scales, zeros)


def _shares(importance: Float32, group_size: int) -> Float32:
    """The weight of the errors of each member of each group of a row: (members, groups)."""
    largest = float(importance.max())
    if not np.isfinite(largest) or importance.min() < 0:
        raise ValueError("importance holds a number below 0, or one not finite")
    largest = largest or 1.0  # no input is ever anything but 0: all count alike
    # No input has weight 0: its weights would then be rounded at random.
    relative = np.maximum(importance / np.float32(largest), np.float32(_LEAST_SHARE))
    return np.ascontiguousarray(relative.reshape(-1, group_size).T)


def _row_blocks(outputs: int, inputs: int) -> Iterator[slice]:
    rows = max(1, _BLOCK // inputs)
    for start in range(0, outputs, rows):
        yield slice(start, min(outputs, start + rows))


def _round_int8(weight: Float32) -> QuantizedMatrix:
    codes = np.empty(weight.shape, np.int8)
    scales = np.empty((weight.shape[0], 1), np.float32)
    for rows in _row_blocks(*weight.shape):
        block = weight[rows]
        largest = np.max(np.abs(block), axis=1, keepdims=True)
        bad = ~np.isfinite(largest)
        scale = to_scale(np.where(bad, 0, largest) / np.float32(127))
        steps = np.rint(np.where(bad, np.float32(0), block) / scale)
        codes[rows] = np.clip(steps, -127, 127).astype(np.int8)
        scales[rows] = np.where(bad, np.float32(np.nan), scale)
    return QuantizedMatrix(codes, scales)


def _round_block(
    x: Float32, grid: Grid, method: str, shares: Float32 | None
) -> tuple[npt.NDArray[np.uint8], Float32, Float32 | None]:
    """x, shares: (members, groups).

    Returns codes, 0 to 15, (members, groups), scales and zeros (groups,).
    """
    bad = ~np.isfinite(x.max(axis=0) - x.min(axis=0))
    if bad.any():
        x = np.where(bad, np.float32(0), x)
    found = grid.search(x, plain=True) if method == "rtn" else grid.search_natively(x, shares)
    scale, zero = found
    codes = grid.codes(grid.steps(x, scale, zero), zero)
    if not grid.is_uniform:  # no level is 0: a group of weights near zero needs scale 0
        nothing = np.abs(x).max(axis=0) < SMALLEST * np.abs(grid.levels).max()
        scale = np.where(nothing, np.float32(0), scale)
    return codes, np.where(bad, np.float32(np.nan), scale), zero
