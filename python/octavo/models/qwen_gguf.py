"""GGUF files of Qwen2, Qwen2.5 and Qwen3, whose rows of q and k are in Hugging Face's order."""

from __future__ import annotations

from typing import Any

from octavo.models.family import GgufFamily, GgufHeader, TensorNames
from octavo.models.fields import Fields, Limit
from octavo.models.gguf_reading import (
    EXPERT_ENTRIES,
    GGUF_EXPERTS,
    GGUF_HEAD_NORMS,
    GGUF_TENSORS,
    read_common,
    read_experts,
    read_rope_scaling,
)


def read_qwen2(header: GgufHeader) -> dict[str, Any]:
    """The `config.json` of a GGUF file; UnsupportedModelError names what octavo cannot run."""
    return _read(header, "qwen2")[1]


def read_qwen3(header: GgufHeader) -> dict[str, Any]:
    """The `config.json` of a GGUF file; UnsupportedModelError names what octavo cannot run."""
    has_bias = "blk.0.attn_q.bias" in header.shapes
    return {**_read(header, "qwen3")[1], "attention_bias": has_bias}


def read_qwen3_moe(header: GgufHeader) -> dict[str, Any]:
    """The `config.json` of a GGUF file; UnsupportedModelError names what octavo cannot run."""
    entries, config = _read(header, "qwen3moe", reads=EXPERT_ENTRIES)
    count, used = read_experts(entries)
    width = entries.integer("expert_feed_forward_length", 1, Limit.INTERMEDIATE)
    return {
        **config,
        "moe_intermediate_size": width,
        "norm_topk_prob": True,  # llama.cpp knows no other way
        "num_experts": count,
        "num_experts_per_tok": used,
    }


def _read(
    header: GgufHeader, architecture: str, reads: tuple[str, ...] = ()
) -> tuple[Fields, dict[str, Any]]:
    entries, config = read_common(header, architecture, reads)
    own = {"hidden_act": "silu", "rope_scaling": read_rope_scaling(entries)}
    return entries, {**config, **own}


QWEN2 = GgufFamily("qwen2", read_qwen2, TensorNames(GGUF_TENSORS))
_TENSORS = {**GGUF_TENSORS, **GGUF_HEAD_NORMS}
QWEN3 = GgufFamily("qwen3", read_qwen3, TensorNames(_TENSORS))
QWEN3_MOE = GgufFamily("qwen3moe", read_qwen3_moe, TensorNames({**_TENSORS, **GGUF_EXPERTS}))
