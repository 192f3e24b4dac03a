"""Scales and zero points for groups of weights, judged by what their rounding errors cost.

Where `rounding.py` weighs the errors of all inputs alike, the cost of a group's errors e is here
e^T M e: M says how strongly each input of the group is driven, and which are driven together.
Matrices lie turned, (inputs, outputs): a group is then a band of long contiguous rows, and every
step one operation over it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from octavo.models.spec import UNIFORM_LEVELS, WeightFormat
from octavo.weights.tensor import float32_to_bf16

Float32 = npt.NDArray[np.float32]

# Scales tried, by where the group's greatest magnitude comes to lie: 1 is the last level of the
# longer side, then of the shorter one. Beyond 1 the greatest magnitudes are cut off.
_LONG_SIDE = (0.81, 0.875, 0.906, 0.938, 0.969, 1.0, 1.04, 1.08, 1.13, 1.19, 1.25)
_SHORT_SIDE = (0.914, 0.957, 1.0, 1.04, 1.086, 1.14)
# Of an asymmetric group, which part of its range is covered.
_SHRINKS = (1.03, 1.0, 0.97, 0.93, 0.89, 0.84, 0.78, 0.7)
_REFINEMENTS = 2
_SMALLEST = np.float32(1e-30)  # a scale whose reciprocal is surely finite


class Grid:
    """Rounding to the levels of an int4 format."""

    def __init__(self, format: WeightFormat) -> None:
        self.format = format
        self.has_zeros = format.has_zeros
        self._levels = np.array(format.levels, np.float32)
        self._middles = (self._levels[1:] + self._levels[:-1]) / 2
        self._uniform = format.levels == UNIFORM_LEVELS

    def steps(
        self, values: Float32, scale: Float32, zero: Float32 | None, out: Float32 | None = None
    ) -> Float32:
        """The nearest levels, less the zero point: a weight is then step * scale.

        values: (inputs, outputs); scale, zero: (outputs,) or what broadcasts. Returns the shape
        of values.
        """
        out = np.multiply(values, np.float32(1) / scale, out=out)
        if zero is not None:
            np.add(out, zero, out=out)
        if self._uniform:
            np.rint(out, out=out)
            np.clip(out, self._levels[0], self._levels[-1], out=out)
        else:
            out[...] = self._levels[np.searchsorted(self._middles, out)]
        return out if zero is None else np.subtract(out, zero, out=out)

    def codes(self, steps: Float32, zeros: Float32 | None) -> npt.NDArray[np.uint8]:
        """Codes 0 to 15 of steps; zeros: of the same shape, or None."""
        levels: Float32 = steps if zeros is None else steps + zeros
        if self._uniform:
            levels = levels - self._levels[0]
            return levels.astype(np.uint8)
        found: npt.NDArray[np.uint8] = np.searchsorted(self._middles, levels).astype(np.uint8)
        return found

    def search(self, weight: Float32, metric: Float32) -> tuple[Float32, Float32 | None]:
        """The scale (and zero point) of the least cost, of some twenty.

        The best of them is fitted to its steps by least squares, twice.
        weight: (group, outputs). metric: M as (group, group), or its diagonal (group,).
        Returns scales, bfloat16 numbers, and zero points (outputs,).
        """
        fit = _Fit(self, weight, metric)
        for scale, zero in self._candidates(weight):
            fit.offer(scale, zero)
        for _ in range(_REFINEMENTS):
            fit.refine()
        return fit.scale, fit.zero

    def _candidates(self, weight: Float32) -> Iterator[tuple[Float32, Float32 | None]]:
        high, low = weight.max(axis=0), weight.min(axis=0)
        if not self.has_zeros:
            # A scale below zero turns the group around: its longer side gets the longer levels.
            extreme = np.where(-low > high, low, high)
            for part in _LONG_SIDE:
                yield to_scale(extreme / (self._levels[0] * np.float32(part))), None
            for part in _SHORT_SIDE:
                yield to_scale(extreme / (self._levels[-1] * np.float32(part))), None
            return
        high, low = np.maximum(high, 0), np.minimum(low, 0)
        for shrink in _SHRINKS:
            scale = to_scale((high - low) * np.float32(shrink / 15))
            middle = (high + low) / scale / 2  # the range shrinks about it
            for zero in (np.floor(-0.5 - middle), np.ceil(-0.5 - middle)):
                yield scale, np.clip(zero, -8, 7).astype(np.float32)


def to_scale(values: npt.NDArray[np.floating]) -> Float32:
    """Rounded to bfloat16, as a directory will store it; 1 in place of what is next to nothing."""
    bits = float32_to_bf16(np.ascontiguousarray(values, np.float32)).astype(np.uint32)
    rounded = (bits << np.uint32(16)).view(np.float32)
    result: Float32 = np.where(np.abs(rounded) < _SMALLEST, np.float32(1), rounded)
    return result


class _Fit:
    """The best scale and zero point of each group of a band so far."""

    def __init__(self, grid: Grid, weight: Float32, metric: Float32) -> None:
        outputs = weight.shape[1]
        self._grid, self._weight, self._metric = grid, weight, metric
        self.scale = np.ones(outputs, np.float32)
        self.zero = np.zeros(outputs, np.float32) if grid.has_zeros else None
        self._cost = np.full(outputs, np.inf, np.float32)
        self._scratch = np.empty_like(weight)
        self._other = np.empty_like(weight)

    def offer(self, scale: Float32, zero: Float32 | None) -> None:
        """Take a scale and zero where they cost less."""
        error = self._grid.steps(self._weight, scale, zero, self._scratch)
        np.multiply(error, scale, out=error)
        np.subtract(error, self._weight, out=error)
        cost = np.einsum("ij,ij->j", error, self._driven(error))
        better = cost < self._cost
        np.copyto(self._cost, cost, where=better)
        np.copyto(self.scale, scale, where=better)
        if self.zero is not None and zero is not None:
            np.copyto(self.zero, zero, where=better)

    def refine(self) -> None:
        """Offer the scale that fits the present steps best."""
        steps = self._grid.steps(self._weight, self.scale, self.zero, self._scratch)
        driven = self._driven(steps)
        squares = np.einsum("ij,ij->j", steps, driven)
        product = np.einsum("ij,ij->j", self._weight, driven)
        usable = squares > _SMALLEST
        fitted = product / np.where(usable, squares, np.float32(1))
        self.offer(to_scale(np.where(usable, fitted, self.scale)), self.zero)

    def _driven(self, values: Float32) -> Float32:
        if self._metric.ndim == 1:
            return np.multiply(values, self._metric[:, None], out=self._other)
        return np.matmul(self._metric, values, out=self._other)
