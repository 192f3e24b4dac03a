"""OLMo 2 (OLMo et al. 2025, arXiv 2501.00656).

Norms after the sublayers and none before them; queries and keys normalized, all heads together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.models.family import HEAD_NORMS, LLAMA_TENSORS, Family, TensorNames
from octavo.models.reading import (
    Defaults,
    read_eps,
    read_fields,
    read_layer,
    read_model,
    read_num_layers,
)
from octavo.models.spec import ModelSpec, NormSpec

ARCHITECTURE = "Olmo2ForCausalLM"
DEFAULTS = Defaults(max_position_embeddings=2048, norm_eps=1e-5)


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of an OLMo 2 configuration; UnsupportedModelError names a field that is refused."""
    fields = read_fields(config, ("attention_bias",))
    bias, norm = fields.boolean("attention_bias", False), NormSpec(eps=read_eps(fields, DEFAULTS))
    layer = read_layer(
        fields,
        DEFAULTS,
        norm=NormSpec(kind="none", eps=norm.eps),
        output_norm=norm,
        qk_norm="row",
        qkv_bias=bias,
        o_bias=bias,
    )
    layers = [layer] * read_num_layers(fields)
    return read_model(ARCHITECTURE, fields, DEFAULTS, layers, final_norm=norm)


FAMILY = Family(
    architecture=ARCHITECTURE,
    aliases=("Olmo2Model",),
    model_type="olmo2",
    read_spec=read_spec,
    tensors=TensorNames(
        {
            **{name: part for name, part in LLAMA_TENSORS.items() if "layernorm" not in name},
            **HEAD_NORMS,
            "model.layers.{layer}.post_attention_layernorm": "attn_out_norm",
            "model.layers.{layer}.post_feedforward_layernorm": "mlp_out_norm",
        }
    ),
    default_eos_token_id=50279,
)
