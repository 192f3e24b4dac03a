"""GGUF files of Phi-3, Phi-3.5 and Phi-4-mini: fused matrices; LongRoPE's factors as tensors."""

from __future__ import annotations

import math
from typing import Any

from octavo.errors import UnsupportedModelError
from octavo.models.family import GgufFamily, GgufHeader, TensorNames
from octavo.models.fields import Limit
from octavo.models.gguf_reading import GGUF_TENSORS, read_common, read_rope_scaling, shortest
from octavo.models.rope import longrope_attention_factor

_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")
_ORIGINAL = "rope.scaling.original_context_length"
_ATTENTION = "rope.scaling.attn_factor"


def read_config(header: GgufHeader) -> dict[str, Any]:
    """The `config.json` of a GGUF file; UnsupportedModelError names what octavo cannot run."""
    given = [name for name in _FACTORS if name in header.constants]
    reads = ("attention.sliding_window", *([_ATTENTION] if given else []))
    entries, config = read_common(header, "phi3", reads, partial=True)
    window = entries.optional_integer("attention.sliding_window", 0, Limit.POSITIONS)
    length = config["max_position_embeddings"]
    original = entries.optional_integer(_ORIGINAL, 1, Limit.POSITIONS) or length
    if len(given) == 1:
        raise UnsupportedModelError(
            f"{header.source} holds {given[0]} only; expected both of {', '.join(_FACTORS)}"
        )
    if given:
        entries.refuse_unless("rope.scaling.factor", (1.0,), "1 (tensors divide the frequencies)")
        factor = length / original
        longrope: dict[str, Any] = {"rope_type": "longrope", "factor": factor}
        for name, field in zip(_FACTORS, ("short_factor", "long_factor"), strict=True):
            longrope[field] = [shortest(float(value)) for value in header.constants[name]]
        usual = longrope_attention_factor(factor, original)
        stated = entries.number(_ATTENTION, 0.0, default=usual, exclude_low=True)
        if not math.isclose(stated, usual, rel_tol=1e-5):
            longrope["attention_factor"] = shortest(stated)
        scaling: dict[str, Any] | None = longrope
    else:
        scaling = read_rope_scaling(entries)
    return {
        **config,
        "hidden_act": "silu",
        "original_max_position_embeddings": original,
        "rope_scaling": scaling,
        "sliding_window": window or None,
    }


_SEPARATE = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
GGUF = GgufFamily(
    architecture="phi3",
    read_config=read_config,
    tensors=TensorNames(
        {
            **{name: part for name, part in GGUF_TENSORS.items() if not name.endswith(_SEPARATE)},
            "blk.{layer}.attn_qkv": "q k v",
            "blk.{layer}.ffn_up": "gate up",
        }
    ),
    constants=_FACTORS,
)
