"""Ministral: Mistral with windows in turn with layers that see everything (`layer_types`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.models.family import Family, TensorNames
from octavo.models.fields import Fields
from octavo.models.mistral import DEFAULTS
from octavo.models.reading import (
    LLAMA_IGNORED,
    LLAMA_TENSORS,
    read_layer,
    read_layer_types,
    read_model,
    read_num_layers,
    read_window,
    refuse_changes,
    with_windows,
)
from octavo.models.spec import ModelSpec

ARCHITECTURE = "MinistralForCausalLM"


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Ministral configuration; UnsupportedModelError names a refused field."""
    fields = Fields(config, "config.json")
    refuse_changes(fields, reads=("sliding_window", "layer_types"))
    count, window = read_num_layers(fields), read_window(fields, 4096)
    windows = read_layer_types(fields, count, window) or [window] * count
    return read_model(
        ARCHITECTURE, fields, DEFAULTS, with_windows(read_layer(fields, DEFAULTS), windows)
    )


FAMILY = Family(
    architecture=ARCHITECTURE,
    model_type="ministral",
    read_spec=read_spec,
    tensors=TensorNames(LLAMA_TENSORS),
    ignored=LLAMA_IGNORED,
    default_eos_token_id=2,
)
