"""Gemma 2 (Riviere et al. 2024, arXiv 2408.00118).

Norms before and after the sublayers, whose weights are stored as the difference from 1; an
embedding multiplied by the root of its width; capped scores and logits; windows in turn with
layers that see everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.models import gemma_gguf
from octavo.models.family import LLAMA_TENSORS, Family, TensorNames, Transform
from octavo.models.fields import Fields, Limit
from octavo.models.reading import (
    Defaults,
    read_activation,
    read_eps,
    read_fields,
    read_layer,
    read_layer_types,
    read_model,
    read_num_layers,
    read_window,
    with_windows,
)
from octavo.models.spec import LayerSpec, ModelSpec, NormSpec

ARCHITECTURE = "Gemma2ForCausalLM"
DEFAULTS = Defaults(
    max_position_embeddings=8192,
    num_key_value_heads=4,
    head_dim=256,
    tie_word_embeddings=True,
)
READS = (
    *("attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types"),
    "final_logit_softcapping",
)
TENSORS = {
    **LLAMA_TENSORS,
    "model.layers.{layer}.post_attention_layernorm": "attn_out_norm",
    "model.layers.{layer}.pre_feedforward_layernorm": "mlp_norm",
    "model.layers.{layer}.post_feedforward_layernorm": "mlp_out_norm",
}
_FROM_ONE: Transform = "plus_one"
NORMS_FROM_ONE = dict.fromkeys(
    (*("attn_norm", "attn_out_norm", "mlp_norm", "mlp_out_norm"), "final_norm", "q_norm", "k_norm"),
    _FROM_ONE,
)


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Gemma 2 configuration; UnsupportedModelError names a field that is refused."""
    fields = read_fields(config, (*READS, "attn_logit_softcapping"))
    layer = read_gemma_layer(
        fields, DEFAULTS, attention_softcap=read_cap(fields, "attn_logit_softcapping", 50.0)
    )
    count, window = read_num_layers(fields), read_window(fields, 4096)
    turns = [window if index % 2 == 0 else 0 for index in range(count)]
    layers = with_windows(layer, read_layer_types(fields, count, window) or turns)
    cap = read_cap(fields, "final_logit_softcapping", 30.0)
    return read_gemma(ARCHITECTURE, fields, DEFAULTS, layers, cap)


def read_gemma_layer(fields: Fields, defaults: Defaults, **special: Any) -> LayerSpec:
    """The layer of Gemma 2 or 3. special: fields of LayerSpec."""
    name = "use_bidirectional_attention"
    fields.refuse_unless(name, (False,), "false (a token sees those before it)")
    bias, norm = fields.boolean("attention_bias", False), NormSpec(eps=read_eps(fields, defaults))
    scalar = fields.number("query_pre_attn_scalar", 0.0, 1e9, default=256, exclude_low=True)
    return read_layer(
        fields,
        defaults,
        norm=norm,
        output_norm=norm,
        activation=read_activation(fields, "hidden_activation", "gelu_pytorch_tanh"),
        qkv_bias=bias,
        o_bias=bias,
        attention_scale=scalar**-0.5,
        **special,
    )


def read_gemma(
    architecture: str,
    fields: Fields,
    defaults: Defaults,
    layers: list[LayerSpec],
    logits_softcap: float,
) -> ModelSpec:
    """The model of Gemma 2 or 3."""
    scale = fields.integer("hidden_size", 1, Limit.WIDTH) ** 0.5
    return read_model(
        architecture,
        fields,
        defaults,
        layers,
        embed_multiplier=scale,
        logits_softcap=logits_softcap,
    )


def read_cap(fields: Fields, name: str, default: float = 0.0) -> float:
    """A cap of scores or logits; 0 for null: none."""
    if name in fields.values and fields.values[name] is None:
        return 0.0
    return fields.number(name, 0.0, 1e9, default=default, exclude_low=name in fields.values)


FAMILY = Family(
    architecture=ARCHITECTURE,
    aliases=("Gemma2Model",),
    model_type="gemma2",
    read_spec=read_spec,
    tensors=TensorNames(TENSORS, NORMS_FROM_ONE),
    default_eos_token_id=1,
    gguf=gemma_gguf.GEMMA2,
)
