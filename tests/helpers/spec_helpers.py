"""Small specs in which every field of a layer and of a model is used: odd sizes, few numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from octavo.models.rope import default_rope, llama3_rope
from octavo.models.spec import LayerSpec, ModelSpec, MoeSpec, NormSpec


def make_spec(
    *,
    tied: bool = False,
    model: Mapping[str, Any] = MappingProxyType({}),
    **fields: Any,
) -> ModelSpec:
    """Three layers, the second with a window. model: fields of the model; fields: of a layer."""
    width = fields.get("head_dim", 8)
    layer = LayerSpec(
        **{
            **{"num_heads": 6, "num_kv_heads": 2, "head_dim": width, "intermediate_size": 37},
            **{"norm": NormSpec(), "rope": default_rope(100.0, width), **fields},
        }
    )
    return ModelSpec(
        architecture="Test",
        vocab_size=61,
        hidden_size=22,
        max_position_embeddings=64,
        layers=(layer, replace(layer, window=5), layer),
        **{"final_norm": layer.norm, "tie_word_embeddings": tied, **model},
    )


SPECS = {
    "llama": make_spec(),
    "tied": make_spec(tied=True),
    "biases": make_spec(qkv_bias=True, o_bias=True, mlp_bias=True),
    "qwen_like": make_spec(qkv_bias=True, num_kv_heads=6),
    "gpt2_like": make_spec(
        norm=NormSpec("layer", 1e-5, bias=True),
        rope=None,
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        model={"learned_positions": True},
    ),
    "no_rope": make_spec(rope=None, o_bias=True),
    "ungated": make_spec(gated=False, mlp_bias=True),
    "scaled": make_spec(attention_scale=0.9),
    "relu": make_spec(activation="relu", num_kv_heads=1),
    # With these weights no token goes to other experts because of rounding.
    "experts": make_spec(moe=MoeSpec(4, 2)),
    "all_experts": make_spec(moe=MoeSpec(3, 3, normalize=False), activation="gelu"),
    "gelu": make_spec(activation="gelu", rope=llama3_rope(100.0, 8, 8.0, 1.0, 4.0, 32)),
    # Fields of other families, each by itself and as families have them.
    "head_norm": make_spec(qk_norm="head"),
    "row_norm": make_spec(qk_norm="row", num_heads=3, num_kv_heads=1),
    "head_norm_no_rope": make_spec(qk_norm="head", rope=None),
    "output_norm": make_spec(output_norm=NormSpec(eps=1e-3), o_bias=True),
    "softcap": make_spec(attention_softcap=0.7, attention_scale=0.9),
    "multipliers": make_spec(
        tied=True,
        residual_multiplier=0.37,
        model={"embed_multiplier": 3.3, "logits_multiplier": 0.21},
    ),
    "capped_logits": make_spec(model={"logits_softcap": 1.7, "logits_multiplier": 1.3}),
    "partial_rope": make_spec(rope=default_rope(100.0, 4)),
    "partial_rope_odd": make_spec(rope=default_rope(100.0, 6), qk_norm="head"),
    "olmo2_like": make_spec(
        norm=NormSpec("none", 1e-6),
        output_norm=NormSpec(eps=1e-6),
        qk_norm="row",
        model={"final_norm": NormSpec(eps=1e-6)},
    ),
    "gemma2_like": make_spec(
        tied=True,
        activation="gelu_tanh",
        output_norm=NormSpec(eps=1e-6),
        attention_softcap=2.0,
        model={"embed_multiplier": 4.69, "logits_softcap": 3.0},
    ),
    "gemma3_like": make_spec(
        tied=True,
        activation="gelu_tanh",
        head_dim=6,
        num_kv_heads=1,
        output_norm=NormSpec(eps=1e-6),
        qk_norm="head",
        attention_scale=0.31,
        model={"embed_multiplier": 4.69},
    ),
}
