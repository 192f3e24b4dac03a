"""The Llama family (Touvron et al. 2023; Llama 3: Grattafiori et al. 2024).

From a Hugging Face configuration of `LlamaForCausalLM` to a `ModelSpec`, and from octavo's names
of the weights to Hugging Face's. Defaults of missing fields are those of transformers'
`LlamaConfig`. A field that changes the result in a way that octavo does not compute is refused by
name; none is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.models import llama_gguf
from octavo.models.family import Family, TensorNames
from octavo.models.fields import Fields, Limit
from octavo.models.rope_fields import read_rope
from octavo.models.spec import Activation, LayerSpec, ModelSpec, NormSpec

ARCHITECTURE = "LlamaForCausalLM"

# Hugging Face's names of the activations, by the formula they stand for.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Llama configuration; UnsupportedModelError names a field that is refused."""
    fields = Fields(config, "config.json")
    _refuse_variants(fields)
    hidden_size = fields.integer("hidden_size", 1, Limit.WIDTH)
    num_heads = fields.integer("num_attention_heads", 1, Limit.HEADS)
    # `null` means as many as query heads, as in configurations older than grouped attention.
    num_kv_heads = fields.optional_integer("num_key_value_heads", 1, Limit.HEADS) or num_heads
    if num_heads % num_kv_heads:
        raise fields.error(
            "num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads ({num_heads})"
        )
    max_positions = fields.integer("max_position_embeddings", 1, Limit.POSITIONS, default=2048)
    attention_bias = fields.boolean("attention_bias", False)
    norm = NormSpec(kind="rms", eps=fields.number("rms_norm_eps", 0.0, 1.0, default=1e-6))
    activation = config.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise fields.error("hidden_act", activation, ", ".join(ACTIVATIONS))
    head_dim = _head_dim(fields, hidden_size, num_heads)
    layer = LayerSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size", 1, Limit.INTERMEDIATE),
        norm=norm,
        rope=read_rope(config, head_dim, max_positions),
        activation=ACTIVATIONS[activation],
        gated=True,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=fields.boolean("mlp_bias", False),
    )
    return ModelSpec(
        architecture=ARCHITECTURE,
        vocab_size=fields.integer("vocab_size", 1, Limit.VOCAB),
        hidden_size=hidden_size,
        max_position_embeddings=max_positions,
        layers=(layer,) * fields.integer("num_hidden_layers", 1, Limit.LAYERS),
        final_norm=norm,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
    )


def _head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    head_dim = fields.optional_integer("head_dim", 1, Limit.HEAD_DIM)
    if head_dim is None:
        if hidden_size % num_heads:
            raise fields.error(
                "hidden_size",
                hidden_size,
                f"a multiple of num_attention_heads ({num_heads}), or a head_dim of its own",
            )
        head_dim = hidden_size // num_heads
    if head_dim % 2 or head_dim > Limit.HEAD_DIM:
        raise fields.error(
            "head_dim", head_dim, f"an even number up to {Limit.HEAD_DIM} (for rope)"
        )
    return head_dim


def _refuse_variants(fields: Fields) -> None:
    """Fields that change what a Llama model computes, or how its weights are stored."""
    # weights/quantization_config.py reads `quantization_config`; this is its old spelling.
    unquantized = "unquantized weights (null), or a quantization_config of compressed-tensors"
    fields.refuse_unless("compression_config", (), unquantized)
    fields.refuse_unless("sliding_window", (), "null (every token attends to all before it)")
    fields.refuse_unless("pretraining_tp", (1,), "1 (set it so: the weights are the same)")
    fields.refuse_unless("partial_rotary_factor", (1, 1.0), "1 (the whole head is rotated)")
    for name in ("is_encoder_decoder", "add_cross_attention"):
        fields.refuse_unless(name, (False,), "false (decoder-only models)")
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        fields.refuse_unless(name, (), "null (no mixture of experts)")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        fields.refuse_unless(name, (), "null (logits are not capped)")
    layer_types = fields.values.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        raise fields.error("layer_types", layer_types, "full_attention in every layer")


FAMILY = Family(
    architecture=ARCHITECTURE,
    model_type="llama",
    read_spec=read_spec,
    tensors=TensorNames(
        {
            "model.embed_tokens": "embed",
            "model.layers.{layer}.input_layernorm": "attn_norm",
            "model.layers.{layer}.self_attn.q_proj": "q",
            "model.layers.{layer}.self_attn.k_proj": "k",
            "model.layers.{layer}.self_attn.v_proj": "v",
            "model.layers.{layer}.self_attn.o_proj": "o",
            "model.layers.{layer}.post_attention_layernorm": "mlp_norm",
            "model.layers.{layer}.mlp.gate_proj": "gate",
            "model.layers.{layer}.mlp.up_proj": "up",
            "model.layers.{layer}.mlp.down_proj": "down",
            "model.norm": "final_norm",
            "lm_head": "lm_head",
        }
    ),
    # Old checkpoints carry the rope frequencies as buffers; they follow from the configuration.
    ignored=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
    default_eos_token_id=2,
    gguf=llama_gguf.GGUF,
)
