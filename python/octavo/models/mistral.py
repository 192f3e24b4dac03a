"""Mistral (Jiang et al. 2023, arXiv 2310.06825): Llama, with a window in the first 7B.

Nemo has heads that are narrower than hidden_size implies; Small is larger and else the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.models.family import Family, TensorNames
from octavo.models.fields import Fields
from octavo.models.reading import (
    LLAMA_IGNORED,
    LLAMA_TENSORS,
    Defaults,
    read_layer,
    read_layer_types,
    read_model,
    read_num_layers,
    read_window,
    refuse_changes,
    with_windows,
)
from octavo.models.spec import ModelSpec

ARCHITECTURE = "MistralForCausalLM"
DEFAULTS = Defaults(max_position_embeddings=131072, num_key_value_heads=8)


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Mistral configuration; UnsupportedModelError names a field that is refused."""
    fields = Fields(config, "config.json")
    refuse_changes(fields, reads=("sliding_window", "layer_types"))
    count, window = read_num_layers(fields), read_window(fields, 4096)
    windows = [window] * count
    # transformers' Mistral has one window for all layers and does not look at the list.
    if read_layer_types(fields, count, window) not in (None, windows):
        raise fields.error(
            "layer_types",
            fields.values["layer_types"],
            "one kind for all layers, sliding_attention where there is a sliding_window (windows "
            "in turn with full layers are of the architecture MinistralForCausalLM)",
        )
    return read_model(
        ARCHITECTURE, fields, DEFAULTS, with_windows(read_layer(fields, DEFAULTS), windows)
    )


FAMILY = Family(
    architecture=ARCHITECTURE,
    model_type="mistral",
    read_spec=read_spec,
    tensors=TensorNames(LLAMA_TENSORS),
    ignored=LLAMA_IGNORED,
    default_eos_token_id=2,
)
