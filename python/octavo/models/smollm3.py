"""SmolLM3: Llama with layers in turn that do not rotate (NoPE; Yang et al. 2025, arXiv 2501.18795).

It may also have windows, in the layers without rope.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.models.family import Family
from octavo.models.fields import Fields
from octavo.models.reading import (
    Defaults,
    read_fields,
    read_layer,
    read_layer_types,
    read_model,
    read_num_layers,
    read_window,
)
from octavo.models.spec import ModelSpec

ARCHITECTURE = "SmolLM3ForCausalLM"
DEFAULTS = Defaults(
    max_position_embeddings=32768,
    num_key_value_heads=4,
    rope_theta=2000000.0,
    tie_word_embeddings=True,
)
# pretraining_tp is 2 in the published configuration, and transformers has no use for it.
_READS = (
    *("no_rope_layers", "attention_bias", "mlp_bias", "pretraining_tp"),
    *("sliding_window", "use_sliding_window", "layer_types"),
)


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a SmolLM3 configuration; UnsupportedModelError names a field that is refused."""
    fields = read_fields(config, _READS)
    count, has_bias = read_num_layers(fields), fields.boolean("attention_bias", False)
    mlp_bias = fields.boolean("mlp_bias", False)
    layer = read_layer(fields, DEFAULTS, qkv_bias=has_bias, o_bias=has_bias, mlp_bias=mlp_bias)
    rotates = _rotating_layers(fields, count)
    window = read_window(fields) if fields.boolean("use_sliding_window", False) else 0
    windows = read_layer_types(fields, count, window) or [0 if turn else window for turn in rotates]
    layers = [
        replace(layer, rope=layer.rope if turn else None, window=window)
        for turn, window in zip(rotates, windows, strict=True)
    ]
    return read_model(ARCHITECTURE, fields, DEFAULTS, layers)


def _rotating_layers(fields: Fields, count: int) -> list[bool]:
    """Which layers rotate: those with a 1 in no_rope_layers, or all but every n-th."""
    listed = fields.values.get("no_rope_layers")
    if listed is None:
        every = fields.integer("no_rope_layer_interval", 1, 2**20, default=4)
        return [layer % every != 0 for layer in range(1, count + 1)]
    is_list = isinstance(listed, list) and len(listed) >= count
    if not is_list or any(type(each) is not int or each not in (0, 1) for each in listed):
        expected = f"a list of {count} times 0 (no rope) or 1, for each layer"
        raise fields.error("no_rope_layers", listed, expected)
    return [bool(each) for each in listed[:count]]


FAMILY = Family(
    architecture=ARCHITECTURE,
    aliases=("SmolLM3Model",),
    model_type="smollm3",
    read_spec=read_spec,
    default_eos_token_id=128001,
)
