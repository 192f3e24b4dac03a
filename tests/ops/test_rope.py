"""The frequencies of rope: equal to what transformers computed once, and what they mean."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from rope_cases import CASES, LENGTHS, MOST_ULPS, load_golden, read, ulps

from octavo.models import rope
from octavo.models.rope import default_rope, linear_rope, llama3_rope, longrope, yarn_rope


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", LENGTHS)
def test_as_transformers_computed_them(case: str, length: int) -> None:
    golden, ours = load_golden()[f"{case} {length}"], read(case, length)
    assert ulps(ours.frequencies, golden["frequencies"]) <= MOST_ULPS
    assert ours.attention_factor == golden["attention_factor"]


def planted(name: str, wrong: Callable[..., object]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(rope, name, wrong)


PLANTED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "half the exponent": planted(
        "_wavelengths", lambda theta, dim, own=rope._wavelengths: own(theta**0.5, dim)
    ),
    "linear multiplied": planted(
        "linear_rope", lambda theta, dim, factor: linear_rope(theta, dim, 1 / factor)
    ),
    "llama3 low and high swapped": planted(
        "llama3_rope", lambda t, d, f, low, high, n: llama3_rope(t, d, f, high, low, n)
    ),
    "yarn's betas swapped": planted(
        "yarn_rope",
        lambda *values, beta_fast, beta_slow, **rest: yarn_rope(
            *values, beta_fast=beta_slow, beta_slow=beta_fast, **rest
        ),
    ),
    "yarn's range always whole": planted(
        "yarn_rope", lambda *values, truncate, **rest: yarn_rope(*values, **rest)
    ),
    "yarn's mscale ignored": planted("yarn_mscale", lambda factor, multiplier=1.0: 1.0),
    "short and long factors swapped": planted(
        "longrope", lambda t, d, short, long, *rest: longrope(t, d, long, short, *rest)
    ),
    "the short factors beyond the original length": planted(
        "longrope", lambda t, d, short, long, *rest: longrope(t, d, short, short, *rest)
    ),
    "dynamic rope's base of another length": planted(
        "_dynamic_frequencies",
        lambda turns, n, own=rope._dynamic_frequencies: own(turns, n - 1),
    ),
    "longrope's factor left out": planted("longrope_attention_factor", lambda factor, n: 1.0),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_error_is_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[mistake](monkeypatch)
    wrong = []
    for name, golden in load_golden().items():
        case, _, length = name.rpartition(" ")
        ours = read(case, int(length))
        same = ulps(ours.frequencies, golden["frequencies"]) <= MOST_ULPS
        if not same or ours.attention_factor != golden["attention_factor"]:
            wrong.append(case)
    assert wrong


def test_known_values() -> None:
    np.testing.assert_allclose(
        default_rope(10000.0, 8).frequencies, [1, 0.1, 0.01, 0.001], rtol=1e-6
    )
    linear = linear_rope(10000.0, 8, 4.0)
    np.testing.assert_allclose(linear.frequencies, [0.25, 0.025, 0.0025, 0.00025], rtol=1e-6)
    assert (linear.kind, linear.factor, linear.theta) == ("linear", 4.0, 10000.0)


def test_llama3() -> None:
    """Fast pairs as they were, slow ones divided by the factor, in between strictly in between."""
    plain = np.array(default_rope(500000.0, 64).frequencies, np.float32)
    scaled = np.array(llama3_rope(500000.0, 64, 32.0, 1.0, 4.0, 8192).frequencies, np.float32)
    wavelengths = 2 * np.pi / plain.astype(np.float64)
    fast, slow = wavelengths < 8192 / 4, wavelengths > 8192
    assert fast.sum() >= 10 and slow.sum() >= 10 and (~fast & ~slow).sum() >= 2
    assert np.array_equal(scaled[fast], plain[fast])
    assert np.array_equal(scaled[slow], plain[slow] / np.float32(32))
    between = ~fast & ~slow
    assert ((scaled < plain) & (scaled > plain / 32))[between].all()
    assert (np.diff(scaled) < 0).all()
