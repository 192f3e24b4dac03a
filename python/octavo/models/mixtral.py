"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): Mistral with eight experts, two for each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.models import llama_gguf
from octavo.models.family import LLAMA_TENSORS, Family, TensorNames, expert_tensors
from octavo.models.reading import (
    Defaults,
    read_fields,
    read_layer,
    read_model,
    read_moe,
    read_num_layers,
    read_window,
    with_windows,
)
from octavo.models.spec import ModelSpec

ARCHITECTURE = "MixtralForCausalLM"
DEFAULTS = Defaults(
    max_position_embeddings=131072, num_key_value_heads=8, norm_eps=1e-5, rope_theta=1e6
)


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Mixtral configuration; UnsupportedModelError names a field that is refused."""
    fields = read_fields(config, ("sliding_window", "num_local_experts"))
    moe = read_moe(fields, "num_local_experts", num_experts=8, experts_per_token=2)
    layer = replace(read_layer(fields, DEFAULTS), moe=moe)
    windows = [read_window(fields)] * read_num_layers(fields)
    return read_model(ARCHITECTURE, fields, DEFAULTS, with_windows(layer, windows))


FAMILY = Family(
    architecture=ARCHITECTURE,
    aliases=("MixtralModel",),
    model_type="mixtral",
    read_spec=read_spec,
    tensors=TensorNames(
        {
            **LLAMA_TENSORS,
            **expert_tensors("block_sparse_moe", "w1", "w3", "w2"),
        }
    ),
    default_eos_token_id=2,
    gguf=llama_gguf.MIXTRAL,
)
