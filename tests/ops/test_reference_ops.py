"""The reference's ops by themselves: values worked out by hand, and what holds for any input."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from ops_helpers import rope_frequencies
from reference_helpers import max_error, uniform

from octavo.reference import ops


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


def test_rope_known_values() -> None:
    # One pair, a quarter turn: (x, y) -> (-y, x). Paired are elements half a head apart.
    quarter = np.array([np.pi / 2, np.pi], dtype=np.float32)
    x = np.array([[[1.0, 2.0, 3.0, 4.0]]], dtype=np.float32)
    turned = ops.rope(x, np.array([1]), quarter)
    np.testing.assert_allclose(turned, [[[-3, -2, 1, -4]]], atol=1e-6)
    assert np.array_equal(ops.rope(x, np.array([0]), quarter), x)
    assert ops.rope(x, np.array([5]), None) is x
    # One frequency: elements 0 and 1 of each head are the pair, the others stay.
    assert np.array_equal(
        ops.rope(x, np.array([1]), quarter[:1], 2.0).round(6), [[[-4.0, 2.0, 3.0, 4.0]]]
    )


def test_rope_is_a_rotation() -> None:
    x, frequencies = uniform(1, 9, 3, 64), rope_frequencies("llama3", 64)
    turned = ops.rope(x, np.arange(9) * 371, frequencies)
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6
    )
    back = ops.rope(turned, -np.arange(9) * 371, frequencies)
    assert max_error(back, x) < 1e-6


def test_rope_is_relative() -> None:
    """The product of a query and a key depends on how far apart they are, not on where."""
    frequencies = rope_frequencies("default", 64)
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
    frequencies, positions = rope_frequencies("default", 8), np.array([4, 5, 6])
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


# ---- over a bf16 cache ----

HeadArrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def heads_over_bf16(seed: int, rows: int, context: int, size: float = 3.0) -> HeadArrays:
    """q (rows, 6, 32); k, v (context, 2, 32) as a bf16 cache holds them; scores of some units."""
    q = uniform(seed, rows, 6, 32) * np.float32(size)
    k, v = uniform(seed + 1, context, 2, 32) * np.float32(size), uniform(seed + 2, context, 2, 32)
    return q, ops.round_to_bf16(k), ops.round_to_bf16(v)


def by_pieces(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    window: int = 0,
    piece: int = 128,
    whole: Callable[[np.ndarray], np.ndarray] = np.ceil,
    weigh: Callable[[np.ndarray], np.ndarray] = ops.round_to_bf16,
) -> np.ndarray:
    """Attention by an online softmax: pieces of the context in turn, and what was there rescaled.

    Arithmetic is float64, so that no score depends on the order of its sum. whole, weigh: what is
    done to maxima and to weights.
    """
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.empty_like(q)
    for row, head in np.ndindex(q.shape[:2]):
        end = len(k) - len(q) + row + 1
        begin = max(0, end - window) if window else 0
        kv_head = head // (q.shape[1] // k.shape[1])
        most, total, sums = np.array(-np.inf), 0.0, np.zeros(q.shape[2])
        for first in range(begin, end, piece):
            seen = slice(first, min(first + piece, end))
            scores = k[seen, kv_head] @ ops.round_to_bf16(q[row, head])
            powers = scores * (scale * math.log2(math.e))
            greatest = np.maximum(most, whole(powers.max()))
            weights, keep = np.exp2(powers - greatest), np.exp2(most - greatest)
            total = total * keep + weights.sum()
            sums = sums * keep + weigh(weights) @ v[seen, kv_head]
            most = greatest
        out[row, head] = sums / total
    return out


@pytest.mark.parametrize("piece", [1, 7, 128, 1000])
@pytest.mark.parametrize("window", [0, 150])
def test_attention_over_bf16_is_the_same_in_any_pieces(piece: int, window: int) -> None:
    """Since maxima are whole: the same weights rounded alike, to the last bits of float64."""
    q, k, v = heads_over_bf16(1, 5, 400)
    k[::-40] *= 2  # so that the maximum grows from piece to piece
    wide = (x.astype(np.float64) for x in (q, k, v))
    right = ops.attention(*wide, 0.25, window, "bf16")
    assert max_error(by_pieces(q, k, v, 0.25, window, piece), right) < 1e-12
    # Planted: of a maximum that is not whole, each piece makes other roundings.
    wrong = by_pieces(q, k, v, 0.25, window, piece, whole=lambda greatest: greatest)
    assert max_error(wrong, right) > 1e-3
    # Planted: weights that are not rounded.
    wrong = by_pieces(q, k, v, 0.25, window, piece, weigh=lambda weights: weights)
    assert max_error(wrong, right) > 1e-3


def test_attention_over_bf16_rounds_queries_and_weights() -> None:
    """Two keys by hand, and a query that is no bfloat16 number."""
    q = np.zeros((1, 1, 2))
    q[0, 0] = 1 + 2**-9, 0  # to be rounded to 1
    k, v = np.array([[[0.0, 0]], [[1.0, 0]]]), np.array([[[1.0, 0]], [[0.0, 1]]])
    scale = 1.3 * math.log(2)  # scores 0 and 1.3 in powers of two: N is 2
    first, second = 2.0**-2, 2.0**-0.7  # of which the second is to be rounded, in steps of 2^-8
    rounded = round(second * 2**8) / 2**8
    expected = np.array([first, rounded]) / (first + second)
    np.testing.assert_allclose(ops.attention(q, k, v, scale, 0, "bf16")[0, 0], expected, rtol=1e-12)
    assert abs(rounded / second - 1) > 1e-4


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("size", [1.0, 3.0])
def test_attention_over_bf16_is_near_to_float32(size: float, window: int) -> None:
    """Each weight is off by 2^-8 of itself at most, each score by what rounding q does to it."""
    q, k, v = heads_over_bf16(4, 40, 90, size)
    wide = [x.astype(np.float64) for x in (ops.round_to_bf16(q), k, v)]
    exact = ops.attention(*wide, 0.25, window)
    actual = ops.attention(q, k, v, 0.25, window, "bf16")
    sizes = ops.attention(*wide[:2], np.abs(wide[2]), 0.25, window)  # the average of |v|
    error = np.abs(actual - exact)
    assert (error <= 2.0**-8 * sizes + 1e-5).all()
    assert np.sqrt(np.mean(error**2)) > 1e-4  # and they are rounded
    # Rounding moves a number of q by 2^-8 of itself at most, and so a score by no more than d. Then
    # each weight changes by a factor of e^d at most, and their sum likewise.
    unrounded = ops.attention(*(x.astype(np.float64) for x in (q, k, v)), 0.25, window)
    products = np.einsum("qhd,khd->hqk", np.abs(q), np.abs(k).repeat(3, axis=1))
    d = 2.0**-8 * 0.25 * float(products.max())
    assert (np.abs(actual - unrounded) <= (2.0**-8 + math.expm1(2 * d)) * sizes + 1e-5).all()
    assert max_error(exact, unrounded) > 1e-3


def test_attention_over_bf16_sees_what_float32_sees() -> None:
    """Causal, and with a window: what is out of sight changes no bit."""
    q, k, v = heads_over_bf16(7, 30, 30)
    for window in (0, 9):
        base = ops.attention(q, k, v, 0.25, window, "bf16")
        for row in (0, 8, 9, 10, 29):
            first = max(0, row - window + 1) if window else 0
            k2, v2 = np.full_like(k, 7), np.full_like(v, -7)
            k2[first : row + 1], v2[first : row + 1] = k[first : row + 1], v[first : row + 1]
            changed = ops.attention(q, k2, v2, 0.25, window, "bf16")
            np.testing.assert_allclose(changed[row], base[row], rtol=1e-5, atol=1e-6)
            if window and row > window:
                k2[row - window + 1] = 7
                changed = ops.attention(q, k2, v2, 0.25, window, "bf16")
                assert np.abs(changed[row] - base[row]).max() > 1e-3
    assert np.array_equal(
        ops.attention(q, k, v, 0.25, 30, "bf16"), ops.attention(q, k, v, 0.25, 0, "bf16")
    )


def test_attention_over_bf16_with_huge_and_equal_scores() -> None:
    q, k, v = heads_over_bf16(10, 20, 50)
    average = np.cumsum(v, axis=0)[30:] / np.arange(31, 51)[:, None, None]
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        huge = np.float32(3e14)
        result = ops.attention(q * huge, k * huge, v, 1.0, 0, "bf16")  # up to 1e30
        assert np.isfinite(result).all()
        # Huge scores choose one key each: its value as it is, since N is the score itself.
        scores = np.einsum("qhd,khd->hqk", ops.round_to_bf16(q * huge), k.repeat(3, axis=1))
        scores[:, ~(np.arange(50) <= np.arange(30, 50)[:, None])] = -np.inf
        chosen = v.repeat(3, axis=1)[scores.argmax(axis=-1).T, np.arange(6)]
        assert np.array_equal(result, chosen)
        for scale in (0.0, 0.25, 3e30):
            same = ops.attention(q, np.ones_like(k) * np.float32(0.5), v, scale, 0, "bf16")
            # All weights are rounded alike, by 2^-8 at most.
            bound = 2.0**-8 * np.abs(average.repeat(3, axis=1)) + 1e-6
            assert (np.abs(same - average.repeat(3, axis=1)) <= bound).all()


def test_attention_over_bf16_heads_share_in_groups() -> None:
    q, k, v = heads_over_bf16(13, 9, 30)
    grouped = ops.attention(q, k, v, 0.25, 0, "bf16")
    spread = ops.attention(q, k.repeat(3, axis=1), v.repeat(3, axis=1), 0.25, 0, "bf16")
    np.testing.assert_allclose(grouped, spread, rtol=1e-5, atol=1e-6)


def test_which_caches_round_in_attention() -> None:
    kinds = {kind: ops.attention_dtype(kind) for kind in ("f32", "f16", "bf16", "int8")}
    assert kinds == {"f32": "f32", "f16": "f32", "bf16": "bf16", "int8": "f32"}


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
    heads, frequencies = x.reshape(3, 2, 4), rope_frequencies("default", 4)
    positions = np.arange(3)
    results = [
        ops.norm(x, weight, weight, 1e-5, "layer"),
        *ops.add_norm(x, x, weight, None, 1e-5),
        ops.linear(x, uniform(3, 5, 8), uniform(4, 5)),
        ops.linear(x, uniform(3, 5, 8), uniform(4, 5), "bf16"),
        ops.rope(heads, positions, frequencies),
        *ops.rope_and_store(heads, heads, heads, positions, positions, frequencies, 4, "bf16"),
        ops.attention(heads, heads, heads, 0.5),
        ops.attention(heads, heads, heads, 0.5, 0, "bf16"),
        *(ops.gated_activation(x, x, name) for name in ("silu", "gelu", "gelu_tanh", "relu")),
    ]
    assert [result.dtype for result in results] == [np.dtype(dtype)] * len(results)
