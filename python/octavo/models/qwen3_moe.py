"""Qwen3's models of experts (Yang et al. 2025, arXiv 2505.09388): 30B-A3B, 235B-A22B.

Queries and keys are normalized head by head. Layers of `mlp_only_layers`, and all but every
`decoder_sparse_step`th, have an MLP of their own width in place of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.models import qwen_gguf
from octavo.models.family import HEAD_NORMS, LLAMA_TENSORS, Family, TensorNames, expert_tensors
from octavo.models.fields import Fields, Limit
from octavo.models.reading import (
    Defaults,
    read_fields,
    read_layer,
    read_model,
    read_moe,
    read_num_layers,
    read_window,
)
from octavo.models.spec import ModelSpec

ARCHITECTURE = "Qwen3MoeForCausalLM"
DEFAULTS = Defaults(max_position_embeddings=32768, num_key_value_heads=4)
_EXPERTS = ("num_experts", "num_local_experts")  # transformers writes the second one


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of such a configuration; UnsupportedModelError names a field that is refused."""
    reads = ("sliding_window", "use_sliding_window", "attention_bias", *_EXPERTS)
    fields = read_fields(config, reads)
    has_bias = fields.boolean("attention_bias", False)
    window = read_window(fields, 4096) if fields.boolean("use_sliding_window", False) else 0
    dense = read_layer(
        fields, DEFAULTS, qkv_bias=has_bias, o_bias=has_bias, qk_norm="head", window=window
    )
    name = next((name for name in _EXPERTS if name in fields.values), _EXPERTS[0])
    normalize = fields.boolean("norm_topk_prob", False)
    moe = read_moe(fields, name, num_experts=128, experts_per_token=8, normalize=normalize)
    width = fields.integer("moe_intermediate_size", 1, Limit.INTERMEDIATE, default=768)
    sparse = replace(dense, intermediate_size=width, moe=moe)
    layers = [sparse if is_sparse else dense for is_sparse in _sparse_layers(fields)]
    return read_model(ARCHITECTURE, fields, DEFAULTS, layers)


def _sparse_layers(fields: Fields) -> list[bool]:
    """Whether each layer has experts."""
    count = read_num_layers(fields)
    step = fields.integer("decoder_sparse_step", 1, Limit.LAYERS, default=1)
    dense = fields.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise fields.error("mlp_only_layers", dense, "a list of the numbers of layers, or null")
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(count)]


FAMILY = Family(
    architecture=ARCHITECTURE,
    aliases=("Qwen3MoeModel",),
    model_type="qwen3_moe",
    read_spec=read_spec,
    tensors=TensorNames(
        {
            **LLAMA_TENSORS,
            **HEAD_NORMS,
            **expert_tensors("mlp", "gate_proj", "up_proj", "down_proj"),
        }
    ),
    gguf=qwen_gguf.QWEN3_MOE,
)
