"""How far two arrays lie apart, row by row (a row is a token), streamed in chunks of rows.

Only a few numbers a row are kept, so 1,500 tokens of a model with 400 taps cost megabytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RowErrors:
    """Errors of (rows, width) `left` against `right`; every field is float64 (rows,).

    relative: ||left - right|| / max(||left||, ||right||), Euclidean norms; 0 where both are zero.
    max_abs: largest absolute difference. cosine_gap: 1 - cosine of the angle between the rows.
    A row with a NaN or an infinity has relative and max_abs inf and cosine_gap 1, unless the two
    rows are equal bit by bit.
    """

    relative: Float64
    max_abs: Float64
    cosine_gap: Float64


def row_errors(left: Float32, right: Float32) -> RowErrors:
    """Compare two float32 arrays of equal shape (rows, width)."""
    if left.shape != right.shape or left.ndim != 2:
        raise ValueError(
            f"two taps of equal shape (rows, width) are needed, got {left.shape}, {right.shape}"
        )
    with np.errstate(invalid="ignore", over="ignore"):
        difference = left - right
        error = _norms(difference)
        left_norm, right_norm = _norms(left), _norms(right)
        largest = np.maximum(left_norm, right_norm)
        relative = error / np.where(largest > 0, largest, 1.0)
        product = 2.0 * left_norm * right_norm
        # |l - r|^2 = (|l| - |r|)^2 + 2 |l| |r| (1 - cos): no 1 - 0.9999... here.
        gap = (error**2 - (left_norm - right_norm) ** 2) / np.where(product > 0, product, 1.0)
    gap = np.clip(np.where(product > 0, gap, (largest > 0) * 1.0), 0.0, 2.0)
    max_abs = np.abs(difference).max(axis=1).astype(np.float64)
    broken = ~(np.isfinite(error) & np.isfinite(largest))
    if broken.any():
        same = (left[broken].view(np.int32) == right[broken].view(np.int32)).all(axis=1)
        relative[broken] = np.where(same, 0.0, np.inf)
        max_abs[broken] = np.where(same, 0.0, np.inf)
        gap[broken] = np.where(same, 0.0, 1.0)
    return RowErrors(relative, max_abs, gap)


def _norms(x: Float32) -> Float64:
    """Euclidean norm of each row, summed in float64; float32 (rows, width) -> float64 (rows,)."""
    wide = x.astype(np.float64)
    norms: Float64 = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    return norms


def joined(chunks: list[RowErrors]) -> RowErrors:
    """The row errors of a tap over all chunks; fields float64 (all rows,)."""
    return RowErrors(
        relative=np.concatenate([chunk.relative for chunk in chunks]),
        max_abs=np.concatenate([chunk.max_abs for chunk in chunks]),
        cosine_gap=np.concatenate([chunk.cosine_gap for chunk in chunks]),
    )
