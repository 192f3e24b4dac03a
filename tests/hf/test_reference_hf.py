"""The NumPy reference against transformers, layer by layer, on random models of every shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hf.hf_models import SHAPES, hf_logits, hf_taps, make_hf_model, save_and_read
from octavo.models.layer import tap_names
from octavo.reference.llama import KVCache, ReferenceModel

pytestmark = pytest.mark.hf
TOLERANCE = 3e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_every_tap_equals_transformers(shape: str, tmp_path: Path) -> None:
    model = make_hf_model(SHAPES[shape], seed=len(shape))
    files, weights = save_and_read(model, tmp_path)
    tokens = np.random.default_rng(7).integers(0, 307, size=150)
    expected = hf_taps(model, tokens)

    taps: dict[str, np.ndarray] = {}
    logits = ReferenceModel(files.spec, weights).forward(tokens, taps=taps)

    assert list(taps) == tap_names(files.spec)
    assert set(expected) == set(taps)
    for name, value in taps.items():
        assert expected[name].std() > 0.05, f"{name} says nothing: it hardly varies"
        np.testing.assert_allclose(value, expected[name], atol=TOLERANCE, rtol=0, err_msg=name)
    np.testing.assert_array_equal(logits, taps["logits"])


@pytest.mark.parametrize("shape", ["smollm_9_3x64", "gqa8_8_1x64_llama3"])
def test_cached_steps_equal_transformers(shape: str, tmp_path: Path) -> None:
    model = make_hf_model(SHAPES[shape], seed=3)
    files, weights = save_and_read(model, tmp_path)
    tokens = np.random.default_rng(8).integers(0, 307, size=40)
    expected = hf_logits(model, tokens)

    reference, cache = ReferenceModel(files.spec, weights), KVCache()
    pieces = np.split(tokens, [17, 18, 19, 30])
    logits = np.concatenate([reference.forward(piece, cache) for piece in pieces])
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("shape", ["plain_4x32", "gqa8_16_2x80_llama3_biases"])
def test_float64_judges(shape: str, tmp_path: Path) -> None:
    """Computing in float64 finds transformers in float64, and what float32 costs either."""
    model = make_hf_model(SHAPES[shape], seed=5)
    files, weights = save_and_read(model, tmp_path)
    tokens = np.random.default_rng(9).integers(0, 307, size=60)
    single = ReferenceModel(files.spec, weights).forward(tokens)
    double = ReferenceModel(files.spec, weights, compute=np.float64).forward(tokens)
    assert single.dtype == np.float32 and double.dtype == np.float64
    of_single = np.abs(single - double).max()
    of_transformers = np.abs(hf_logits(model, tokens) - double).max()
    of_double = np.abs(hf_logits(model.double(), tokens) - double).max()
    assert 0 < of_single < TOLERANCE
    assert 0 < of_transformers < TOLERANCE
    # Cosines rounded to float32 differ between libraries even here; nothing else does.
    assert of_double < 0.5 * min(of_single, of_transformers)
