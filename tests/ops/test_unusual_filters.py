"""Top-n-sigma, typical and XTC: against their definitions in float64, and on every device."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from cuda_helpers import DEVICE, needs_cuda
from reference_helpers import same_bits, uniform

from octavo import _native, _native_ops
from octavo.reference import sampling

DEVICES = [
    *(pytest.param("cpu", isa, id=isa) for isa in _native.available_isas()),
    pytest.param(DEVICE, "auto", id="cuda", marks=needs_cuda),
]


def kept(logits: np.ndarray, **options: Any) -> set[int]:
    row = sampling.sampling_rows(1, **{"temperature": 1.0, **options})[0]
    return set(np.flatnonzero(sampling.keep_tokens(logits.astype(np.float32), row)).tolist())


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


# ---- definitions, as their papers have them ----


def sigma_oracle(logits: np.ndarray, n: float) -> set[int]:
    return set(np.flatnonzero(logits >= logits.max() - n * logits.astype(np.float64).std()))


def typical_oracle(logits: np.ndarray, mass: float) -> set[int]:
    p = softmax(logits)
    surprise = -np.log(p)
    order = np.argsort(np.abs(surprise - (p * surprise).sum()), kind="stable")
    return set(order[: 1 + int((np.cumsum(p[order]) < mass).sum())].tolist())


def xtc_oracle(logits: np.ndarray, threshold: float) -> set[int]:
    p = softmax(logits)
    top = sorted(np.flatnonzero(p >= threshold), key=lambda token: p[token])
    return set(range(len(p))) - set(top[1:])  # all but the least probable of them


def random_logits(seed: int) -> np.ndarray:
    """Bell-shaped, as a model's; of many sizes and widths."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 3000))
    return (rng.normal(size=size) * rng.choice([0.3, 1, 2.5, 6]) + 7).astype(np.float32)


@pytest.mark.parametrize("seed", range(25))
def test_kept_tokens_equal_the_definitions(seed: int) -> None:
    logits = random_logits(seed)
    for n in (0.4, 1.0, 2.2):
        assert kept(logits, top_n_sigma=n) == sigma_oracle(logits, n)
        # It is the logits' own spread that counts: a temperature changes nothing.
        assert kept(logits, top_n_sigma=n, temperature=0.37) == sigma_oracle(logits, n)
    for mass in (0.05, 0.3, 0.9, 0.995):
        assert kept(logits, typical_p=mass) == typical_oracle(logits, mass)
        assert kept(logits, typical_p=mass, temperature=2) == typical_oracle(logits / 2, mass)
    for threshold in (0.001, 0.03, 0.2):
        options = {"xtc_probability": 1, "xtc_threshold": threshold}
        assert kept(logits, **options) == xtc_oracle(logits, threshold)


@pytest.mark.parametrize("seed", range(25, 35))
def test_each_filter_sees_what_those_before_it_left(seed: int) -> None:
    """The whole chain, each link by its definition, over the probabilities that are left."""
    logits = random_logits(seed)
    options = {"top_n_sigma": 2.5, "min_p": 0.01, "top_k": 60, "typical_p": 0.9, "top_p": 0.8}
    scaled = logits.astype(np.float64) / 1.5
    left = sorted(
        sigma_oracle(logits, 2.5)
        & set(np.flatnonzero(softmax(scaled) >= 0.01 * softmax(scaled).max()))
    )
    left = sorted(left, key=lambda token: -scaled[token])[:60]
    left = [left[i] for i in sorted(typical_oracle(scaled[left], 0.9))]
    reached = np.cumsum(softmax(scaled[left]))
    left = left[: 1 + int((reached < 0.8).sum())]
    assert kept(logits, temperature=1.5, **options) == set(left)
    xtc = {"xtc_probability": 1, "xtc_threshold": 0.15}
    last = {left[i] for i in xtc_oracle(scaled[left], 0.15)}
    assert kept(logits, temperature=1.5, **options, **xtc) == last


