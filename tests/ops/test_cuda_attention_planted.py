"""Attention on the CUDA backend: the tests' tolerances find mistakes that are planted."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from cuda_attention_helpers import (
    BEYOND_ROUNDING,
    FORMATS,
    attend,
    beyond_rounding,
    expect,
    make_sequences,
)
from cuda_helpers import needs_cuda, rounded
from ops_helpers import (
    Sequence,
    double,
)
from reference_helpers import max_error

from octavo.reference import ops

pytestmark = needs_cuda


def _rows_alone(s: Sequence, seen: Callable[[int], int]) -> list[Sequence]:
    """Each row as a sequence of its own that ends with the `seen(position)`-th key."""
    first = len(s.k) - len(s.q)
    counts = [seen(first + i) for i in range(len(s.q))]
    return [Sequence(s.q[[i]], s.k[:n], s.v[:n]) for i, n in enumerate(counts)]


def _own_key_not_seen(s: Sequence) -> list[Sequence]:
    return _rows_alone(s, lambda position: position)


def _next_key_seen(s: Sequence) -> list[Sequence]:
    return _rows_alone(s, lambda position: min(position + 2, len(s.k)))


def _not_causal(s: Sequence) -> list[Sequence]:
    return _rows_alone(s, lambda position: len(s.k))


def _wrong_block(s: Sequence) -> list[Sequence]:
    """The second block of the table is the first once more."""
    k, v = s.k.copy(), s.v.copy()
    k[16:32], v[16:32] = k[:16], v[:16]
    return [Sequence(s.q, k, v)]


def _last_tile_left_out(s: Sequence) -> list[Sequence]:
    k, v = s.k.copy(), s.v.copy()
    end = (len(k) - 1) // 64 * 64
    v[end:] = 0
    return [Sequence(s.q, k, v)]


def _keys_swapped(s: Sequence) -> list[Sequence]:
    """Two neighbours' values change places: a fragment's index that is off by one."""
    v = s.v.copy()
    v[[20, 21]] = v[[21, 20]]
    return [Sequence(s.q, s.k, v)]


def _dimensions_swapped(s: Sequence) -> list[Sequence]:
    k = s.k.copy()
    k[..., [3, 4]] = k[..., [4, 3]]
    return [Sequence(s.q, k, s.v)]


def _heads_interleaved(s: Sequence) -> list[Sequence]:
    """Query head h reads KV head h % num_kv_heads."""
    group = s.q.shape[1] // s.k.shape[1]
    heads = [group * (h % s.k.shape[1]) + h // s.k.shape[1] for h in range(s.q.shape[1])]
    q = np.empty_like(s.q)
    q[:, heads] = s.q
    return [Sequence(q, s.k, s.v)]


PLANTED: list[Callable[[Sequence], list[Sequence]]] = [
    _own_key_not_seen,
    _next_key_seen,
    _not_causal,
    _wrong_block,
    _last_tile_left_out,
    _keys_swapped,
    _dimensions_swapped,
    _heads_interleaved,
]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__.strip("_"))
@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_a_planted_error_is_found(
    formats: tuple[str, str], plant: Callable[[Sequence], list[Sequence]]
) -> None:
    """What the reference gives for a wrong input is further away than the tolerance."""
    dtype, kv_dtype = formats
    sequences = make_sequences([(40, 75)], (4, 2), 64, dtype)
    actual = attend(dtype, kv_dtype, sequences)
    assert max_error(actual, expect(kv_dtype, sequences)) <= FORMATS[formats]
    wrong = expect(kv_dtype, [part for s in sequences for part in plant(s)])
    assert max_error(actual, wrong) > 4 * FORMATS[formats]


def _float32_weights(s: Sequence) -> np.ndarray:
    k, v = (double(rounded(x, "bf16")) for x in (s.k, s.v))
    return ops.attention(ops.round_to_bf16(double(s.q)), k, v, s.q.shape[2] ** -0.5)


def _float32_queries(s: Sequence) -> np.ndarray:
    k, v = (double(rounded(x, "bf16")) for x in (s.k, s.v))
    return ops.attention(double(s.q), k, v, s.q.shape[2] ** -0.5)


def _maximum_not_whole(s: Sequence) -> np.ndarray:
    """The definition of scores that are all moved such that the greatest is a whole number."""
    k, v = (double(rounded(x, "bf16")) for x in (s.k, s.v))
    group = s.q.shape[1] // s.k.shape[1]
    out = np.empty(s.q.shape)
    for row, head in np.ndindex(out.shape[:2]):
        seen = len(k) - len(s.q) + row + 1
        queries = ops.round_to_bf16(double(s.q[row, head]))
        powers = k[:seen, head // group] @ queries * s.q.shape[2] ** -0.5 * np.log2(np.e)
        weights = np.exp2(powers - powers.max())
        values = v[:seen, head // group]
        out[row, head] = ops.round_to_bf16(weights) @ values / weights.sum()
    return out


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("bf16", 64), ("bf16", 128), ("f32", 16), ("f16", 64), ("bf16", 80)]
)
@pytest.mark.parametrize("plant", [_float32_weights, _float32_queries, _maximum_not_whole])
def test_other_rounding_over_a_bf16_cache_is_found(
    dtype: str, head_dim: int, plant: Callable[[Sequence], np.ndarray]
) -> None:
    """Though a result stored in bf16 errs by as much as a weight that is rounded."""
    sequences = make_sequences([(40, 75)], (4, 2), head_dim, dtype)
    actual = attend(dtype, "bf16", sequences)
    right = expect("bf16", sequences)
    assert beyond_rounding(dtype, actual, right, sequences, 0) <= BEYOND_ROUNDING
    wrong = np.concatenate([plant(s) for s in sequences])
    assert beyond_rounding(dtype, actual, wrong, sequences, 0) > 100 * BEYOND_ROUNDING


@pytest.mark.parametrize("wrong_window", [0, 19, 21])
def test_a_wrong_window_is_found(wrong_window: int) -> None:
    sequences = make_sequences([(40, 75)], (4, 2), 64, "bf16")
    actual = attend("bf16", "bf16", sequences, 20)
    assert max_error(actual, expect("bf16", sequences, wrong_window)) > 4 * FORMATS["bf16", "bf16"]
