"""The frequencies of every kind of rope, as transformers computes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rope_cases import CASES, LENGTHS, MOST_ULPS, config_of, load_golden, read, ulps
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from octavo.models import rope


def theirs(case: str, length: int) -> tuple[np.ndarray, float]:
    """transformers' frequencies and factor for a sequence of that length."""
    config = config_of(case)
    phi3 = config["model_type"] == "phi3"
    module: Any = (
        Phi3RotaryEmbedding(Phi3Config(**config))
        if phi3
        else LlamaRotaryEmbedding(LlamaConfig(**config))
    )
    module(torch.zeros(1), torch.arange(length)[None])
    return module.inv_freq.numpy(), float(module.attention_scaling)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", LENGTHS)
def test_frequencies_and_factor(case: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    frequencies, factor = theirs(case, length)
    assert read(case, length).attention_factor == factor
    assert ulps(read(case, length).frequencies, frequencies) <= MOST_ULPS
    # With the power of torch, which may be a float32 step away from the exact one: every bit.
    monkeypatch.setattr(rope, "_wavelengths", torch_wavelengths)
    assert ulps(read(case, length).frequencies, frequencies) == 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_golden_file_is_up_to_date(case: str, length: int) -> None:
    frequencies, factor = theirs(case, length)
    stored = load_golden()[f"{case} {length}"]
    assert ulps(stored["frequencies"], frequencies) <= MOST_ULPS  # another torch, another power
    assert stored["attention_factor"] == factor


def torch_wavelengths(theta: float, dim: int) -> np.ndarray:
    return (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)).numpy()
