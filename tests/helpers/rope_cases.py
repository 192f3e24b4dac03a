"""Configurations of every kind of rope, and what transformers made of them (golden/rope.json)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from octavo.models.rope import at_length
from octavo.models.rope_fields import read_rope
from octavo.models.spec import LayerSpec, ModelSpec, NormSpec, RopeSpec

GOLDEN = Path(__file__).parents[1] / "golden" / "rope.json"
HEAD_DIM = 48
MAX_POSITIONS = 640
# Of sequences: within the original length of every case, beyond that of most, and of dynamic rope.
LENGTHS = (100, 640, 901)

# Of float32: torch's power may be one step off, and its reciprocal two.
MOST_ULPS = 2

_ORIGINAL = {"original_max_position_embeddings": 128}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **_ORIGINAL}
_SHORT = [1.0 + 0.03 * i for i in range(24)]
_LONG = [1.0 + 0.41 * i**1.5 for i in range(24)]
_PHI3 = {"model_type": "phi3", "pad_token_id": None, "rms_norm_eps": 1e-5}

CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 10000.0},
    "theta inside": {"rope_theta": 3.0, "rope_parameters": {"rope_theta": 1e6}},
    "linear": {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "llama3": {
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", "factor": 32.0, **_LLAMA3},
    },
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, **_ORIGINAL}},
    "yarn, every field": {
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 5.0, **_ORIGINAL},
            **{"beta_fast": 20.0, "beta_slow": 1.5, "mscale": 0.8, "mscale_all_dim": 1.2},
            "truncate": False,
        }
    },
    "yarn, own factor": {
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 150000.0, "factor": 8.0, **_ORIGINAL},
            **{"attention_factor": 0.75},
        }
    },
    "longrope": {
        **_PHI3,
        **_ORIGINAL,
        "rope_scaling": {"type": "longrope", "short_factor": _SHORT, "long_factor": _LONG},
    },
    "longrope, partial": {
        **_PHI3,
        **_ORIGINAL,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            **{"type": "longrope", "short_factor": _SHORT[:18], "long_factor": _LONG[:18]},
            "attention_factor": 1.3,
        },
    },
}


def config_of(case: str) -> dict[str, Any]:
    """A whole configuration, of Llama unless the case is of Phi-3."""
    return {
        **{"model_type": "llama", "vocab_size": 61, "hidden_size": 2 * HEAD_DIM},
        **{"intermediate_size": 52, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "max_position_embeddings": MAX_POSITIONS},
        **CASES[case],
    }


def read(case: str, length: int) -> RopeSpec:
    """octavo's rope of a case, for sequences of that length."""
    config = config_of(case)
    phi3 = config["model_type"] == "phi3"
    rope = read_rope(config, HEAD_DIM, MAX_POSITIONS, partial=phi3)
    layer = LayerSpec(2, 2, HEAD_DIM, 52, NormSpec(), rope)
    chosen = at_length(ModelSpec("", 61, 96, 640, (layer,), NormSpec(), True), length).layers[0]
    assert chosen.rope is not None and chosen == replace(layer, rope=chosen.rope)
    return chosen.rope


def load_golden() -> dict[str, dict[str, Any]]:
    """By "case length": frequencies and attention_factor."""
    entries: dict[str, dict[str, Any]] = json.loads(GOLDEN.read_text())
    return entries


def ulps(one: Any, other: Any) -> int:
    """By how many float32 steps two lists of numbers above 0 differ at most."""
    left, right = (np.asarray(values, np.float32).view(np.int32) for values in (one, other))
    assert left.shape == right.shape
    return int(np.abs(left - right).max())
