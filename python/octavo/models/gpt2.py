"""GPT-2 (Radford et al. 2019).

Learned positions, LayerNorm with biases, no gate; the checkpoint's matrices are (inputs, outputs),
and q, k and v are one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.models.family import Family, TensorNames, Transform
from octavo.models.fields import Fields, Limit
from octavo.models.reading import read_activation, read_fields
from octavo.models.spec import LayerSpec, ModelSpec, NormSpec

ARCHITECTURE = "GPT2LMHeadModel"


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a GPT-2 configuration; UnsupportedModelError names a field that is refused."""
    fields = read_fields(config)
    hidden_size = fields.integer("n_embd", 1, Limit.WIDTH, default=768)
    num_heads = fields.integer("n_head", 1, Limit.HEADS, default=12)
    head_dim = hidden_size // num_heads
    if hidden_size % num_heads or head_dim % 2 or head_dim > Limit.HEAD_DIM:
        expected = f"n_head ({num_heads}) times an even number up to {Limit.HEAD_DIM}"
        raise fields.error("n_embd", hidden_size, expected)
    inner = fields.optional_integer("n_inner", 1, Limit.INTERMEDIATE) or 4 * hidden_size
    eps = fields.number("layer_norm_epsilon", 0.0, 1.0, default=1e-5)
    norm = NormSpec(kind="layer", eps=eps, bias=True)
    activation = read_activation(fields, "activation_function", "gelu_new")
    layers = [
        LayerSpec(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            intermediate_size=inner,
            norm=norm,
            rope=None,
            activation=activation,
            gated=False,
            qkv_bias=True,
            o_bias=True,
            mlp_bias=True,
            attention_scale=scale,
        )
        for scale in _scales(fields, head_dim)
    ]
    return ModelSpec(
        architecture=ARCHITECTURE,
        vocab_size=fields.integer("vocab_size", 1, Limit.VOCAB, default=50257),
        hidden_size=hidden_size,
        max_position_embeddings=fields.integer("n_positions", 1, Limit.POSITIONS, default=1024),
        layers=tuple(layers),
        final_norm=norm,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
        learned_positions=True,
    )


def _scales(fields: Fields, head_dim: int) -> list[float | None]:
    """Each layer's factor of scores; None where it is 1 / sqrt(head_dim)."""
    count = fields.integer("n_layer", 1, Limit.LAYERS, default=12)
    is_scaled = fields.boolean("scale_attn_weights", True)
    by_layer = fields.boolean("scale_attn_by_inverse_layer_idx", False)
    if is_scaled and not by_layer:
        return [None] * count
    scale = head_dim**-0.5 if is_scaled else 1.0
    return [scale / (1 + layer if by_layer else 1) for layer in range(count)]


_TRANSPOSED: Transform = "transpose"
FAMILY = Family(
    architecture=ARCHITECTURE,
    aliases=("GPT2Model",),
    model_type="gpt2",
    read_spec=read_spec,
    tensors=TensorNames(
        {
            "transformer.wte": "embed",
            "transformer.wpe": "positions",
            "transformer.h.{layer}.ln_1": "attn_norm",
            "transformer.h.{layer}.attn.c_attn": "q k v",
            "transformer.h.{layer}.attn.c_proj": "o",
            "transformer.h.{layer}.ln_2": "mlp_norm",
            "transformer.h.{layer}.mlp.c_fc": "up",
            "transformer.h.{layer}.mlp.c_proj": "down",
            "transformer.ln_f": "final_norm",
            "lm_head": "lm_head",
        },
        transforms=dict.fromkeys(("q", "k", "v", "o", "up", "down"), _TRANSPOSED),
    ),
    base_prefix="transformer.",
    # Causal masks, which old checkpoints carry as buffers.
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),
    default_eos_token_id=50256,
)
