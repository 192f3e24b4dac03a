"""The golden files: what Hugging Face computed once, for tests that must do without it.

tests/golden/tiny_models.json   configurations, seeds of the weights, tokens
tests/golden/tiny_models.npz    for each: logits, and the residual stream after every layer
tests/golden/smollm2.json       prompts as token ids, 64 greedy tokens, and the largest logits of
                                each prompt's last position

tests/golden/make_golden.py makes them; its --check shows that transformers still says the same.
Weights are not stored: `reference_helpers.random_weights` makes them again from the seed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from reference_helpers import Float32, random_weights

from octavo.models.llama import read_spec
from octavo.models.spec import ModelSpec

GOLDEN = Path(__file__).parents[1] / "golden"
TINY_CONFIGS = GOLDEN / "tiny_models.json"
TINY_RESULTS = GOLDEN / "tiny_models.npz"
SMOLLM2 = GOLDEN / "smollm2.json"


@dataclass(frozen=True)
class TinyModel:
    """One golden model: its configuration and what transformers makes of its tokens."""

    config: dict[str, Any]  # config.json
    seed: int
    tokens: np.ndarray  # (rows,)
    logits: Float32  # (rows, vocab_size)
    hidden: Float32  # (layers + 1, rows, hidden_size): the embedding, then after each layer

    @property
    def spec(self) -> ModelSpec:
        return read_spec(self.config)

    @property
    def weights(self) -> dict[str, Float32]:
        return random_weights(self.spec, self.seed)


def load_tiny_models() -> dict[str, TinyModel]:
    entries = json.loads(TINY_CONFIGS.read_text())
    with np.load(TINY_RESULTS) as results:
        return {
            name: TinyModel(
                entry["config"],
                entry["seed"],
                np.array(entry["tokens"]),
                results[f"{name}.logits"],
                results[f"{name}.hidden"],
            )
            for name, entry in entries.items()
        }


@dataclass(frozen=True)
class SmolLM2Prompt:
    """One golden prompt of SmolLM2."""

    tokens: list[int]
    answer: list[int]  # 64 greedy tokens
    top_tokens: list[int]  # of the prompt's last position, largest logit first
    top_logits: list[float]


def load_smollm2() -> dict[str, SmolLM2Prompt]:
    return {name: SmolLM2Prompt(**entry) for name, entry in json.loads(SMOLLM2.read_text()).items()}
