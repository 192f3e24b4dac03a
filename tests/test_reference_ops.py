"""The reference's ops by themselves: values worked out by hand, and what holds for any input."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from octavo.models.spec import RopeSpec
from octavo.reference import ops
from reference_helpers import max_error, uniform

LLAMA3 = RopeSpec(500000.0, "llama3", 32.0, 1.0, 4.0, 8192)


def test_round_to_bf16() -> None:
    values = {
        1.0: 1.0,
        1 + 2**-8: 1.0,  # halfway: to the even neighbour, below
        1 + 3 * 2**-8: 1 + 4 * 2**-8,  # halfway: to the even neighbour, above
        1 + 2**-8 + 2**-20: 1 + 2**-7,
        -(1 + 3 * 2**-8): -(1 + 4 * 2**-8),
        3.4e38: math.inf,
        -math.inf: -math.inf,
        2.0**-133: 2.0**-133,  # a denormal that bfloat16 has too
        0.0: 0.0,
    }
    x = np.array(list(values), dtype=np.float32)
    assert ops.round_to_bf16(x).tolist() == list(values.values())
    assert ops.round_to_bf16(x).dtype == np.float32
    assert ops.round_to_bf16(x.astype(np.float64)).dtype == np.float64
    assert np.isnan(ops.round_to_bf16(np.array([np.nan], np.float32))).all()
    random = uniform(1, 10_000)
    rounded = ops.round_to_bf16(random)
    assert np.array_equal(ops.round_to_bf16(rounded), rounded)
    assert np.array_equal(rounded.view(np.uint32) & 0xFFFF, np.zeros(10_000))
    assert 0.9 * 2**-9 < np.abs(rounded / random - 1).max() <= 2**-8


def test_embed() -> None:
    table = np.arange(12, dtype=np.float32).reshape(4, 3)
    ids = np.array([2, 0, 2])
    assert ops.embed(table, ids).tolist() == [[6, 7, 8], [0, 1, 2], [6, 7, 8]]
    positions = np.array([[0, 0, 1], [10, 20, 30]], dtype=np.float32)
    added = ops.embed(table, ids, positions, np.array([0, 1, 1]))
    assert added.tolist() == [[6, 7, 9], [10, 21, 32], [16, 27, 38]]
    with pytest.raises(ValueError, match="positions"):
        ops.embed(table, ids, positions)
    fine = np.array([[1 + 2**-10]], dtype=np.float32)
    assert ops.embed(fine, np.array([0]), dtype="bf16")[0, 0] == 1


def test_norm_known_values() -> None:
    x = np.array([[3.0, 4.0]], dtype=np.float32)
    weight, bias = np.array([1.0, 2.0], np.float32), np.array([10.0, 20.0], np.float32)
    root = math.sqrt(12.5)
    np.testing.assert_allclose(ops.norm(x, weight, None, 0.0), [[3 / root, 8 / root]], rtol=1e-6)
    np.testing.assert_allclose(ops.norm(x, weight, None, 12.5), [[0.6, 1.6]], rtol=1e-6)
    np.testing.assert_allclose(ops.norm(x, weight, bias, 0.0, "layer"), [[9, 22]], rtol=1e-6)
    with pytest.raises(ValueError, match="batch"):
        ops.norm(x, weight, None, 0.0, "batch")


def test_norm_properties() -> None:
    x, weight, bias = uniform(1, 5, 101), uniform(2, 101), uniform(3, 101)
    for kind in ("rms", "layer"):
        one = ops.norm(x, weight, bias, 0.0, kind)
        assert max_error(ops.norm(x * 64, weight, bias, 0.0, kind), one) < 1e-6  # no scale left
        plain = ops.norm(x, np.ones_like(weight), None, 0.0, kind)
        np.testing.assert_allclose(np.mean(plain**2, axis=1), 1, rtol=1e-6)
    shifted = ops.norm(x + 3, weight, bias, 1e-5, "layer")
    assert max_error(shifted, ops.norm(x, weight, bias, 1e-5, "layer")) < 1e-5
    total, normed = ops.add_norm(x, uniform(4, 5, 101), weight, bias, 1e-5)
    assert np.array_equal(total, x + uniform(4, 5, 101))
    assert np.array_equal(normed, ops.norm(total, weight, bias, 1e-5))


def test_linear() -> None:
    x = np.array([[1.0, 2.0, 3.0]], dtype=np.float32)
    weight = np.array([[1, 0, 0], [0, 1, 1]], dtype=np.float32)
    assert ops.linear(x, weight).tolist() == [[1, 5]]
    assert ops.linear(x, weight, np.array([10, 20], np.float32)).tolist() == [[11, 25]]
    fine = np.array([[1 + 2**-10, 2**-10]], dtype=np.float32)
    ones = np.ones((1, 2), dtype=np.float32)
    # x is rounded, element by element; the sum is not, nor is the bias.
    assert ops.linear(fine, ones, None, "bf16")[0, 0] == 1 + 2**-10
    assert ops.linear(ones, fine, fine[0, 1:], "bf16")[0, 0] == 1 + 2**-9
    assert ops.linear(fine, ones)[0, 0] == 1 + 2**-9


def test_rope_frequencies_known_values() -> None:
    np.testing.assert_allclose(
        ops.rope_frequencies(RopeSpec(theta=10000.0), 8), [1, 0.1, 0.01, 0.001], rtol=1e-6
    )
    linear = ops.rope_frequencies(RopeSpec(10000.0, "linear", 4.0), 8)
    np.testing.assert_allclose(linear, [0.25, 0.025, 0.0025, 0.00025], rtol=1e-6)
    with pytest.raises(ValueError, match="yarn"):
        ops.rope_frequencies(RopeSpec(scaling="yarn"), 8)  # type: ignore[arg-type]


def test_rope_frequencies_llama3() -> None:
    """Fast pairs as they were, slow ones divided by the factor, in between strictly in between."""
    plain = ops.rope_frequencies(replace(LLAMA3, scaling="default"), 64)
    scaled = ops.rope_frequencies(LLAMA3, 64)
    wavelengths = 2 * np.pi / plain.astype(np.float64)
    fast, slow = wavelengths < 8192 / 4, wavelengths > 8192
    assert fast.sum() >= 10 and slow.sum() >= 10 and (~fast & ~slow).sum() >= 2
    assert np.array_equal(scaled[fast], plain[fast])
    assert np.array_equal(scaled[slow], plain[slow] / np.float32(32))
    between = ~fast & ~slow
    assert ((scaled < plain) & (scaled > plain / 32))[between].all()
    assert (np.diff(scaled) < 0).all()


def test_rope_known_values() -> None:
    # One pair, a quarter turn: (x, y) -> (-y, x). Paired are elements half a head apart.
    quarter = np.array([np.pi / 2, np.pi], dtype=np.float32)
    x = np.array([[[1.0, 2.0, 3.0, 4.0]]], dtype=np.float32)
    turned = ops.rope(x, np.array([1]), quarter)
    np.testing.assert_allclose(turned, [[[-3, -2, 1, -4]]], atol=1e-6)
    assert np.array_equal(ops.rope(x, np.array([0]), quarter), x)
    assert ops.rope(x, np.array([5]), None) is x


def test_rope_is_a_rotation() -> None:
    x, frequencies = uniform(1, 9, 3, 64), ops.rope_frequencies(LLAMA3, 64)
    turned = ops.rope(x, np.arange(9) * 371, frequencies)
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6
    )
    back = ops.rope(turned, -np.arange(9) * 371, frequencies)
    assert max_error(back, x) < 1e-6


def test_rope_is_relative() -> None:
    """The product of a query and a key depends on how far apart they are, not on where."""
    frequencies = ops.rope_frequencies(RopeSpec(theta=10000.0), 64)
    q, k = uniform(1, 1, 1, 64).astype(np.float64), uniform(2, 1, 1, 64).astype(np.float64)
    products = [
        np.vdot(
            ops.rope(q, np.array([start + 17]), frequencies),
            ops.rope(k, np.array([start]), frequencies),
        )
        for start in (0, 1, 100, 2000)
    ]
    np.testing.assert_allclose(products, products[0], atol=2e-3)  # float32 angles: 2000 * 6e-8
    further = ops.rope(q, np.array([18]), frequencies), ops.rope(k, np.array([0]), frequencies)
    assert abs(np.vdot(*further) - products[0]) > 0.02


def test_rope_and_store() -> None:
    q, k, v = uniform(1, 3, 4, 8), uniform(2, 3, 2, 8), uniform(3, 3, 2, 8)
    frequencies, positions = ops.rope_frequencies(RopeSpec(), 8), np.array([4, 5, 6])
    slots = np.array([9, -1, 2])
    turned, keys, values = ops.rope_and_store(q, k, v, positions, slots, frequencies, 12)
    assert np.array_equal(turned, ops.rope(q, positions, frequencies))
    assert np.array_equal(keys[[9, 2]], ops.rope(k, positions, frequencies)[[0, 2]])
    assert np.array_equal(values[[9, 2]], v[[0, 2]])
    empty = [slot for slot in range(12) if slot not in (9, 2)]
    assert not keys[empty].any() and not values[empty].any()
    _, keys, values = ops.rope_and_store(q, k, v, positions, slots, frequencies, 12, "bf16")
    assert np.array_equal(values[9], ops.round_to_bf16(v[0]))


def test_attention_by_hand() -> None:
    """Three tokens, one head, loops instead of matrices."""
    q, k, v = (uniform(seed, 3, 1, 4).astype(np.float64) for seed in (1, 2, 3))
    expected = np.zeros_like(q)
    for p in range(3):
        weights = [math.exp(0.5 * float(q[p, 0] @ k[j, 0])) for j in range(p + 1)]
        for j in range(p + 1):
            expected[p, 0] += weights[j] / sum(weights) * v[j, 0]
    np.testing.assert_allclose(ops.attention(q, k, v, 0.5), expected, rtol=1e-12)
    last = ops.attention(q[2:], k, v, 0.5)
    np.testing.assert_allclose(last, expected[2:], rtol=1e-12)


def test_attention_is_causal() -> None:
    q, k, v = uniform(1, 9, 4, 16), uniform(2, 9, 2, 16), uniform(3, 9, 2, 16)
    base = ops.attention(q, k, v, 0.25)
    k2, v2 = k.copy(), v.copy()
    k2[5:], v2[5:] = 7, -7
    changed = ops.attention(q, k2, v2, 0.25)
    assert np.array_equal(base[:5], changed[:5])
    assert (np.abs(base - changed)[5:].max(axis=(1, 2)) > 0.01).all()


def test_attention_window() -> None:
    q, k, v = uniform(1, 9, 2, 16), uniform(2, 9, 1, 16), uniform(3, 9, 1, 16)
    one = ops.attention(q, k, v, 0.25, window=1)
    np.testing.assert_allclose(one, np.repeat(v, 2, axis=1), rtol=1e-6)
    three = ops.attention(q, k, v, 0.25, window=3)
    np.testing.assert_allclose(
        three[8:], ops.attention(q[8:], k[6:], v[6:], 0.25), rtol=1e-5, atol=1e-7
    )
    assert np.array_equal(ops.attention(q, k, v, 0.25, 9), ops.attention(q, k, v, 0.25, 0))


def test_attention_heads_share_in_groups() -> None:
    q, k, v = uniform(1, 5, 6, 8), uniform(2, 5, 2, 8), uniform(3, 5, 2, 8)
    grouped = ops.attention(q, k, v, 0.3)
    spread = ops.attention(q, np.repeat(k, 3, axis=1), np.repeat(v, 3, axis=1), 0.3)
    np.testing.assert_allclose(grouped, spread, rtol=1e-5, atol=1e-7)


def test_softmax_survives_large_scores() -> None:
    weights = ops.softmax(np.array([[1e4, 1e4 - 1, -1e4]], dtype=np.float32))
    np.testing.assert_allclose(weights, [[0.7310586, 0.26894143, 0]], rtol=1e-6)


def test_activations_known_values() -> None:
    x = np.array([[-200.0, -1.0, 0.0, 1.0, 3.0, 200.0]], dtype=np.float32)
    expected = {
        "silu": [0, -0.26894143, 0, 0.7310586, 2.8577224, 200],
        "gelu": [0, -0.15865526, 0, 0.84134475, 2.9959502, 200],
        "gelu_tanh": [0, -0.15880801, 0, 0.841192, 2.9963627, 200],
        "relu": [0, 0, 0, 1, 3, 200],
    }
    for activation, values in expected.items():
        with np.errstate(all="raise", under="ignore"):
            np.testing.assert_allclose(
                ops.gated_activation(None, x, activation), [values], rtol=2e-6, atol=1e-6
            )
            up = uniform(1, 1, 6)
            np.testing.assert_allclose(
                ops.gated_activation(x, up, activation), values * up, rtol=2e-6, atol=1e-6
            )
    with pytest.raises(ValueError, match="mish"):
        ops.activate(x, "mish")


def test_take_rows() -> None:
    x = uniform(1, 5, 3)
    assert np.array_equal(ops.take_rows(x, np.array([4, 0, 4])), x[[4, 0, 4]])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_results_keep_the_precision_of_the_input(dtype: type) -> None:
    x, weight = uniform(1, 3, 8).astype(dtype), uniform(2, 8)
    heads, frequencies = x.reshape(3, 2, 4), ops.rope_frequencies(RopeSpec(), 4)
    positions = np.arange(3)
    results = [
        ops.norm(x, weight, weight, 1e-5, "layer"),
        *ops.add_norm(x, x, weight, None, 1e-5),
        ops.linear(x, uniform(3, 5, 8), uniform(4, 5)),
        ops.linear(x, uniform(3, 5, 8), uniform(4, 5), "bf16"),
        ops.rope(heads, positions, frequencies),
        *ops.rope_and_store(heads, heads, heads, positions, positions, frequencies, 4, "bf16"),
        ops.attention(heads, heads, heads, 0.5),
        *(ops.gated_activation(x, x, name) for name in ("silu", "gelu", "gelu_tanh", "relu")),
    ]
    assert [result.dtype for result in results] == [np.dtype(dtype)] * len(results)
