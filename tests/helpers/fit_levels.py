"""How `octavo.quantization.levels.NONUNIFORM_LEVELS` were computed.

By the method of Lloyd (1982) and Max (1960), with one more unknown. Two steps alternate: each group
of normal random numbers takes its best scale, of either sign; and each level becomes the weighted
mean of the numbers rounded to it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_STRETCHES = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2)

Float32 = npt.NDArray[np.float32]


def fit_levels(
    group_size: int = 32, num_groups: int = 4000, rounds: int = 60, seed: int = 0
) -> tuple[int, ...]:
    """Levels of least squared error over groups of normal random numbers; takes some 20 seconds.

    Returns 16 whole numbers in ascending order; the one of largest magnitude is -127.
    """
    x = np.random.default_rng(seed).standard_normal((num_groups, group_size)).astype(np.float32)
    extreme = x[np.arange(num_groups), np.abs(x).argmax(axis=1)]
    levels = np.linspace(-1.0, 0.9, 16).astype(np.float32)
    for _ in range(rounds):
        scale = _best_scales(x, extreme, levels)
        nearest = _nearest(x / scale[:, None], levels)
        weight = np.broadcast_to(np.square(scale)[:, None], x.shape)
        total = np.bincount(nearest.ravel(), (x * scale[:, None]).ravel(), 16)
        levels = (total / np.bincount(nearest.ravel(), weight.ravel(), 16)).astype(np.float32)
        levels /= np.abs(levels).max()
    return tuple(int(level) for level in np.rint(levels * 127))


def _nearest(x: Float32, levels: Float32) -> npt.NDArray[np.intp]:
    """The index of the level nearest to each number."""
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, x)


def _best_scales(x: Float32, extreme: Float32, levels: Float32) -> Float32:
    """For each group the best of some scales, then fitted to its codes by least squares."""
    best = np.full(len(x), np.inf)
    scales = np.ones(len(x), np.float32)
    for end in (levels[0], levels[-1]):
        for stretch in _STRETCHES:
            scale = extreme / (end * np.float32(stretch))
            off = levels[_nearest(x / scale[:, None], levels)] * scale[:, None] - x
            error = np.square(off).sum(axis=1)
            better = error < best
            best[better], scales[better] = error[better], scale[better]
    values = levels[_nearest(x / scales[:, None], levels)]
    fitted: Float32 = (values * x).sum(axis=1) / np.square(values).sum(axis=1)
    return fitted
