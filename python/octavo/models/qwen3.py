"""Qwen3 (Yang et al. 2025, arXiv 2505.09388): Llama with queries and keys normalized by head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.models import qwen_gguf
from octavo.models.family import HEAD_NORMS, LLAMA_TENSORS, Family, TensorNames
from octavo.models.qwen2 import WINDOW_FIELDS, read_windows
from octavo.models.reading import (
    Defaults,
    read_fields,
    read_layer,
    read_model,
    with_windows,
)
from octavo.models.spec import ModelSpec

ARCHITECTURE = "Qwen3ForCausalLM"
DEFAULTS = Defaults(max_position_embeddings=32768, num_key_value_heads=32, head_dim=128)


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Qwen3 configuration; UnsupportedModelError names a field that is refused."""
    fields = read_fields(config, (*WINDOW_FIELDS, "attention_bias"))
    bias = fields.boolean("attention_bias", False)
    layer = read_layer(fields, DEFAULTS, qkv_bias=bias, o_bias=bias, qk_norm="head")
    return read_model(ARCHITECTURE, fields, DEFAULTS, with_windows(layer, read_windows(fields)))


FAMILY = Family(
    architecture=ARCHITECTURE,
    aliases=("Qwen3Model",),
    model_type="qwen3",
    read_spec=read_spec,
    tensors=TensorNames({**LLAMA_TENSORS, **HEAD_NORMS}),
    gguf=qwen_gguf.QWEN3,
)
