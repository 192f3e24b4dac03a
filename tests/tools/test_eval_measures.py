"""Surprisals, KL divergence and what is made of them: against definitions, and planted errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from octavo.eval.measures import compare, divergence, log_probabilities, perplexity, surprisals

ROWS, VOCAB = 37, 301  # more than two blocks of rows, the last one short


def logits(seed: int = 0, scale: float = 3.0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((ROWS, VOCAB)) * scale
    return values.astype(np.float32)


def targets() -> np.ndarray:
    return np.random.default_rng(9).integers(0, VOCAB, ROWS, np.int32)


def softmax(row: np.ndarray) -> list[float]:
    """By the definition, in exact order of summation."""
    weights = [math.exp(float(x) - float(row.max())) for x in row]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def test_log_probabilities_are_probabilities_whatever_is_added() -> None:
    logp = log_probabilities(logits() + np.float32(300))
    np.testing.assert_allclose(np.exp(logp).sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(np.exp(logp[0]), softmax(logits()[0] + np.float32(300)), rtol=1e-12)


def test_surprisals() -> None:
    expected = [
        -math.log(softmax(row)[target]) for row, target in zip(logits(), targets(), strict=True)
    ]
    np.testing.assert_allclose(surprisals(logits(), targets()), expected, rtol=1e-12)


def test_kl_by_its_definition() -> None:
    model, reference = logits(1), logits(2)
    found = compare(model, reference, targets())
    for row in range(ROWS):
        p, q = softmax(reference[row]), softmax(model[row])
        kl = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert found.kl[row] == pytest.approx(kl, rel=1e-11)
        assert found.same_top[row] == (p.index(max(p)) == q.index(max(q)))
    np.testing.assert_array_equal(found.surprisal, surprisals(model, targets()))
    np.testing.assert_array_equal(found.reference_surprisal, surprisals(reference, targets()))
    # Which of the two is the reference matters.
    assert not np.allclose(found.kl, compare(reference, model, targets()).kl, rtol=0.01)


def test_no_difference_is_none() -> None:
    found = compare(logits(), logits(), targets())
    assert (found.kl == 0).all() and found.same_top.all()
    # Adding a constant to a row changes no probability.
    shifted = compare(logits() + np.float32(8), logits(), targets())
    assert shifted.kl.max() < 1e-12


def test_a_small_difference_is_not_lost_in_rounding() -> None:
    """KL of a small change d of the logits is half the variance of d under p."""
    reference = logits()
    change = np.random.default_rng(3).standard_normal(reference.shape) * 1e-4
    model = (reference + change).astype(np.float32)
    change = model.astype(np.float64) - reference
    p = np.exp(log_probabilities(reference))
    variance = (p * change**2).sum(axis=1) - (p * change).sum(axis=1) ** 2
    np.testing.assert_allclose(compare(model, reference, targets()).kl, variance / 2, rtol=1e-3)


def test_one_wrong_distribution_is_seen() -> None:
    """One row of 37 with two logits exchanged: the mean says so, the median does not."""
    wrong = logits()
    best = int(wrong[20].argmax())
    wrong[20, [best, best - 1]] = wrong[20, [best - 1, best]]
    found = compare(wrong, logits(), targets())
    assert np.flatnonzero(found.kl > 1e-9).tolist() == [20]
    assert np.flatnonzero(~found.same_top).tolist() == [20]
    summary = divergence(found.kl, found.same_top, 1.0)
    assert summary.mean_kl == pytest.approx(found.kl[20] / ROWS) and summary.mean_kl > 0.001
    assert summary.median_kl == 0 and summary.max_kl == found.kl[20] >= summary.p99_kl > 0
    assert summary.top_agreement == 36 / 37


def test_perplexity() -> None:
    value = perplexity(np.log(np.array([2.0, 8.0, 4.0])))
    assert value.num_tokens == 3 and value.value == pytest.approx(4.0)
    assert value.mean_surprisal == pytest.approx(math.log(4))
    assert value.standard_error == pytest.approx(4 * math.log(2) / math.sqrt(3))
    assert perplexity(np.array([1.0])).standard_error == 0
    assert perplexity(np.array([1e4])).value == math.inf
