"""Rounding matrices to int8 and int4, in NumPy, block by block so that scratch stays in cache.

`octavo.reference.quantization` says what the codes stand for, and states the rules that are
followed here plainly; the tests hold the two together.

A block is turned so that the members of a group lie along the first axis: every step is then one
operation over long contiguous rows, and sums over a group are sums of rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.models.spec import UNIFORM_LEVELS, WeightFormat
from octavo.reference.quantization import dequantize, pack_int4, unpack_int4
from octavo.weights.tensor import float32_to_bf16

Float32 = npt.NDArray[np.float32]

_BLOCK = 1 << 17  # elements of a block: half a MiB an array
_MAX_THREADS = 8
# Scales tried for a group, as what the largest magnitude becomes. 8 is the end of the side with
# eight levels, 7 of the other; beyond them the largest magnitudes are cut off, and below them
# the steps are coarser. The best lies between for most groups.
_LONG_SIDE = (6.5, 7.0, 7.25, 7.5, 7.75, 8.0, 8.3, 8.6, 9.0, 9.5, 10.0)
_SHORT_SIDE = (6.4, 6.7, 7.0, 7.3, 7.6, 8.0)
# Of levels that are not uniform: by which part of the long side's end, and of the short side's, the
# largest magnitude lies beyond it.
_LONG_STRETCHES = (0.8, 0.85, 0.9, 0.94, 0.97, 1.0, 1.04, 1.08, 1.13, 1.2, 1.28)
_SHORT_STRETCHES = (0.85, 0.9, 0.94, 0.97, 1.0, 1.04, 1.08, 1.13)
# Of an asymmetric group, which part of its range is covered.
_SHRINKS = (1.03, 1.0, 0.97, 0.93, 0.89, 0.84, 0.78, 0.7)
_REFINEMENTS = 2
_LEAST_SHARE = 1e-8
_HALF_STEPS = 256  # from 0 to beyond the largest level
_SMALLEST = np.float32(1e-30)  # a scale whose reciprocal is surely finite


@dataclass(frozen=True)
class QuantizedMatrix:
    """Codes as the native core takes them.

    codes: int8 (outputs, inputs), or uint8 (outputs, inputs / 2) with two int4 codes a byte.
    scales: float32 (outputs, groups), every one a bfloat16 number: a directory stores them so.
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
    least squares. A group that holds a NaN or an infinity gets a NaN for its scale. num_threads:
    None takes the cores that this process may use, at most eight. importance: float32 (inputs,),
    how much each input's squared errors count in the search; None: all the same.
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
        found, scale, zero = _round_block(block, format, method, counts)
        codes[rows] = pack_int4(np.ascontiguousarray(found.T).reshape(count, inputs))
        scales[rows] = scale.reshape(count, groups)
        if zeros is not None and zero is not None:
            zeros[rows] = zero.reshape(count, groups)

    threads = _usable_cores() if num_threads is None else num_threads
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        for _ in pool.map(work, _row_blocks(outputs, inputs)):
            pass
    return QuantizedMatrix(codes, scales, zeros)


def _shares(importance: Float32, group_size: int) -> Float32:
    """How much the errors of each member of each group of a row count: (members, groups)."""
    largest = float(importance.max())
    if not np.isfinite(largest) or importance.min() < 0:
        raise ValueError("importance holds a number below 0, or one not finite")
    largest = largest or 1.0  # no input is ever anything but 0: all count alike
    # No input counts as nothing: it would leave its weights to chance.
    relative = np.maximum(importance / np.float32(largest), np.float32(_LEAST_SHARE))
    return np.ascontiguousarray(relative.reshape(-1, group_size).T)


def _usable_cores() -> int:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(count or 1, _MAX_THREADS)


