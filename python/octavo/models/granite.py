"""Granite 3 (IBM 2024): Llama with multipliers of the embedding, scores, sublayers and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.models.family import Family
from octavo.models.fields import Fields
from octavo.models.reading import (
    Defaults,
    read_fields,
    read_layer,
    read_model,
    read_num_layers,
)
from octavo.models.spec import ModelSpec

ARCHITECTURE = "GraniteForCausalLM"
DEFAULTS = Defaults(max_position_embeddings=2048)
_READS = (
    *("attention_bias", "mlp_bias", "embedding_multiplier", "residual_multiplier"),
    *("attention_multiplier", "logits_scaling"),
)


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Granite configuration; UnsupportedModelError names a field that is refused."""
    fields = read_fields(config, _READS)
    bias = fields.boolean("attention_bias", False)
    layer = read_layer(
        fields,
        DEFAULTS,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.boolean("mlp_bias", False),
        attention_scale=_multiplier(fields, "attention_multiplier"),
        residual_multiplier=_multiplier(fields, "residual_multiplier"),
    )
    return read_model(
        ARCHITECTURE,
        fields,
        DEFAULTS,
        [layer] * read_num_layers(fields),
        embed_multiplier=_multiplier(fields, "embedding_multiplier"),
        logits_multiplier=1 / _multiplier(fields, "logits_scaling"),
    )


def _multiplier(fields: Fields, name: str) -> float:
    return fields.number(name, 0.0, 1e6, default=1.0, exclude_low=True)


FAMILY = Family(
    architecture=ARCHITECTURE,
    aliases=("GraniteModel",),
    model_type="granite",
    read_spec=read_spec,
    default_eos_token_id=2,
)
