"""What most families have in their config.json under the same names, read and checked once.

A family file reads what is its own, and passes it to `read_layer` and `read_model`. Fields that
would change the result and that the family does not read are refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from octavo.models.fields import Fields, Limit
from octavo.models.rope_fields import read_rope
from octavo.models.spec import Activation, LayerSpec, ModelSpec, MoeSpec, NormSpec

# Hugging Face's names of the activations, by the formula they stand for.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

_NO_EXPERTS, _NO_CAP = "null (no mixture of experts)", "null (logits are not capped)"
_CAUSAL = "causal attention (a token sees itself and those before it)"
_NO_BIAS, _NO_SCALE = "false (no biases)", "1 (nothing is multiplied)"
# Fields of some family that change the result: the values that stand for no change, and why.
_CHANGES: dict[str, tuple[tuple[object, ...], str]] = {
    # weights/quantization_config.py reads `quantization_config`; this is its old spelling.
    "compression_config": (
        (),
        "unquantized weights (null), or a quantization_config of compressed-tensors",
    ),
    "sliding_window": ((), "null (every token attends to all before it)"),
    "use_sliding_window": ((False,), "false (every token attends to all before it)"),
    "no_rope_layers": ((), "null (every layer rotates)"),
    "pretraining_tp": ((1,), "1 (set it so: the weights are the same)"),
    "use_bidirectional_attention": ((False,), f"false: {_CAUSAL}"),
    "is_causal": ((True,), f"true: {_CAUSAL}"),
    "is_encoder_decoder": ((False,), "false (decoder-only models)"),
    "add_cross_attention": ((False,), "false (decoder-only models)"),
    "vision_config": ((), "null (text only)"),
    "audio_config": ((), "null (text only)"),
    "num_experts": ((), _NO_EXPERTS),
    "num_local_experts": ((), _NO_EXPERTS),
    "n_routed_experts": ((), _NO_EXPERTS),
    "attn_logit_softcapping": ((), _NO_CAP),
    "final_logit_softcapping": ((), _NO_CAP),
    "logit_scale": ((1, 1.0), _NO_SCALE),
    "logits_scaling": ((1, 1.0), _NO_SCALE),
    "embedding_multiplier": ((1, 1.0), _NO_SCALE),
    "residual_multiplier": ((1, 1.0), _NO_SCALE),
    "attention_multiplier": ((), "null (scores are divided by the root of head_dim)"),
    "query_pre_attn_scalar": ((), "null (scores are divided by the root of head_dim)"),
    "attention_bias": ((False,), _NO_BIAS),
    "mlp_bias": ((False,), _NO_BIAS),
    "use_bias": ((False,), _NO_BIAS),
    "lm_head_bias": ((False,), _NO_BIAS),
    "use_qk_norm": ((False,), "false (queries and keys are not normalized)"),
    "clip_qkv": ((), "null (queries, keys and values are not clipped)"),
    "alibi": ((False,), "false (positions are rotations)"),
    "parallel_attn": ((False,), "false (attention, then the MLP)"),
    "use_parallel_residual": ((False,), "false (attention, then the MLP)"),
}


@dataclass(frozen=True)
class Defaults:
    """The values of missing fields: those of the family's configuration class in transformers."""

    max_position_embeddings: int
    num_key_value_heads: int | None = None  # None: as many as query heads, as for null
    head_dim: int | None = None  # None: hidden_size implies it, as for null
    norm_eps: float = 1e-6
    activation: str = "silu"
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False


def read_fields(config: Mapping[str, Any], reads: Collection[str] = ()) -> Fields:
    """The fields of config.json. Refused are those that change what a model computes.

    reads: those that the family reads, and which are not refused here.
    """
    fields = Fields(config, "config.json")
    for name, (neutral, advice) in _CHANGES.items():
        if name not in reads:
            fields.refuse_unless(name, neutral, advice)
    types = fields.values.get("layer_types")
    if "layer_types" in reads or types is None:
        return fields
    if not isinstance(types, list) or any(kind != "full_attention" for kind in types):
        raise fields.error("layer_types", types, "full_attention in every layer")
    return fields


def read_layer(fields: Fields, defaults: Defaults, **special: Any) -> LayerSpec:
    """The layer that the common fields describe. special: fields of LayerSpec in their place."""
    hidden_size = fields.integer("hidden_size", 1, Limit.WIDTH)
    num_heads = fields.integer("num_attention_heads", 1, Limit.HEADS)
    num_kv_heads = read_kv_heads(fields, num_heads, defaults.num_key_value_heads)
    head_dim = read_head_dim(fields, hidden_size, num_heads, defaults.head_dim)
    if "norm" not in special:
        special["norm"] = NormSpec(kind="rms", eps=read_eps(fields, defaults))
    if "activation" not in special:
        special["activation"] = read_activation(fields, "hidden_act", defaults.activation)
    if "rope" not in special:
        positions = read_positions(fields, defaults)
        special["rope"] = read_rope(fields.values, head_dim, positions, theta=defaults.rope_theta)
    return LayerSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size", 1, Limit.INTERMEDIATE),
        **special,
    )


