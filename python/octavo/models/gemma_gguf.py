"""GGUF files of Gemma 2 and Gemma 3 (text): weights of norms have 1 added to them already.

The files do not say what scores are multiplied by. It is taken from the number of layers, as in
llama.cpp: 1 / sqrt(hidden_size / heads) in the two models of 27 billion weights, in all others
1 / sqrt(head_dim).
"""

from __future__ import annotations

from typing import Any

from octavo.models.family import GgufFamily, GgufHeader, TensorNames
from octavo.models.fields import Fields, Limit
from octavo.models.gguf_reading import (
    GGUF_HEAD_NORMS,
    GGUF_TENSORS,
    read_common,
    read_rope_scaling,
    shortest,
)

_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def read_gemma2(header: GgufHeader) -> dict[str, Any]:
    """The `config.json` of a GGUF file; UnsupportedModelError names what octavo cannot run."""
    entries, config = _read(header, "gemma2", reads=(_WINDOW, *_CAPS))
    config["sliding_window"] = entries.integer(_WINDOW, 1, Limit.POSITIONS, default=4096)
    return config


def read_gemma3(header: GgufHeader) -> dict[str, Any]:
    """The `config.json` of a GGUF file; UnsupportedModelError names what octavo cannot run."""
    reads = (_WINDOW, _PATTERN, "rope.freq_base_swa", _CAPS[1])
    entries, config = _read(header, "gemma3", reads)
    config["sliding_window"] = window = entries.optional_integer(_WINDOW, 1, Limit.POSITIONS)
    if window is None:
        config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    config["sliding_window_pattern"] = entries.integer(_PATTERN, 1, Limit.LAYERS, default=6)
    local = entries.number("rope.freq_base_swa", 0.0, default=10000.0, exclude_low=True)
    config["rope_local_base_freq"] = shortest(local)
    return config


def _read(
    header: GgufHeader, architecture: str, reads: tuple[str, ...]
) -> tuple[Fields, dict[str, Any]]:
    entries, config = read_common(header, architecture, reads)
    of_27b = config["num_hidden_layers"] == _LAYERS_OF_27B[architecture]
    heads = config["num_attention_heads"]
    scalar = config["hidden_size"] // heads if of_27b else config["head_dim"]
    config |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "rope_scaling": read_rope_scaling(entries),
    }
    for name in _CAPS:
        if entries.values.get(name):
            config[name] = shortest(entries.number(name, 0.0, 1e9))
    return entries, config


_TENSORS = TensorNames(
    {
        **GGUF_TENSORS,
        **GGUF_HEAD_NORMS,
        "blk.{layer}.post_attention_norm": "attn_out_norm",
        "blk.{layer}.post_ffw_norm": "mlp_out_norm",
    }
)
GEMMA2 = GgufFamily("gemma2", read_gemma2, _TENSORS)
GEMMA3 = GgufFamily("gemma3", read_gemma3, _TENSORS)
