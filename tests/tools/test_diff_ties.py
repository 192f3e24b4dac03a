"""The room given to weights that lie in the middle of two bfloat16 numbers: enough, and no more."""

from __future__ import annotations

import numpy as np
import pytest
from diff_helpers import attention_weighing, rounded_weights
from reference_helpers import Float32, uniform

from octavo.diff.ties import rounding_room
from octavo.reference import ops

Attention = tuple[Float32, Float32, Float32, float, int]


def arguments(seed: int, rows: int, context: int, size: float, window: int = 0) -> Attention:
    """Queries, keys and values as a bf16 cache holds them, scale and window."""
    q = uniform(seed, rows, 6, 64) * np.float32(size)
    k, v = uniform(seed + 1, context, 3, 64) * np.float32(size), uniform(seed + 2, context, 3, 64)
    return q, ops.round_to_bf16(k), ops.round_to_bf16(v), 0.125, window


CASES = [(1, 70, 70, 3.0, 0), (2, 50, 400, 3.0, 0), (3, 60, 90, 5.0, 0), (4, 40, 300, 3.0, 50)]


def root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def over(actual: np.ndarray, right: np.ndarray, room: np.ndarray) -> float:
    """The largest error that the room does not cover, relative to the root mean square."""
    return float((np.abs(actual - right) - room).max()) / root_mean_square(right)


@pytest.mark.parametrize("case", CASES)
def test_two_right_computations_differ_by_no_more(case: tuple[int, int, int, float, int]) -> None:
    """float32 in one order, float32 in another, and float64: three that are all right."""
    q, k, v, scale, window = arguments(*case)
    right = ops.attention(q, k, v, scale, window, "bf16")
    looped = attention_weighing(rounded_weights)(q, k, v, scale, window)
    wide = (x.astype(np.float64) for x in (q, k, v))
    exact = ops.attention(*wide, scale, window, "bf16")
    room = rounding_room(q, k, v, scale, window)
    for other in (looped, exact):
        assert over(other, right, room) < 1e-5


def test_some_weights_are_rounded_otherwise() -> None:
    """Without the room right results would be off by more than any float32 rounding."""
    q, k, v, scale, window = arguments(5, 300, 300, 4.0)
    wide = (x.astype(np.float64) for x in (q, k, v))
    exact = ops.attention(*wide, scale, window, "bf16")
    right = ops.attention(q, k, v, scale, window, "bf16")
    assert over(right, exact, np.zeros_like(right)) > 1e-3
    assert over(right, exact, rounding_room(q, k, v, scale, window)) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_the_room_hides_no_mistake(case: tuple[int, int, int, float, int]) -> None:
    q, k, v, scale, window = arguments(*case)
    right = ops.attention(q, k, v, scale, window, "bf16")
    room = rounding_room(q, k, v, scale, window)
    unrounded = ops.attention(ops.round_to_bf16(q), k, v, scale, window)
    assert over(unrounded, right, room) > 1e-3
    assert root_mean_square(unrounded - right) > root_mean_square(room)
    assert over(ops.attention(q, k, v, scale, window), right, room) > 1e-3


def test_a_weight_in_the_middle() -> None:
    """One key and a score whose weight is a middle to the last bit: room of one step."""
    weight = 0.5 + 2**-9  # between 0.5 and 0.5 + 2^-8
    power = np.log2(weight)
    q, k = np.zeros((1, 1, 4), np.float32), np.zeros((1, 1, 4), np.float32)
    q[0, 0, 0] = k[0, 0, 0] = 1
    v = np.full((1, 1, 4), 3, np.float32)
    scale = float(power / np.log2(np.e))
    assert rounding_room(q, k, v, scale) == pytest.approx(2**-8 / weight * v, rel=1e-5)
    assert not rounding_room(q, k, v, scale * 1.001).any()
