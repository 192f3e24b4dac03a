"""GPTQ: rounding a matrix so that its outputs, not its weights, come out as right as can be.

Frantar et al. 2022 (arXiv 2210.17323). The outputs' squared error on the inputs x that were seen
is tr(E^T H E), with E the weights' errors and H the mean of x x^T. Inputs are rounded one by one,
and what one's error does to the outputs is made up for by those still to come: with U the upper
factor of H^-1 = U^T U, rounding input i by e changes every later input j by -e U[i,j] / U[i,i].

Here besides:

- order: groups by how strongly they are driven, and within a group the inputs likewise, so that
  those rounded last, for which no others can make up, matter least. Groups stay
  together, and the stored layout knows nothing of the order;
- a group's scale is chosen when its turn comes, of some twenty, by what its errors will cost
  once the inputs after it have made up for them: e^T M e with M^-1 = U_g^T U_g.

Matrices lie turned here, (inputs, outputs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from octavo.errors import WeightsError
from octavo.models.spec import WeightFormat
from octavo.quantization.grid import Float32, Grid
from octavo.quantization.rounding import QuantizedMatrix
from octavo.reference.quantization import pack_int4

Float64 = npt.NDArray[np.float64]

_DAMPING = 1.0  # the share of H's mean diagonal that is added to it
_BAND = 32  # inputs between two matrix products


@dataclass
class Rounded:
    """A rounded matrix: weight = step * scale of its group.

    steps: float32 (inputs, outputs), level less zero point; scales, zeros: (groups, outputs).
    """

    grid: Grid
    steps: Float32
    scales: Float32
    zeros: Float32 | None

    @property
    def group_size(self) -> int:
        return len(self.steps) // len(self.scales)

    def weights(self) -> Float32:
        """The numbers that it stands for, (inputs, outputs)."""
        return self.steps * np.repeat(self.scales, self.group_size, axis=0)

    def split(self, sizes: Sequence[int]) -> list[QuantizedMatrix]:
        """The outputs, so many to each, as the native core and the directories take them."""
        wide = None if self.zeros is None else np.repeat(self.zeros, self.group_size, axis=0)
        codes = self.grid.codes(self.steps, wide).T
        zeros = None if self.zeros is None else self.zeros.T
        ends = np.cumsum(sizes)
        rows = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        return [
            QuantizedMatrix(
                pack_int4(codes[part]),
                np.ascontiguousarray(self.scales.T[part]),
                None if zeros is None else np.ascontiguousarray(zeros[part]),
            )
            for part in rows
        ]


def round_by_search(weight: Float32, hessian: Float32, format: WeightFormat) -> Rounded:
    """Each weight to its nearest level, scales by the squared errors that H's diagonal weighs."""
    grid, size = Grid(format), format.group_size
    rounded = _empty(grid, weight.shape, size)
    driven = np.maximum(np.diag(hessian), np.float32(1e-12) * np.diag(hessian).max())
    for group in range(len(rounded.scales)):
        band = slice(group * size, (group + 1) * size)
        scale, zero = grid.search(weight[band], shares=driven[band, None])
        _set_group(rounded, group, scale, zero)
        rounded.steps[band] = grid.steps(weight[band], scale, zero)
    return rounded


def gptq(weight: Float32, hessian: Float32, format: WeightFormat) -> Rounded:
    """Round a matrix so that its outputs' error is small under H.

    weight: float32 (inputs, outputs), inputs a multiple of the group. hessian: float32 (inputs,
    inputs), the mean of x x^T. format: int4, any levels. Raises WeightsError where H holds a NaN or
    an infinity.
    """
    grid, size = Grid(format), format.group_size
    order = order_inputs(np.diag(hessian), size)
    factor = _factor(hessian[np.ix_(order, order)])
    upper = factor.astype(np.float32)
    rounded = _empty(grid, weight.shape, size)
    errors = np.empty_like(weight)  # of each input, over U[i,i], in the order of rounding
    for begin in range(0, len(weight), size):
        end, group = begin + size, int(order[begin]) // size
        values = weight[order[begin:end]]
        if begin:
            values -= upper[:begin, begin:end].T @ errors[:begin]
        own = np.linalg.inv(factor[begin:end, begin:end])
        scale, zero = grid.search(values, metric=(own @ own.T).astype(np.float32))
        _set_group(rounded, group, scale, zero)
        inner = upper[begin:end, begin:end]
        steps = _round_group(grid, values, inner, scale, zero, errors[begin:end])
        rounded.steps[order[begin:end]] = steps
    return rounded


