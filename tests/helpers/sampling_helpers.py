"""Rows of logits and requests of all kinds, for the tests of samplers."""

from __future__ import annotations

from typing import Any

import numpy as np
from reference_helpers import uniform

from octavo.reference.sampling import log_softmax, sampling_rows
from octavo.reference.sampling import sample as reference_sample


def make_rows(seed: int, rows: int, vocab: int) -> dict[str, Any]:
    """Logits and options, a mixture of all kinds of requests; arguments of `sample`."""
    rng = np.random.default_rng(seed)

    def pick(values: list[float]) -> np.ndarray:
        return rng.choice(np.array(values), size=rows)

    logits = uniform(seed, rows, vocab) * np.float32(8)
    logits[::3] = np.round(logits[::3])  # many equal ones
    logits[1::7] *= np.float32(30)  # exponentials that vanish
    options = sampling_rows(
        rows,
        temperature=pick([0, 0.3, 0.7, 1, 1.3, 5]),
        top_k=pick([0, 0, 1, 2, 7, 40, vocab, vocab + 5]),
        top_p=pick([1, 1, 0.9, 0.5, 0.999, 1e-6]),
        min_p=pick([0, 0, 0.05, 0.5, 1, 1e-9]),
        seed=rng.integers(0, 2**64, size=rows, dtype=np.uint64),
        sample_index=rng.integers(0, 5, size=rows),
        position=rng.integers(0, 100_000, size=rows),
    )
    unusual = {
        "top_n_sigma": pick([0, 0, 0.3, 1]),
        "typical_p": pick([1, 1, 0.2, 0.9, 1e-6]),
        "xtc_probability": pick([0, 0.5, 1]),
        "xtc_threshold": pick([0.1, 0.3, 0.01, 1e-4]),
    }
    chosen = rng.random(rows) < 0.3  # the others take the fast path
    for name, values in unusual.items():
        options[name][chosen] = values[chosen]
    for name in ("top_k", "min_p"):
        options[name][chosen & (rng.random(rows) < 0.7)] = 0
    return {"logits": logits, "rows": options}


def changed(arguments: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Arguments of `sample` with other values in fields of the rows; functions make new of old."""
    rows = arguments["rows"].copy()
    for name, value in fields.items():
        rows[name] = value(rows[name]) if callable(value) else value
    return {**arguments, "rows": rows}


def with_targets(seed: int, rows: int, vocab: int) -> dict[str, Any]:
    """As `make_rows`; two of three rows have a target, and all report log-probabilities."""
    targets = np.random.default_rng(seed).integers(0, vocab, size=rows)
    targets[::3] = -1
    return changed(make_rows(seed, rows, vocab), target=targets, num_logprobs=2)


def check_targets(sample: Any, seed: int, rows: int, vocab: int) -> tuple[np.ndarray, ...]:
    """`sample` of an `Ops` takes each target, masked or not, and reports its log-probability."""
    arguments = with_targets(seed, rows, vocab)
    masks = random_masks(seed, rows, vocab)
    found: tuple[np.ndarray, ...] = sample(**arguments, masks=masks)
    tokens, logprobs, finite, top_ids = found[:4]
    assert finite.all()
    assert (tokens == reference_sample(**arguments, masks=masks)).all()
    expected = log_softmax(arguments["logits"])
    np.testing.assert_allclose(logprobs, expected[np.arange(rows), tokens], 1e-6, 1e-5)
    assert (top_ids[:, 0] == arguments["logits"].argmax(axis=1)).all()
    targets = arguments["rows"]["target"]
    assert (tokens == targets).sum() >= (targets >= 0).sum() == rows - -(-rows // 3)
    return found


def random_masks(seed: int, rows: int, vocab: int) -> np.ndarray:
    """A third of the tokens allowed, one at least; bits behind the vocabulary are set too."""
    rng = np.random.default_rng(seed)
    allowed = rng.random((rows, -(-vocab // 32) * 32)) < 1 / 3
    allowed[:, rng.integers(vocab)] = True
    allowed[:, vocab:] = True
    packed = np.packbits(allowed, axis=1, bitorder="little")
    return np.ascontiguousarray(packed).view("<i4")
