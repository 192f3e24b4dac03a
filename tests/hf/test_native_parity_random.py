"""The native core against transformers, tap by tap, on random models of every shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from reference_helpers import NativeModel, same_bits

from hf.hf_models import SHAPES, hf_logits, hf_taps, make_hf_model, save_and_read
from octavo import _native
from octavo.models.layer import tap_names

pytestmark = pytest.mark.hf
TOLERANCE = 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_every_tap_equals_transformers(shape: str, tmp_path: Path) -> None:
    model = make_hf_model(SHAPES[shape], seed=len(shape))
    files, weights = save_and_read(model, tmp_path)
    tokens = np.random.default_rng(7).integers(0, 307, size=150)
    expected = hf_taps(model, tokens)

    first: dict[str, np.ndarray] = {}
    for isa in _native.available_isas():
        taps: dict[str, np.ndarray] = {}
        NativeModel(files.spec, weights, isa=isa).forward(tokens, taps)
        assert list(taps) == tap_names(files.spec)
        for name, value in taps.items():
            np.testing.assert_allclose(
                value, expected[name], atol=TOLERANCE, rtol=0, err_msg=f"{name} on {isa}"
            )
        first = first or taps
        assert all(same_bits(taps[name], first[name]) for name in taps), isa


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_equal_transformers(shape: str, tmp_path: Path) -> None:
    model = make_hf_model(SHAPES[shape], seed=len(shape) + 1)
    files, weights = save_and_read(model, tmp_path)
    prompt = np.random.default_rng(8).integers(0, 307, size=21)
    answer = NativeModel(files.spec, weights).greedy(prompt, 40)
    # If the choice at every step, given the steps before, is transformers', all of them are.
    logits = hf_logits(model, np.concatenate([prompt, answer[:-1]]))
    assert logits[20:].argmax(axis=1).tolist() == answer
