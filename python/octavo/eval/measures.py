"""Numbers about distributions over the vocabulary, in float64: not by what they are to judge."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]

_ROWS = 16  # rows at a time: their float64 copies stay in a cache of the processor


def log_probabilities(logits: Float32) -> Float64:
    """log(softmax(logits)) over the last axis, in float64. logits: (rows, vocab_size)."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def surprisals(logits: Float32, targets: Int32) -> Float64:
    """-log p(target) of each row, in nats. logits: (rows, vocab_size); targets: (rows,)."""
    result = np.empty(len(targets), np.float64)
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, start + _ROWS)
        logp = log_probabilities(logits[rows])
        result[rows] = -logp[np.arange(len(logp)), targets[rows]]
    return result


@dataclass(frozen=True)
class Compared:
    """Two models' distributions at some positions; arrays of one entry a position."""

    surprisal: Float64  # of the model in question
    reference_surprisal: Float64
    kl: Float64  # KL(reference || model), nats
    same_top: NDArray[np.bool_]  # whether both find the same token the most probable


def compare(logits: Float32, reference: Float32, targets: Int32) -> Compared:
    """Compare two models' logits, each (rows, vocab_size), at the same positions.

    KL is the sum over the vocabulary of p log(p / q) - p + q, p being the reference's: the last
    two cancel in exact arithmetic, and with them no term is negative, so that a small divergence
    is not lost among rounding errors of either sign.
    """
    count = len(targets)
    result = Compared(
        np.empty(count), np.empty(count), np.empty(count), np.empty(count, dtype=np.bool_)
    )
    for start in range(0, count, _ROWS):
        rows = slice(start, start + _ROWS)
        log_q, log_p = log_probabilities(logits[rows]), log_probabilities(reference[rows])
        index = np.arange(len(log_q)), targets[rows]
        result.surprisal[rows] = -log_q[index]
        result.reference_surprisal[rows] = -log_p[index]
        p = np.exp(log_p)
        terms = p * (log_p - log_q)
        terms += np.exp(log_q) - p
        result.kl[rows] = np.maximum(terms, 0.0).sum(axis=-1)
        result.same_top[rows] = logits[rows].argmax(axis=-1) == reference[rows].argmax(axis=-1)
    return result


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean surprisal. Surprisals in nats.

    standard_error: of the perplexity, as if the tokens were independent of each other; they are
    not, so that it says what the order of magnitude is. 0 for a single token.
    """

    num_tokens: int
    mean_surprisal: float
    value: float
    standard_error: float


def perplexity(surprisal: Float64) -> Perplexity:
    """From the surprisals of all scored tokens; infinite where a token had no probability."""
    mean = float(surprisal.mean())
    value = math.exp(mean) if mean < 700.0 else math.inf
    spread = float(surprisal.std(ddof=1)) if len(surprisal) > 1 else 0.0
    return Perplexity(len(surprisal), mean, value, value * spread / math.sqrt(len(surprisal)))


@dataclass(frozen=True)
class Divergence:
    """How far a model's distributions lie from the reference's, over all scored positions.

    KL(reference || model) in nats; top_agreement: the share of positions, 0 to 1, at which both
    find the same token the most probable; perplexity_ratio: the model's over the reference's.
    """

    mean_kl: float
    median_kl: float
    p99_kl: float
    max_kl: float
    top_agreement: float
    perplexity_ratio: float


def divergence(kl: Float64, same_top: NDArray[np.bool_], ratio: float) -> Divergence:
    """Sum up what `compare` found. Percentiles are interpolated linearly."""
    return Divergence(
        mean_kl=float(kl.mean()),
        median_kl=float(np.median(kl)),
        p99_kl=float(np.percentile(kl, 99)),
        max_kl=float(kl.max()),
        top_agreement=float(same_top.mean()),
        perplexity_ratio=ratio,
    )
