"""The perplexity of `octavo eval` is the one that transformers gives."""

from __future__ import annotations

import math
from importlib import resources

import numpy as np
import pytest
import torch
from reference_helpers import SMOLLM2_MISSING, smollm2_path

from hf.hf_smollm2 import SmolLM2
from octavo.config import EngineConfig, read_environment
from octavo.eval.evaluation import EvalRequest, evaluate

pytestmark = [
    pytest.mark.hf,
    pytest.mark.slow,
    pytest.mark.skipif(smollm2_path() is None, reason=SMOLLM2_MISSING),
]


def hf_perplexity(
    smollm2: SmolLM2, tokens: np.ndarray, window: int, stride: int, most: int
) -> float:
    """As Hugging Face's "Perplexity of fixed-length models" has it: labels of -100 do not count."""
    total, count, done = 0.0, 0, 0
    for number, begin in enumerate(range(0, len(tokens), stride)):
        end = min(begin + window, len(tokens))
        ids = torch.from_numpy(tokens[begin:end])[None]
        labels = ids.clone()
        labels[:, : max(done - begin, 0)] = -100
        with torch.no_grad():
            loss = float(smollm2.hf_model(ids, labels=labels).loss)  # mean over what counts
        scored = int((labels[:, 1:] != -100).sum())
        total, count, done = total + loss * scored, count + scored, end
        if end == len(tokens) or number + 1 == most:
            break
    return math.exp(total / count)


@pytest.mark.parametrize(("window", "stride", "most"), [(200, 100, 4), (100, 100, 5)])
def test_perplexity_is_that_of_transformers(
    window: int, stride: int, most: int, smollm2: SmolLM2
) -> None:
    text = resources.files("octavo.eval").joinpath("text.txt").read_text(encoding="utf-8")
    expected = hf_perplexity(smollm2, smollm2.tokens(text), window, stride, most)
    request = EvalRequest(
        str(smollm2.path),
        EngineConfig(device="cpu", dtype="f32"),
        window=window,
        stride=stride,
        max_windows=most,
    )
    result = evaluate(request, read_environment())
    assert result.model.perplexity.value == pytest.approx(expected, rel=1e-4)