def read_model(
    architecture: str,
    fields: Fields,
    defaults: Defaults,
    layers: Sequence[LayerSpec],
    final_norm: NormSpec | None = None,
    **special: Any,
) -> ModelSpec:
    """The model of these layers.

    A window that the longest sequence does not outgrow is none. final_norm: None takes the
    layers'. special: fields of ModelSpec.
    """
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size", 1, Limit.VOCAB),
        hidden_size=fields.integer("hidden_size", 1, Limit.WIDTH),
        max_position_embeddings=read_positions(fields, defaults),
        layers=tuple(layers),
        final_norm=final_norm or layers[0].norm,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", defaults.tie_word_embeddings),
        **special,
    )
    longest = spec.longest_sequence
    fitted = [replace(each, window=0) if each.window >= longest else each for each in layers]
    return replace(spec, layers=tuple(fitted))


def read_positions(fields: Fields, defaults: Defaults) -> int:
    """The most tokens of a sequence."""
    name, default = "max_position_embeddings", defaults.max_position_embeddings
    return fields.integer(name, 1, Limit.POSITIONS, default=default)


def read_eps(fields: Fields, defaults: Defaults) -> float:
    """What a norm adds to the mean square."""
    return fields.number("rms_norm_eps", 0.0, 1.0, default=defaults.norm_eps)


def read_num_layers(fields: Fields) -> int:
    """How many layers the model has."""
    return fields.integer("num_hidden_layers", 1, Limit.LAYERS)


def read_kv_heads(fields: Fields, num_heads: int, default: int | None = None) -> int:
    """`null` means as many as query heads, as in configurations older than grouped attention."""
    name = "num_key_value_heads"
    if name in fields.values or default is None:
        default = num_heads
    num_kv_heads = fields.optional_integer(name, 1, Limit.HEADS) or default
    if num_heads % num_kv_heads:
        raise fields.error(name, num_kv_heads, f"a divisor of num_attention_heads ({num_heads})")
    return num_kv_heads


def read_head_dim(
    fields: Fields, hidden_size: int, num_heads: int, default: int | None = None
) -> int:
    """The elements of a head, given or implied; even, for rope."""
    head_dim = fields.optional_integer("head_dim", 1, Limit.HEAD_DIM)
    if head_dim is None and "head_dim" not in fields.values:
        head_dim = default
    if head_dim is None:
        if hidden_size % num_heads:
            raise fields.error(
                "hidden_size",
                hidden_size,
                f"a multiple of num_attention_heads ({num_heads}), or a head_dim of its own",
            )
        head_dim = hidden_size // num_heads
    if head_dim % 2 or head_dim > Limit.HEAD_DIM:
        expected = f"an even number up to {Limit.HEAD_DIM} (for rope)"
        raise fields.error("head_dim", head_dim, expected)
    return head_dim


def read_activation(fields: Fields, name: str, default: str) -> Activation:
    """The activation that a field names."""
    activation = fields.values.get(name, default)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise fields.error(name, activation, ", ".join(ACTIVATIONS))
    return ACTIVATIONS[activation]


def read_moe(
    fields: Fields, name: str, *, num_experts: int, experts_per_token: int, normalize: bool = True
) -> MoeSpec:
    """The experts of a layer. name: of the field with their number; the numbers: defaults."""
    count = fields.integer(name, 1, Limit.EXPERTS, default=num_experts)
    chosen = fields.integer("num_experts_per_tok", 1, count, default=experts_per_token)
    return MoeSpec(count, chosen, normalize)


def read_window(fields: Fields, default: int | None = None) -> int:
    """How many positions a token sees, itself included; 0 for null: all of them."""
    name = "sliding_window"
    if name not in fields.values:
        return default or 0
    return fields.optional_integer(name, 1, Limit.POSITIONS) or 0


def read_layer_types(fields: Fields, count: int, window: int) -> list[int] | None:
    """Each layer's window, by its entry in `layer_types`; None where there is no such list."""
    types, windows = fields.values.get("layer_types"), {"full_attention": 0}
    if types is None:
        return None
    if window:
        windows["sliding_attention"] = window
    if not isinstance(types, list) or len(types) != count:
        raise fields.error("layer_types", types, f"a list of {count}, one for each layer")
    for kind in types:
        if not isinstance(kind, str) or kind not in windows:
            expected = "full_attention, or with a sliding_window sliding_attention"
            raise fields.error("layer_types", kind, expected)
    return [windows[kind] for kind in types]


def with_windows(layer: LayerSpec, windows: Sequence[int]) -> list[LayerSpec]:
    """A layer for each window, alike in all else."""
    return [replace(layer, window=window) for window in windows]
