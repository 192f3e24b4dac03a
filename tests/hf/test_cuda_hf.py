"""The CUDA backend beside transformers: random models, in float32 tap by tap and in bf16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cuda_helpers import DEVICE, needs_cuda
from reference_helpers import NativeModel

from hf.hf_models import SHAPES, hf_logits, hf_taps, make_hf_model, save_and_read
from octavo.models.layer import tap_names

pytestmark = [pytest.mark.hf, needs_cuda]
TOLERANCE = 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_every_tap_equals_transformers(shape: str, tmp_path: Path) -> None:
    model = make_hf_model(SHAPES[shape], seed=len(shape))
    files, weights = save_and_read(model, tmp_path)
    tokens = np.random.default_rng(7).integers(0, 307, size=75)
    expected = hf_taps(model, tokens)
    taps: dict[str, np.ndarray] = {}
    NativeModel(files.spec, weights, device=DEVICE).forward(tokens, taps)
    assert list(taps) == tap_names(files.spec)
    for name, value in taps.items():
        np.testing.assert_allclose(value, expected[name], atol=TOLERANCE, rtol=0, err_msg=name)


@pytest.mark.parametrize("shape", ["smollm_9_3x64", "plain_3x128"])
def test_greedy_tokens_equal_transformers(shape: str, tmp_path: Path) -> None:
    model = make_hf_model(SHAPES[shape], seed=len(shape) + 1)
    files, weights = save_and_read(model, tmp_path)
    prompt = np.random.default_rng(8).integers(0, 307, size=21)
    answer = NativeModel(files.spec, weights, device=DEVICE).greedy(prompt, 20)
    logits = hf_logits(model, np.concatenate([prompt, answer[:-1]]))
    assert logits[20:].argmax(axis=1).tolist() == answer


@pytest.mark.parametrize("shape", ["smollm_9_3x64", "gqa8_8_1x64_llama3", "plain_3x128"])
def test_bf16_is_no_further_from_float32_than_transformers(shape: str, tmp_path: Path) -> None:
    import torch

    model = make_hf_model(SHAPES[shape], seed=len(shape))
    files, weights = save_and_read(model, tmp_path)
    tokens = np.random.default_rng(9).integers(0, 307, size=75)
    exact = hf_logits(model, tokens)
    ours = NativeModel(files.spec, weights, dtype="bf16", kv_dtype="bf16", device=DEVICE)
    found = ours.forward(tokens, logit_rows=np.arange(75))
    theirs = hf_logits(model.to(torch.bfloat16), tokens)
    error, their_error = (np.sqrt(np.mean((x - exact) ** 2)) for x in (found, theirs))
    assert error <= 1.25 * their_error, (error, their_error)
