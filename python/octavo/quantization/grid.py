"""Rounding groups of weights to the levels of int4: scales and zero points by search.

Members of a group lie along the first axis, groups along the second: every step is then one
operation over long contiguous rows, and sums over a group are sums of rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from octavo import _native
from octavo.models.spec import UNIFORM_LEVELS, WeightFormat
from octavo.weights.tensor import float32_to_bf16

Float32 = npt.NDArray[np.float32]

# Scales tried for a group: each number is the value that the largest magnitude gets. -8 is the end
# of the side with eight levels, 7 of the other; beyond them the largest magnitudes are cut off, and
# below them the steps are coarser. For most groups the best is between.
_UNIFORM_ENDS = (
    *(-6.5, -7.0, -7.25, -7.5, -7.75, -8.0, -8.3, -8.6, -9.0, -9.5, -10.0),
    *(6.4, 6.7, 7.0, 7.3, 7.6, 8.0),
)
# Of levels that are not uniform: by which part of the long side's end, and of the short side's, the
# largest magnitude lies beyond it.
_LONG_STRETCHES = (0.8, 0.85, 0.9, 0.94, 0.97, 1.0, 1.04, 1.08, 1.13, 1.2, 1.28)
_SHORT_STRETCHES = (0.85, 0.9, 0.94, 0.97, 1.0, 1.04, 1.08, 1.13)
# Of an asymmetric group, which part of its range is covered.
_SHRINKS = (1.03, 1.0, 0.97, 0.93, 0.89, 0.84, 0.78, 0.7)
_REFINEMENTS = 2
_HALF_STEPS = 256  # from 0 to beyond the largest level
SMALLEST = np.float32(1e-30)  # a scale whose reciprocal is finite


def to_scale(values: npt.NDArray[np.floating]) -> Float32:
    """Rounded to bfloat16, as a directory stores it; 1 in place of values near zero."""
    bits = float32_to_bf16(np.ascontiguousarray(values, np.float32)).astype(np.uint32)
    rounded = (bits << np.uint32(16)).view(np.float32)
    result: Float32 = np.where(np.abs(rounded) < SMALLEST, np.float32(1), rounded)
    return result


class Grid:
    """The levels of an int4 format.

    The middle between two non-uniform levels is a multiple of 1/2, so all numbers of
    [n / 2, (n + 1) / 2) have the same nearest level: a table over n gives it.
    """

    def __init__(self, format: WeightFormat) -> None:
        self.has_zeros = format.has_zeros
        self.is_uniform = format.levels == UNIFORM_LEVELS
        self.levels = np.array(format.levels, np.float32)
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        halves = np.arange(-_HALF_STEPS, _HALF_STEPS + 1, dtype=np.float32) / 2
        self._nearest = self.levels[np.searchsorted(middles, halves, side="right")]
        self._codes = np.zeros(256, np.uint8)
        self._codes[self.levels.astype(np.intp) + 128] = np.arange(16)

    def steps(
        self, values: Float32, scale: Float32, zero: Float32 | None, out: Float32 | None = None
    ) -> Float32:
        """The nearest levels, less the zero point: a weight is then step * scale.

        values: (members, groups); scale, zero: (groups,), or a shape that broadcasts. Of two levels
        equally near, the even one, or the upper one where levels are not uniform. Returns values'
        shape.
        """
        if self.is_uniform:
            out = np.multiply(values, np.float32(1) / scale, out=out)
            np.rint(out, out=out)
            if zero is not None:
                np.add(out, zero, out=out)
            np.clip(out, self.levels[0], self.levels[-1], out=out)
            return out if zero is None else np.subtract(out, zero, out=out)
        out = np.multiply(values, np.float32(2) / scale, out=out)
        np.floor(out, out=out)
        np.add(out, np.float32(_HALF_STEPS), out=out)
        np.clip(out, 0, 2 * _HALF_STEPS, out=out)
        return self._nearest.take(out.astype(np.intp), out=out, mode="clip")

    def codes(self, steps: Float32, zeros: Float32 | None) -> npt.NDArray[np.uint8]:
        """Codes 0 to 15 of steps; zeros: a shape that broadcasts to theirs, or None."""
        levels = steps if zeros is None else steps + zeros
        found: npt.NDArray[np.uint8] = self._codes.take(levels.astype(np.intp) + 128, mode="clip")
        return found

    def search(
        self,
        x: Float32,
        *,
        shares: Float32 | None = None,
        metric: Float32 | None = None,
        plain: bool = False,
    ) -> tuple[Float32, Float32 | None]:
        """The scale (and zero point) with the least cost, of some twenty.

        The best of them is fitted to its steps by least squares, twice. x: (members, groups). A
        group's errors e cost e^T e; with shares, which broadcast to x, each squared error is
        weighted by its share; with metric M, (members, members), they cost e^T M e. plain: no
        search, the scale just spans the largest magnitude. Returns bfloat16 scales and zero points
        (groups,). `search_natively` finds the same without a metric, several times as fast.
        """
        low, high = x.min(axis=0), x.max(axis=0)
        if plain:
            return self._span(low, high)
        fit = _Fit(self, x, shares, metric)
        if self.has_zeros:
            low, high = np.minimum(low, 0), np.maximum(high, 0)
            for part in self.candidates():
                scale = to_scale((high - low) * part)
                middle = (high + low) / scale / 2  # the range shrinks around it
                for zero in (np.floor(-0.5 - middle), np.ceil(-0.5 - middle)):
                    fit.offer(scale, np.clip(zero, -8, 7).astype(np.float32))
        else:
            # A negative scale turns the group around: its longer side gets the longer levels.
            extreme = np.where(-low > high, low, high)
            for end in self.candidates():
                fit.offer(to_scale(extreme / end), None)
        for _ in range(_REFINEMENTS):
            fit.refine()
        return fit.scale, fit.zero

    def search_natively(
        self, x: Float32, shares: Float32 | None = None
    ) -> tuple[Float32, Float32 | None]:
        """`search` in the native core; shares: of x's shape.

        Of candidates that cost the same but for rounding, NumPy may take another on some machines.
        """
        levels = [] if self.is_uniform else self.levels.tolist()
        candidates = [float(candidate) for candidate in self.candidates()]
        return _native.search_scales(x, candidates, levels, self.has_zeros, shares)

    def candidates(self) -> list[np.float32]:
        """The values that the largest magnitude of a group may get.

        With zero points: which parts of the group's range a step may be.
        """
        if self.has_zeros:
            return [np.float32(shrink / 15) for shrink in _SHRINKS]
        if self.is_uniform:
            return [np.float32(end) for end in _UNIFORM_ENDS]
        first, last = self.levels[0], self.levels[-1]
        ends = [first * np.float32(stretch) for stretch in _LONG_STRETCHES]
        return ends + [last * np.float32(stretch) for stretch in _SHORT_STRETCHES]

    def _span(self, low: Float32, high: Float32) -> tuple[Float32, Float32 | None]:
        if self.has_zeros:
            low, high = np.minimum(low, 0), np.maximum(high, 0)
            scale = to_scale((high - low) / np.float32(15))
            return scale, np.clip(np.rint(-8 - low / scale), -8, 7).astype(np.float32)
        if self.is_uniform:
            return to_scale(np.maximum(-low, high) / np.float32(7.5)), None
        # Negative where the group's longer side is not on the side of the levels' longer one.
        longer = self.levels[0] if -self.levels[0] > self.levels[-1] else self.levels[-1]
        return to_scale(np.where(-low > high, low, high) / longer), None


class _Fit:
    """The best scale and zero point of each group so far; arguments as in `Grid.search`."""

    def __init__(
        self, grid: Grid, x: Float32, shares: Float32 | None, metric: Float32 | None
    ) -> None:
        groups = x.shape[1]
        self._grid, self._x, self._shares, self._metric = grid, x, shares, metric
        self._roots = None if shares is None else np.sqrt(shares)
        self.scale = np.ones(groups, np.float32)
        self.zero = np.zeros(groups, np.float32) if grid.has_zeros else None
        self._cost = np.full(groups, np.inf, np.float32)
        self._scratch, self._other = np.empty_like(x), np.empty_like(x)

    def offer(self, scale: Float32, zero: Float32 | None) -> None:
        """Take a scale and zero for the groups in which they cost less."""
        error = self._grid.steps(self._x, scale, zero, self._scratch)
        np.multiply(error, scale, out=error)
        np.subtract(error, self._x, out=error)
        if self._roots is not None:
            np.multiply(error, self._roots, out=error)
        driven = error if self._metric is None else self._driven(error)
        cost = np.einsum("ij,ij->j", error, driven)
        better = cost < self._cost
        np.copyto(self._cost, cost, where=better)
        np.copyto(self.scale, scale, where=better)
        if self.zero is not None and zero is not None:
            np.copyto(self.zero, zero, where=better)

    def refine(self) -> None:
        """Offer the scale that fits the present steps best, by least squares."""
        steps = self._grid.steps(self._x, self.scale, self.zero, self._scratch)
        driven = self._driven(steps)
        squares = np.einsum("ij,ij->j", driven, steps)
        product = np.einsum("ij,ij->j", driven, self._x)
        usable = squares > 0
        fitted = product / np.where(usable, squares, np.float32(1))
        self.offer(to_scale(np.where(usable, fitted, self.scale)), self.zero)

    def _driven(self, values: Float32) -> Float32:
        if self._metric is not None:
            return np.matmul(self._metric, values, out=self._other)
        if self._shares is not None:
            return np.multiply(values, self._shares, out=self._other)
        return values
