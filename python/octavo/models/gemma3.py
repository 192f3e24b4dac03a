"""Gemma 3 (Gemma Team 2025, arXiv 2503.19786), the text model.

Gemma 2 without caps of scores; queries and keys normalized by head; five layers with a window, and
a rope of their own, for one that sees everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.models import gemma_gguf
from octavo.models.family import HEAD_NORMS, Family, TensorNames
from octavo.models.gemma2 import (
    NORMS_FROM_ONE,
    READS,
    TENSORS,
    read_cap,
    read_gemma,
    read_gemma_layer,
)
from octavo.models.reading import (
    Defaults,
    read_fields,
    read_layer_types,
    read_num_layers,
    read_positions,
    read_window,
)
from octavo.models.rope_fields import read_rope
from octavo.models.spec import ModelSpec

ARCHITECTURE = "Gemma3ForCausalLM"
DEFAULTS = Defaults(
    max_position_embeddings=131072,
    num_key_value_heads=4,
    head_dim=256,
    tie_word_embeddings=True,
)


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Gemma 3 configuration; UnsupportedModelError names a field that is refused."""
    fields = read_fields(config, READS)
    layer = read_gemma_layer(fields, DEFAULTS, rope=None, qk_norm="head")
    positions = read_positions(fields, DEFAULTS)
    full = {**config, **_merged_rope(config)}
    # The older spelling: one rope_scaling, of the layers that see everything, and two thetas.
    local = {
        "rope_parameters": config.get("rope_parameters"),
        "rope_theta": config.get("rope_local_base_freq", 10000.0),
    }
    ropes = {
        kind: read_rope(values, layer.head_dim, positions, theta=1000000.0, layer_type=kind)
        for kind, values in (("full_attention", full), ("sliding_attention", local))
    }
    count, window = read_num_layers(fields), read_window(fields, 4096)
    every = fields.integer("sliding_window_pattern", 1, 2**20, default=6)
    types = fields.values.get("layer_types")
    if types is None:
        kinds = ("full_attention", "sliding_attention")
        types = [kinds[bool((index + 1) % every)] for index in range(count)]
    windows = read_layer_types(fields, count, window) or [
        window if kind == "sliding_attention" else 0 for kind in types
    ]
    layers = [
        replace(layer, rope=ropes[kind], window=each)
        for kind, each in zip(types, windows, strict=True)
    ]
    cap = read_cap(fields, "final_logit_softcapping")
    return read_gemma(ARCHITECTURE, fields, DEFAULTS, layers, cap)


def _merged_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope fields of a file with both spellings: one object, as transformers merges them.

    A field of `rope_scaling` comes before the same of the layers that see everything.
    """
    parameters, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    own = parameters.get("full_attention") if isinstance(parameters, dict) else None
    if not isinstance(own, dict) or not isinstance(scaling, dict):
        return {}
    return {"rope_scaling": None, "rope_parameters": {"full_attention": {**own, **scaling}}}


FAMILY = Family(
    architecture=ARCHITECTURE,
    aliases=("Gemma3TextModel",),
    model_type="gemma3_text",
    read_spec=read_spec,
    tensors=TensorNames({**TENSORS, **HEAD_NORMS}, NORMS_FROM_ONE),
    default_eos_token_id=1,
    gguf=gemma_gguf.GEMMA3,
)