def test_ends_of_the_ranges() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3]))
    everything = {0, 1, 2, 3}
    assert kept(logits, top_n_sigma=1e-9) == {1}
    assert kept(logits, top_n_sigma=1e9) == everything
    assert kept(np.full(5, 2.0), top_n_sigma=0.5) == {0, 1, 2, 3, 4}  # no spread at all
    assert kept(logits, typical_p=1e-9) == {3}  # 0.3 is closest to the entropy, 1.28
    assert kept(np.zeros(8), typical_p=0.5) == {0, 1, 2, 3}  # equals: lower ids first
    always = {"xtc_probability": 1.0}
    assert kept(logits, **always, xtc_threshold=0.5) == everything
    assert kept(logits, **always, xtc_threshold=0.35) == everything  # the only one stays
    assert kept(logits, **always, xtc_threshold=0.25) == {0, 2, 3}
    assert kept(logits, **always, xtc_threshold=0.0) == {0}
    assert kept(np.zeros(4), **always, xtc_threshold=0.25) == {3}  # of equals the last
    masked = np.array([1.0, -np.inf, 0.5, -np.inf, -1.0])
    assert kept(masked, top_n_sigma=1.0) == {0, 2}  # the spread of those allowed
    assert kept(masked, typical_p=0.9999, xtc_probability=1, xtc_threshold=0.2) == {2, 4}


def test_a_logit_far_away_counts_as_128() -> None:
    """Padding tokens at -10,000 must not widen the spread without bounds."""
    logits = np.concatenate([np.linspace(-3, 3, 50), [-1e4, -1e30]])
    expected = sigma_oracle(np.maximum(logits, 3 - 128), 0.2)
    assert kept(logits, top_n_sigma=0.2) == expected != sigma_oracle(logits[:51], 0.2)


def test_the_random_number_of_xtc() -> None:
    """On as often as asked for; a function of seed, sample index and position, not of the noise."""
    rows = sampling.sampling_rows(4000, xtc_probability=0.3, position=np.arange(4000), seed=5)
    on = [sampling.is_excluding_top(row) for row in rows]
    assert abs(np.mean(on) - 0.3) < 3.3 * np.sqrt(0.3 * 0.7 / 4000)  # one in a thousand
    for name, value in (("seed", 6), ("sample_index", 1)):
        other = rows.copy()
        other[name] = value
        assert (
            0.3 < np.mean([sampling.is_excluding_top(row) for row in other] == np.array(on)) < 0.8
        )
    assert not sampling.is_excluding_top(sampling.sampling_rows(1)[0])
    assert all(
        sampling.is_excluding_top(row)
        for row in sampling.sampling_rows(50, xtc_probability=1, position=np.arange(50))
    )
    first_words = [sampling.random_bits(5, 0, position, 4)[0] for position in range(4000)]
    assert abs(np.corrcoef(first_words, on)[0, 1]) < 0.06


# ---- devices ----

VOCABS = [1, 5, 601, 2999]
HARD = {
    "as a model's": lambda vocab: uniform(3, 1, vocab) * uniform(5, 1, vocab) * 14,
    "flat": lambda vocab: uniform(3, 1, vocab) * np.float32(1e-3),
    "flatter than float32": lambda vocab: np.float32(1000) + uniform(3, 1, vocab) * 1e-3,
    "wide": lambda vocab: uniform(3, 1, vocab) * np.float32(60),
    "wider than any distance counts": lambda vocab: uniform(3, 1, vocab) * np.float32(1e30),
    "equal": lambda vocab: np.full((1, vocab), -3, np.float32),
    "zeros of both signs": lambda vocab: np.where(np.arange(vocab) % 3, 0.0, -0.0)[None],
    "steps of an eighth": lambda vocab: np.round(uniform(4, 1, vocab) * 24) / 8,
    "a few, then equal": lambda vocab: np.where(np.arange(vocab) % 701 == 5, 4.0, 1.0)[None],
}


def all_filters() -> dict[str, np.ndarray]:
    """Each filter by itself, and with each of the others."""
    options = []
    for sigma in (0.0, 0.05, 1.5):
        for typical in (1.0, 1e-6, 0.5, 0.97):
            for xtc in (0.0, 1.0):
                for k, p, m in ((0, 1.0, 0.0), (30, 1.0, 0.0), (0, 0.7, 0.0), (600, 0.9, 1e-3)):
                    threshold = (0.1, 1e-4, 2e-3)[len(options) % 3]
                    options.append((sigma, typical, xtc, threshold, k, p, m))
    names = (
        "top_n_sigma",
        "typical_p",
        "xtc_probability",
        "xtc_threshold",
        "top_k",
        "top_p",
        "min_p",
    )
    return {
        name: np.array(column)
        for name, column in zip(names, zip(*options, strict=True), strict=True)
    }