def _row_blocks(outputs: int, inputs: int) -> Iterator[slice]:
    rows = max(1, _BLOCK // inputs)
    for start in range(0, outputs, rows):
        yield slice(start, min(outputs, start + rows))


def _bf16(values: Float32) -> Float32:
    """Rounded to bfloat16, as a directory will store it; 1 in place of what is next to nothing."""
    rounded = (float32_to_bf16(values).astype(np.uint32) << 16).view(np.float32)
    return np.where(np.abs(rounded) < _SMALLEST, np.float32(1), rounded).astype(np.float32)


def _round_int8(weight: Float32) -> QuantizedMatrix:
    codes = np.empty(weight.shape, np.int8)
    scales = np.empty((weight.shape[0], 1), np.float32)
    for rows in _row_blocks(*weight.shape):
        block = weight[rows]
        largest = np.max(np.abs(block), axis=1, keepdims=True)
        bad = ~np.isfinite(largest)
        scale = _bf16(np.where(bad, 0, largest) / np.float32(127))
        steps = np.rint(np.where(bad, np.float32(0), block) / scale)
        codes[rows] = np.clip(steps, -127, 127).astype(np.int8)
        scales[rows] = np.where(bad, np.float32(np.nan), scale)
    return QuantizedMatrix(codes, scales)


def _round_block(
    x: Float32, format: WeightFormat, method: str, shares: Float32 | None
) -> tuple[npt.NDArray[np.uint8], Float32, Float32 | None]:
    """x, shares: (members, groups).

    Returns codes, 0 to 15, (members, groups), scales and zeros (groups,).
    """
    high, low = x.max(axis=0), x.min(axis=0)
    bad = ~np.isfinite(high - low)
    if bad.any():
        x = np.where(bad, np.float32(0), x)
        high, low = np.where(bad, 0, high), np.where(bad, 0, low)
    uniform = format.levels == UNIFORM_LEVELS
    fit = _Fit(x, shares) if uniform else _LevelFit(x, shares, format.levels)
    if isinstance(fit, _LevelFit):
        _try_levels(fit, low, high, method)
    elif format.has_zeros:
        _try_asymmetric(fit, np.minimum(low, 0), np.maximum(high, 0), method)
    else:
        _try_symmetric(fit, low, high, method)
    if method != "rtn":
        for _ in range(_REFINEMENTS):
            fit.refine()
    scales = fit.scale
    if isinstance(fit, _LevelFit):  # no level is 0: what is next to nothing needs a scale of 0
        nothing = np.maximum(-low, high) < _SMALLEST * np.abs(fit.levels).max()
        scales = np.where(nothing, 0, scales)
    scales = np.where(bad, np.float32(np.nan), scales).astype(np.float32)
    return fit.codes(), scales, fit.zero if format.has_zeros else None


def _try_symmetric(fit: _Fit, low: Float32, high: Float32, method: str) -> None:
    if method == "rtn":
        fit.set(np.maximum(-low, high) / np.float32(7.5))
        return
    # A scale below zero turns the group around, so that its longer side has the eight levels.
    extreme = np.where(-low > high, low, high)
    for steps in _LONG_SIDE:
        fit.offer(extreme / np.float32(-steps))
    for steps in _SHORT_SIDE:
        fit.offer(extreme / np.float32(steps))


def _try_levels(fit: _LevelFit, low: Float32, high: Float32, method: str) -> None:
    first, last = fit.levels[0], fit.levels[-1]
    extreme = np.where(-low > high, low, high)
    # A scale below zero where it takes one to lay the longer side of the group on that of levels.
    if method == "rtn":
        fit.set(extreme / (first if -first > last else last))
        return
    for stretch in _LONG_STRETCHES:
        fit.offer(extreme / (first * np.float32(stretch)))
    for stretch in _SHORT_STRETCHES:
        fit.offer(extreme / (last * np.float32(stretch)))


def _try_asymmetric(fit: _Fit, low: Float32, high: Float32, method: str) -> None:
    if method == "rtn":
        scale = _bf16((high - low) / np.float32(15))
        fit.set(scale, np.clip(np.rint(-8 - low / scale), -8, 7))
        return
    for shrink in _SHRINKS:
        scale = _bf16((high - low) * np.float32(shrink / 15))
        # The range shrinks about its middle.
        middle = (high + low) / scale / 2
        for zero in (np.floor(-0.5 - middle), np.ceil(-0.5 - middle)):
            fit.offer(scale, np.clip(zero, -8, 7))


class _Fit:
    """The best scale and zero of each group so far.

    x: (members, groups); shares: the same, how much each squared error counts, or None: 1 each.
    """

    def __init__(self, x: Float32, shares: Float32 | None) -> None:
        self.x = x
        self._shares = shares
        self._roots = None if shares is None else np.sqrt(shares)
        self.scale = np.ones(x.shape[1], np.float32)
        self.zero = np.zeros(x.shape[1], np.float32)
        self.error = np.full(x.shape[1], np.inf, np.float32)
        self._scratch = np.empty_like(x)

    def nearest(self, scale: Float32, zero: Float32) -> Float32:
        """The nearest levels, in scratch memory that the next call overwrites."""
        out: Float32 = np.multiply(self.x, np.float32(1) / scale, out=self._scratch)
        np.rint(out, out=out)
        np.add(out, zero, out=out)
        np.clip(out, -8, 7, out=out)
        return out

    def codes(self) -> npt.NDArray[np.uint8]:
        """The codes, 0 to 15, by the best scale and zero."""
        steps = self.nearest(self.scale, self.zero)
        codes: npt.NDArray[np.uint8] = np.add(steps, np.float32(8), out=steps).astype(np.uint8)
        return codes

    def set(self, scale: Float32, zero: npt.NDArray[Any] | None = None) -> None:
        """Take a scale and zero without comparing."""
        self.scale = _bf16(scale)
        if zero is not None:
            self.zero = zero.astype(np.float32)

    def offer(self, scale: Float32, zero: npt.NDArray[Any] | None = None) -> None:
        """Take a scale and zero where their squared error is smaller."""
        scale = _bf16(scale)
        zero = np.zeros_like(scale) if zero is None else zero.astype(np.float32)
        off = self.nearest(scale, zero)
        np.subtract(off, zero, out=off)
        np.multiply(off, scale, out=off)
        np.subtract(off, self.x, out=off)
        if self._roots is not None:
            np.multiply(off, self._roots, out=off)
        error = np.einsum("ij,ij->j", off, off)
        better = error < self.error
        np.copyto(self.error, error, where=better)
        np.copyto(self.scale, scale, where=better)
        np.copyto(self.zero, zero, where=better)

    def refine(self) -> None:
        """Offer the scale that fits the present codes best, by least squares."""
        steps = self.nearest(self.scale, self.zero)
        np.subtract(steps, self.zero, out=steps)
        weighted = steps if self._shares is None else steps * self._shares
        squares = np.einsum("ij,ij->j", weighted, steps)
        product = np.einsum("ij,ij->j", weighted, self.x)
        fitted = product / np.where(squares > 0, squares, 1)
        self.offer(np.where(squares > 0, fitted, self.scale).astype(np.float32), self.zero)


class _LevelFit(_Fit):
    """The same for levels of their own, whole numbers in ascending order.

    The middle between two of them is a multiple of 1/2, so that every number of
    [n / 2, (n + 1) / 2) has the same nearest level: a table over n finds it.
    """

    def __init__(self, x: Float32, shares: Float32 | None, levels: Sequence[int]) -> None:
        super().__init__(x, shares)
        self.levels = np.array(levels, np.float32)
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        halves = np.arange(-_HALF_STEPS, _HALF_STEPS + 1, dtype=np.float32) / 2
        self._codes = np.searchsorted(middles, halves, side="right").astype(np.uint8)
        self._values = self.levels[self._codes]
        self._places = np.empty(x.shape, np.intp)

    def nearest(self, scale: Float32, zero: Float32) -> Float32:
        """The nearest levels (the upper of two equally near), in scratch memory."""
        return self._values.take(self._find(scale), out=self._scratch, mode="clip")

    def codes(self) -> npt.NDArray[np.uint8]:
        """The codes, 0 to 15, by the best scale."""
        found: npt.NDArray[np.uint8] = self._codes.take(self._find(self.scale), mode="clip")
        return found

    def _find(self, scale: Float32) -> npt.NDArray[np.intp]:
        """Places in the tables."""
        out = np.multiply(self.x, np.float32(2) / scale, out=self._scratch)
        np.floor(out, out=out)
        np.add(out, np.float32(_HALF_STEPS), out=out)
        np.clip(out, 0, 2 * _HALF_STEPS, out=out)
        np.copyto(self._places, out, casting="unsafe")
        return self._places
