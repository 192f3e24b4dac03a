"""The sampler by itself: known values, the right distribution, every option at its ends."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest

from octavo.reference import sampling

INF = np.float32(np.inf)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known-answer vectors published with Random123
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            (0xFFFFFFFF, 0xFFFFFFFF),
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(
    counter: list[int], key: tuple[int, int], expected: list[int]
) -> None:
    words = tuple(np.array([word], dtype=np.uint32) for word in counter)
    assert sampling.philox4x32(words, key)[0].tolist() == expected  # type: ignore[arg-type]


def test_random_bits_are_the_counters_words_in_order() -> None:
    bits = sampling.random_bits(0, 0, 0, 7)
    assert bits[:4].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert bits[:5].tolist() == sampling.random_bits(0, 0, 0, 5).tolist()
    seed = 0x299F31D0_A4093822
    words = tuple(np.array([word], dtype=np.uint32) for word in (1, 77, 3, 0))
    expected = sampling.philox4x32(words, (0xA4093822, 0x299F31D0))[0]
    assert sampling.random_bits(seed, 3, 77, 8)[4:].tolist() == expected.tolist()


def test_exp_within_two_ulp() -> None:
    x = -np.concatenate([np.linspace(0, 87, 200_001), np.logspace(-30, 1.9, 10_001)])
    x = x.astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(sampling.exp32(x) - exact) / np.spacing(exact.astype(np.float32))).max() < 2
    edges = np.array([0.0, -0.0, -87.0, np.nextafter(np.float32(-87), -INF), -1e30, -np.inf])
    values = sampling.exp32(edges.astype(np.float32))
    assert values[:2].tolist() == [1, 1] and values[2] > 1e-38 and values[3:].tolist() == [0, 0, 0]


def test_log_within_two_ulp() -> None:
    x = np.concatenate([np.logspace(-37.9, 38.5, 200_001), np.linspace(0.5, 2, 100_001)])
    x = x.astype(np.float32)
    exact = np.log(x.astype(np.float64))
    error = np.abs(sampling.log32(x) - exact) / np.spacing(np.abs(exact).astype(np.float32))
    assert error[x != 1].max() < 2
    assert sampling.log32(np.array([1, 2, 0.5], np.float32)).tolist() == [
        *(0, np.float32(math.log(2)), np.float32(-math.log(2))),
    ]


def test_gumbel_is_gumbel() -> None:
    """Kolmogorov-Smirnov distance over a million variates, and both tails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        g = np.sort(sampling.gumbel(3, 0, 0, 1 << 20).astype(np.float64))
    n = len(g)
    cumulative = np.exp(-np.exp(-g))
    distance = np.abs(cumulative - (np.arange(n) + 0.5) / n).max()
    assert distance < 1.95 / math.sqrt(n)  # exceeded once in a thousand seeds
    assert g[-1] > 12 and g[0] < -2.4
    assert abs(g.mean() - 0.5772157) < 0.005 and abs(g.var() - math.pi**2 / 6) < 0.01