@functools.lru_cache(maxsize=4)
def hard_rows(name: str, vocab: int, third: bool) -> tuple[Any, Any, Any]:
    """Logits, sampling rows, and what the reference samples, which takes longest."""
    filters = all_filters()
    if third:
        first = VOCABS.index(vocab) % 3
        filters = {name: column[first::3] for name, column in filters.items()}
    count = len(filters["top_k"])
    rows = sampling.sampling_rows(
        count,
        temperature=np.resize([1, 0.4, 3], count),
        seed=vocab,
        position=np.arange(count),
        **filters,
    )
    many = np.asarray(HARD[name](vocab), np.float32).repeat(count, axis=0)
    return many, rows, sampling.sample(many, rows)


@pytest.mark.parametrize(("device", "isa"), DEVICES)
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("vocab", VOCABS)
def test_devices_where_filters_are_hard(name: str, vocab: int, device: str, isa: str) -> None:
    # An emulated row takes long: a third of them for each vocabulary.
    logits, rows, expected = hard_rows(name, vocab, device != "cpu")
    assert same_bits(_native_ops.Ops(device, 2, isa).sample(logits, rows)[0], expected)


@pytest.mark.parametrize(("device", "isa"), DEVICES)
@pytest.mark.parametrize(
    "unusual",
    [{"top_n_sigma": 3.0}, {"typical_p": 0.95}, {"xtc_probability": 1.0, "xtc_threshold": 0.4}],
)
def test_no_filter_lets_in_what_one_before_it_left_out(
    unusual: dict[str, float], device: str, isa: str
) -> None:
    """One token is left by top_k, which top_p and the others must leave alone.

    Its part of the probability of all tokens is small, and all of what is left.
    """
    logits = uniform(1, 1, 1111) * uniform(2, 1, 1111) * np.float32(2)
    count = 60
    rows = sampling.sampling_rows(
        count,
        temperature=1,
        seed=np.arange(count),
        top_k=np.resize([1, 2, 1, 7], count),
        top_p=np.resize([0.5, 0.9], count),
        min_p=np.resize([0, 0, 1e-3], count),
        **unusual,
    )
    many = logits.repeat(count, axis=0)
    tokens = _native_ops.Ops(device, 2, isa).sample(many, rows)[0]
    assert same_bits(tokens, sampling.sample(many, rows))
    assert set(tokens[rows["top_k"] == 1].tolist()) == {int(logits[0].argmax())}
    best = np.argsort(-logits[0], kind="stable")
    assert set(tokens.tolist()) <= set(best[:7].tolist())


@pytest.mark.parametrize(("device", "isa"), DEVICES)
@pytest.mark.parametrize("vocab", [49_152, 128_256])
def test_devices_with_a_whole_vocabulary(vocab: int, device: str, isa: str) -> None:
    """Rows that several blocks share; log-probabilities are asked for as well."""
    logits = uniform(1, 6, vocab) * uniform(2, 6, vocab) * np.float32(12)
    rows = sampling.sampling_rows(
        6,
        temperature=0.9,
        seed=np.arange(6),
        top_n_sigma=[1.2, 0, 0, 2.0, 0, 0],
        typical_p=[1, 0.9, 1, 0.5, 1, 1],
        xtc_probability=[0, 0, 1, 1, 0.5, 0],
        xtc_threshold=[0.1, 0.1, 1e-4, 1e-5, 1e-4, 0.1],
        top_p=[1, 1, 1, 0.95, 1, 0.9],
        num_logprobs=[2, -1, 0, 3, -1, 1],
    )
    tokens, logprobs = _native_ops.Ops(device, 2, isa).sample(logits, rows)[:2]
    assert same_bits(tokens, sampling.sample(logits, rows))
    expected = sampling.log_softmax(logits)[np.arange(6), tokens]
    asked = rows["num_logprobs"] >= 0
    np.testing.assert_allclose(logprobs[asked], expected[asked], 1e-6, 1e-5)


@pytest.mark.parametrize(("device", "isa"), DEVICES)
def test_no_token_allowed_and_logits_not_finite(device: str, isa: str) -> None:
    logits = uniform(1, 4, 70)
    logits[2, 5] = np.nan
    masks = np.full((4, 3), -1, np.int32)
    masks[1] = 0
    rows = sampling.sampling_rows(4, temperature=1, top_n_sigma=1, typical_p=0.5, xtc_probability=1)
    tokens, _, finite = _native_ops.Ops(device, 2, isa).sample(logits, rows, masks=masks)[:3]
    assert finite.tolist() == [1, 1, 0, 1] and (tokens < 70).all() and (tokens >= 0).all()
    for row in (0, 3):
        assert tokens[row] == sampling.sample(logits[row : row + 1], rows[row : row + 1])[0]
