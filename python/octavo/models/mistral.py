"""Mistral (Jiang et al. 2023, arXiv 2310.06825): Llama, with a window in the first 7B.

Nemo has heads that are narrower than hidden_size implies; Small is larger and else the same.
Ministral has windows in turn with layers that see everything (`layer_types`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.models.family import Family
from octavo.models.reading import (
    Defaults,
    read_fields,
    read_layer,
    read_layer_types,
    read_model,
    read_num_layers,
    read_window,
    with_windows,
)
from octavo.models.spec import ModelSpec

ARCHITECTURE, MINISTRAL_ARCHITECTURE = "MistralForCausalLM", "MinistralForCausalLM"
DEFAULTS = Defaults(max_position_embeddings=131072, num_key_value_heads=8)


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Mistral configuration; UnsupportedModelError names a field that is refused."""
    return _read(ARCHITECTURE, config)


def read_ministral(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Ministral configuration; UnsupportedModelError names a refused field."""
    return _read(MINISTRAL_ARCHITECTURE, config)


def _read(architecture: str, config: Mapping[str, Any]) -> ModelSpec:
    fields = read_fields(config, ("sliding_window", "layer_types"))
    count, window = read_num_layers(fields), read_window(fields, 4096)
    windows = read_layer_types(fields, count, window) or [window] * count
    # transformers' Mistral has one window for all layers and does not look at the list.
    if architecture == ARCHITECTURE and windows != [window] * count:
        raise fields.error(
            "layer_types",
            fields.values["layer_types"],
            "one kind for all layers, sliding_attention where there is a sliding_window (windows "
            f"in turn with full layers are of the architecture {MINISTRAL_ARCHITECTURE})",
        )
    layer = read_layer(fields, DEFAULTS)
    return read_model(architecture, fields, DEFAULTS, with_windows(layer, windows))


FAMILY = Family(
    architecture=ARCHITECTURE,
    aliases=("MistralModel",),
    model_type="mistral",
    read_spec=read_spec,
    default_eos_token_id=2,
)
MINISTRAL = Family(
    architecture=MINISTRAL_ARCHITECTURE,
    aliases=("MinistralModel",),
    model_type="ministral",
    read_spec=read_ministral,
    default_eos_token_id=2,
)
