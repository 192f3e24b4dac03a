"""Rotating, storing and reading back on the CUDA backend: equal to the reference, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_helpers import DEVICE, needs_cuda, rounded
from ops_helpers import TOLERANCES, Case, rope_and_store_cases, rope_frequencies
from reference_helpers import max_error, same_bits, uniform

from octavo import _native_ops
from octavo.reference import ops

pytestmark = needs_cuda
KV_DTYPES = ("f32", "bf16", "f16", "int8")


@pytest.mark.parametrize("case", list(rope_and_store_cases()), ids=str)
def test_rope_and_store_equals_the_reference(case: Case) -> None:
    native = _native_ops.Ops(DEVICE)
    for value, right in zip(case.native(native), case.reference(ops), strict=True):
        assert max_error(value, right) <= TOLERANCES[case.op]


@pytest.mark.parametrize("rope", [None, "smollm", "llama3"])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 3, 16), (8, 1, 64), (9, 3, 80)])
def test_what_is_stored_is_what_was_rounded(
    dtype: str, rope: str | None, heads: int, kv_heads: int, head_dim: int
) -> None:
    """q and k are turned in float32 and rounded to the activations' format; that is stored."""
    native = _native_ops.Ops(DEVICE, dtype=dtype)
    tokens, num_slots, block_size = 21, 96, 32
    q, k, v = (
        rounded(uniform(seed, tokens, count, head_dim) * np.float32(4), dtype)
        for seed, count in ((1, heads), (2, kv_heads), (3, kv_heads))
    )
    positions = np.array([(i * 977 + 5) % 4096 for i in range(tokens)], dtype=np.int32)
    slots = np.random.default_rng(4).permutation(num_slots)[:tokens].astype(np.int32)
    slots[[3, tokens - 1]] = -1
    frequencies = rope and rope_frequencies(rope, head_dim)
    turned_q, turned_k = (rounded(ops.rope(x, positions, frequencies), dtype) for x in (q, k))
    stored = slots >= 0
    for kv_dtype in KV_DTYPES:
        got_q, keys, values = native.rope_and_store(
            q, k, v, positions, slots, frequencies, num_slots, block_size, kv_dtype
        )
        assert same_bits(got_q, turned_q)
        for cache, right in ((keys, turned_k), (values, v)):
            expected = np.zeros_like(cache)
            expected[slots[stored]] = rounded(right[stored], kv_dtype)
            assert np.array_equal(cache, expected), kv_dtype  # int8 knows no -0


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("head_dim", [16, 80, 256])
def test_a_nan_in_an_int8_cache_stays_one(head_dim: int, dtype: str) -> None:
    native = _native_ops.Ops(DEVICE, dtype=dtype)
    q, k = uniform(1, 9, 2, head_dim), rounded(uniform(2, 9, 2, head_dim), dtype)
    for token in (1, 3, 4):
        k[token, token % 2, (token * 77) % head_dim] = np.nan
    k[7, 0] = np.nan
    places, frequencies = np.arange(9, dtype=np.int32), np.zeros(head_dim // 2, np.float32)
    for turns in (None, frequencies):
        _, _, values = native.rope_and_store(q, k, k, places, places, turns, 32, 32, "int8")
        np.testing.assert_array_equal(values[:9], ops.to_cache(k, "int8"))
        assert np.flatnonzero(np.isnan(values).any((1, 2))).tolist() == [1, 3, 4, 7]


def test_a_padded_step_stores_nothing() -> None:
    native = _native_ops.Ops(DEVICE, dtype="bf16")
    q, k = uniform(1, 5, 4, 64), uniform(2, 5, 2, 64)
    slots = np.full(5, -1, dtype=np.int32)
    _, keys, values = native.rope_and_store(
        q, k, k, np.zeros(5, np.int32), slots, rope_frequencies("default", 64), 32
    )
    assert not keys.any() and not values.any()


@pytest.mark.parametrize(
    ("block_size", "head_dim", "message"),
    [(24, 64, "block_size is 24"), (16, 257, "head_dim is 257")],
)
def test_what_it_cannot_do(block_size: int, head_dim: int, message: str) -> None:
    native = _native_ops.Ops(DEVICE)
    x = uniform(1, 2, 1, head_dim)
    places = np.arange(2, dtype=np.int32)
    with pytest.raises(ValueError, match=message):
        native.rope_and_store(x, x, x, places, places, None, 48, block_size)