def test_gumbel_extremes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All bit patterns at which a branch begins or ends give the value that float64 gives."""
    bits = [0, 1, 2**24, 2**31 - 1, 2**31, 2**31 + 1, 3036676095, 3037000499, 2**32 - 2, 2**32 - 1]
    monkeypatch.setattr(sampling, "random_bits", lambda *_: np.array(bits, dtype=np.uint32))
    actual = sampling.gumbel(0, 0, 0, len(bits)).astype(np.float64)
    exact = np.array([-math.log(-math.log((x + 0.5) / 2**32)) for x in bits])
    np.testing.assert_allclose(actual, exact, rtol=3e-6, atol=1e-6)


def draw(logits: list[float], **options: Any) -> int:
    row = sampling.sampling_rows(1, **{"temperature": 1.0, **options})[0]
    return sampling.sample_row(np.array(logits, dtype=np.float32), row)


def kept(logits: list[float], **options: Any) -> list[int]:
    row = sampling.sampling_rows(1, **{"temperature": 1.0, **options})[0]
    return np.flatnonzero(sampling.keep_tokens(np.array(logits, np.float32), row)).tolist()


@pytest.mark.parametrize("vary", ["seed", "position", "sample_index"])
def test_distribution_by_chi_square(vary: str) -> None:
    """5,000 draws, whichever part of the counter moves; 5 degrees of freedom."""
    logits = [2.0, 1.0, 0.0, -1.0, 0.5, 1.5]
    counts = np.zeros(6)
    for i in range(5_000):
        counts[draw(logits, temperature=1.5, **{vary: i})] += 1
    weights = np.exp(np.array(logits) / 1.5)
    expected = weights / weights.sum() * counts.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 20.5  # one in a thousand


def test_distribution_after_cuts() -> None:
    """What is left is drawn in its own proportions."""
    logits = [3.0, 2.0, 1.0, 0.0, -1.0]
    options = {"top_k": 4, "top_p": 0.95, "min_p": 0.01}
    counts = np.zeros(5)
    for i in range(4_000):
        counts[draw(logits, position=i, **options)] += 1
    assert kept(logits, **options) == [0, 1, 2]
    weights = np.exp(np.array(logits[:3]))
    expected = weights / weights.sum() * 4_000
    assert counts[3:].sum() == 0
    assert ((counts[:3] - expected) ** 2 / expected).sum() < 13.8


def test_greedy() -> None:
    assert draw([1, 3, 3, 2], temperature=0) == 1
    assert draw([1, 3, 3, 2], temperature=0, seed=99, top_k=1, top_p=0.1, min_p=1.0) == 1
    assert all(draw([1, 3, 2.9], temperature=1e-3, seed=i) == 1 for i in range(50))


def test_top_k() -> None:
    logits = [1, 5, 3, 5, 4]
    assert kept(logits, top_k=0) == [0, 1, 2, 3, 4]
    assert kept(logits, top_k=1) == [1]  # of equals the lower id
    assert kept(logits, top_k=2) == [1, 3]
    assert kept(logits, top_k=3) == [1, 3, 4]
    assert kept(logits, top_k=5) == kept(logits, top_k=500) == [0, 1, 2, 3, 4]


def test_top_p() -> None:
    logits = np.log([0.1, 0.4, 0.2, 0.3]).tolist()
    assert kept(logits, top_p=1.0) == [0, 1, 2, 3]
    assert kept(logits, top_p=1e-9) == [1]  # one token at least
    assert kept(logits, top_p=0.39) == [1]
    assert kept(logits, top_p=0.41) == [1, 3]
    assert kept(logits, top_p=0.71) == [1, 2, 3]
    assert kept(logits, top_p=0.99) == [0, 1, 2, 3]
    assert kept([0.0] * 8, top_p=0.5) == [0, 1, 2, 3]  # exactly reached; lower ids first


def test_min_p() -> None:
    logits = np.log([0.1, 0.4, 0.2, 0.3]).tolist()
    assert kept(logits, min_p=0.0) == [0, 1, 2, 3]
    assert kept(logits, min_p=0.26) == [1, 2, 3]
    assert kept(logits, min_p=0.6) == [1, 3]
    assert kept(logits, min_p=1.0) == [1]
    assert kept([2.0, 2.0, 1.0], min_p=1.0) == [0, 1]
    assert kept(logits, min_p=1e-30) == [0, 1, 2, 3]


def test_cuts_apply_in_order() -> None:
    """min_p first, then top_k, then top_p of the probability that these have left."""
    logits = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
    assert kept(logits, top_k=2, top_p=0.55) == [0]  # 0.4 is 0.57 of what is left
    assert kept(logits, top_k=0, top_p=0.55) == [0, 1]
    assert kept(logits, top_k=3, top_p=0.5, min_p=0.6) == [0]


def test_masks() -> None:
    logits = np.tile(np.arange(70, dtype=np.float32), (3, 1))
    masks = np.zeros((3, 3), dtype=np.int32)
    masks[0, 0], masks[1, 0], masks[2, 2] = 1 << 5, np.int32(-(2**31)), 1 << 3
    masks[0, 1] = 1 << 1
    assert np.flatnonzero(sampling.unpack_masks(masks, 70)[0]).tolist() == [5, 33]
    tokens = sampling.sample(logits, sampling.sampling_rows(3), masks)
    assert tokens.dtype == np.int32 and tokens.tolist() == [33, 31, 67]
    assert kept([-np.inf, 1, -np.inf], top_k=3, top_p=0.9, min_p=1e-9) == [1]


def test_a_draw_depends_on_its_own_counter_alone() -> None:
    logits = [0.0] * 1000
    base = draw(logits, seed=7)
    assert draw(logits, seed=7) == base
    others = {draw(logits, seed=7, position=1), draw(logits, seed=7, sample_index=1)}
    others |= {draw(logits, seed=8), draw(logits, seed=7 + 2**32)}
    assert len(others | {base}) == 5


def test_log_softmax() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 1000)).astype(np.float32) * 10
    logits[2] += 5000
    exact = logits.astype(np.float64)
    exact = exact - np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1, keepdims=True))
    exact -= logits.max(1, keepdims=True)
    result = sampling.log_softmax(logits)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, exact, rtol=3e-7, atol=1e-6)
    assert sampling.log_softmax(np.zeros((1, 1), np.float32))[0, 0] == 0