def check_hessian(hessian: Float32) -> None:
    """Raise WeightsError where what the activations came to is no number."""
    if not np.isfinite(hessian).all():
        raise WeightsError(
            "the calibration text drove a layer's activations to NaN or infinity: the weights are "
            "damaged. Fetch or convert the model again"
        )


def damp(hessian: Float32, damping: float) -> Float64:
    """H with `damping` times its mean diagonal added to it; the identity where H is zero."""
    check_hessian(hessian)
    damped = hessian.astype(np.float64)
    damped[np.diag_indices(len(damped))] += damping * np.diag(damped).mean() or 1.0
    return damped


def inverse_factor(damped: Float64) -> Float64:
    """U, upper triangular, with U^T U the inverse of the matrix."""
    # Turned end for end, a lower factor L L^T becomes an upper one R R^T; U is R^-1.
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    return _invert_upper(np.ascontiguousarray(lower[::-1, ::-1]))


def _factor(hessian: Float32) -> Float64:
    """U of the damped H; where rounding has left H too uneven to factor, damped the more."""
    damping = _DAMPING
    while True:
        try:
            return inverse_factor(damp(hessian, damping))
        except np.linalg.LinAlgError:
            damping *= 10  # by 1, the diagonal outweighs whatever rounding may have done


def _invert_upper(matrix: Float64) -> Float64:
    """The inverse of an upper triangular matrix, by halves: products do nearly all the work."""
    size = len(matrix)
    if size <= 64:
        return np.asarray(np.linalg.inv(matrix), np.float64)
    half = size // 2
    out = np.zeros_like(matrix)
    out[:half, :half] = _invert_upper(matrix[:half, :half])
    out[half:, half:] = _invert_upper(matrix[half:, half:])
    out[:half, half:] = -out[:half, :half] @ (matrix[:half, half:] @ out[half:, half:])
    return out


def order_inputs(driven: npt.NDArray[np.floating], group_size: int) -> npt.NDArray[np.int64]:
    """Which input is rounded when; driven: H's diagonal, (inputs,)."""
    groups = driven.reshape(-1, group_size)
    order = [
        group * group_size + np.argsort(-groups[group], kind="stable")
        for group in np.argsort(-groups.sum(axis=1), kind="stable")
    ]
    return np.concatenate(order)


def _round_group(
    grid: Grid, values: Float32, upper: Float32, scale: Float32, zero: Float32 | None, out: Float32
) -> Float32:
    """Round one group, input by input; `values` is changed, the errors go to `out`."""
    steps = np.empty_like(values)
    for begin in range(0, len(values), _BAND):
        end = min(begin + _BAND, len(values))
        if begin:
            values[begin:end] -= upper[:begin, begin:end].T @ out[:begin]
        for i in range(begin, end):
            grid.steps(values[i], scale, zero, steps[i])
            error = out[i]
            np.multiply(steps[i], scale, out=error)
            np.subtract(values[i], error, out=error)
            error *= np.float32(1) / upper[i, i]
            if i + 1 < end:
                values[i + 1 : end] -= upper[i, i + 1 : end, None] * error
    return steps


def errors_under(error: Float32, hessian: Float32) -> Float32:
    """diag(E^T H E): each output's mean squared error. error: (inputs, outputs)."""
    result: Float32 = np.einsum("ij,ij->j", error, hessian @ error)
    return result


def _empty(grid: Grid, shape: tuple[int, ...], group_size: int) -> Rounded:
    groups = (shape[0] // group_size, shape[1])
    zeros = np.zeros(groups, np.float32) if grid.has_zeros else None
    return Rounded(grid, np.empty(shape, np.float32), np.ones(groups, np.float32), zeros)


def _set_group(rounded: Rounded, group: int, scale: Float32, zero: Float32 | None) -> None:
    rounded.scales[group] = scale
    if rounded.zeros is not None and zero is not None:
        rounded.zeros[group] = zero
