"""StarCoder2 (Lozhkov et al. 2024, arXiv 2402.19173).

LayerNorm with biases, biases in every matrix, an MLP without a gate; the larger two have a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.models.family import LLAMA_TENSORS, Family, TensorNames
from octavo.models.reading import (
    Defaults,
    read_fields,
    read_layer,
    read_model,
    read_num_layers,
    read_window,
    with_windows,
)
from octavo.models.spec import ModelSpec, NormSpec

ARCHITECTURE = "Starcoder2ForCausalLM"
DEFAULTS = Defaults(
    max_position_embeddings=4096,
    num_key_value_heads=2,
    norm_eps=1e-5,
    activation="gelu_pytorch_tanh",
    tie_word_embeddings=True,
)


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a StarCoder2 configuration; UnsupportedModelError names a refused field."""
    fields = read_fields(config, ("sliding_window", "use_bias"))
    bias = fields.boolean("use_bias", True)
    eps = fields.number("norm_epsilon", 0.0, 1.0, default=DEFAULTS.norm_eps)
    layer = read_layer(
        fields,
        DEFAULTS,
        norm=NormSpec(kind="layer", eps=eps, bias=True),
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
    )
    windows = [read_window(fields)] * read_num_layers(fields)
    return read_model(ARCHITECTURE, fields, DEFAULTS, with_windows(layer, windows))


FAMILY = Family(
    architecture=ARCHITECTURE,
    aliases=("Starcoder2Model",),
    model_type="starcoder2",
    read_spec=read_spec,
    tensors=TensorNames(
        {
            **{name: part for name, part in LLAMA_TENSORS.items() if ".mlp." not in name},
            "model.layers.{layer}.mlp.c_fc": "up",
            "model.layers.{layer}.mlp.c_proj": "down",
        }
    ),
    default_eos_token_id=50256,
)
