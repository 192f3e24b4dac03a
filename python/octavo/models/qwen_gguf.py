"""GGUF files of Qwen2, Qwen2.5 and Qwen3: rows of q and k are in Hugging Face's order."""

from __future__ import annotations

from typing import Any

from octavo.models.family import GgufFamily, GgufHeader, TensorNames
from octavo.models.gguf_reading import (
    GGUF_HEAD_NORMS,
    GGUF_TENSORS,
    read_common,
    read_rope_scaling,
)


def read_qwen2(header: GgufHeader) -> dict[str, Any]:
    """The `config.json` of a GGUF file; UnsupportedModelError names what octavo cannot run."""
    return _read(header, "qwen2")


def read_qwen3(header: GgufHeader) -> dict[str, Any]:
    """The `config.json` of a GGUF file; UnsupportedModelError names what octavo cannot run."""
    return {**_read(header, "qwen3"), "attention_bias": "blk.0.attn_q.bias" in header.shapes}


def _read(header: GgufHeader, architecture: str) -> dict[str, Any]:
    entries, config = read_common(header, architecture)
    return {**config, "hidden_act": "silu", "rope_scaling": read_rope_scaling(entries)}


QWEN2 = GgufFamily("qwen2", read_qwen2, TensorNames(GGUF_TENSORS))
QWEN3 = GgufFamily("qwen3", read_qwen3, TensorNames({**GGUF_TENSORS, **GGUF_HEAD_NORMS}))
