"""Phi-3, Phi-3.5 and Phi-4-mini (Abdin et al. 2024, arXiv 2404.14219).

Llama whose checkpoints hold q, k and v in one matrix, and gate and up in another; LongRoPE, and in
Phi-4-mini rope on the first three quarters of a head only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.models import phi3_gguf
from octavo.models.family import LLAMA_TENSORS, Family, TensorNames
from octavo.models.fields import Limit
from octavo.models.reading import (
    Defaults,
    read_fields,
    read_head_dim,
    read_layer,
    read_model,
    read_num_layers,
    read_positions,
    read_window,
    with_windows,
)
from octavo.models.rope_fields import read_rope
from octavo.models.spec import ModelSpec

ARCHITECTURE = "Phi3ForCausalLM"
DEFAULTS = Defaults(max_position_embeddings=4096, norm_eps=1e-5)
_SEPARATE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Phi-3 configuration; UnsupportedModelError names a field that is refused."""
    config = {"original_max_position_embeddings": 4096, **config}  # before any inside rope_scaling
    fields = read_fields(config, ("sliding_window",))
    fields.refuse_unless("full_attn_mod", (1,), "1 (all layers are alike)")
    hidden_size = fields.integer("hidden_size", 1, Limit.WIDTH)
    num_heads = fields.integer("num_attention_heads", 1, Limit.HEADS)
    rope = read_rope(
        config,
        read_head_dim(fields, hidden_size, num_heads),
        read_positions(fields, DEFAULTS),
        partial=True,
        kinds={"su": "longrope", "yarn": "longrope"},  # the older names
    )
    windows = [read_window(fields)] * read_num_layers(fields)
    layers = with_windows(read_layer(fields, DEFAULTS, rope=rope), windows)
    return read_model(ARCHITECTURE, fields, DEFAULTS, layers)


FAMILY = Family(
    architecture=ARCHITECTURE,
    aliases=("Phi3Model",),
    model_type="phi3",
    read_spec=read_spec,
    tensors=TensorNames(
        {
            **{name: part for name, part in LLAMA_TENSORS.items() if not name.endswith(_SEPARATE)},
            "model.layers.{layer}.self_attn.qkv_proj": "q k v",
            "model.layers.{layer}.mlp.gate_up_proj": "gate up",
        }
    ),
    default_eos_token_id=32000,
    gguf=phi3_gguf.GGUF,
)
