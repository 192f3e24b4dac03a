"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv 2407.10671): Llama with biases of q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.models import qwen_gguf
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
    with_windows,
)
from octavo.models.spec import ModelSpec

ARCHITECTURE = "Qwen2ForCausalLM"
DEFAULTS = Defaults(max_position_embeddings=32768, num_key_value_heads=32)
WINDOW_FIELDS = ("sliding_window", "use_sliding_window", "layer_types")


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Qwen2 configuration; UnsupportedModelError names a field that is refused."""
    fields = read_fields(config, WINDOW_FIELDS)
    layer = read_layer(fields, DEFAULTS, qkv_bias=True)
    return read_model(ARCHITECTURE, fields, DEFAULTS, with_windows(layer, read_windows(fields)))


def read_windows(fields: Fields) -> list[int]:
    """Each layer's window: with use_sliding_window, of the layers from max_window_layers on."""
    count = read_num_layers(fields)
    window = read_window(fields, 4096) if fields.boolean("use_sliding_window", False) else 0
    first = fields.integer("max_window_layers", 0, 2**20, default=28)
    by_number = [window if layer >= first else 0 for layer in range(count)]
    return read_layer_types(fields, count, window) or by_number


FAMILY = Family(
    architecture=ARCHITECTURE,
    aliases=("Qwen2Model",),
    model_type="qwen2",
    read_spec=read_spec,
    gguf=qwen_gguf.QWEN2,
)
