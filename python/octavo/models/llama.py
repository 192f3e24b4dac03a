"""The Llama family (Touvron et al. 2023; Llama 3: Grattafiori et al. 2024).

From a Hugging Face configuration of `LlamaForCausalLM` to a `ModelSpec`, and from octavo's names
of the weights to Hugging Face's. Defaults of missing fields are those of transformers'
`LlamaConfig`. A field that changes the result in a way that octavo does not compute is refused by
name; none is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.models import llama_gguf
from octavo.models.family import Family
from octavo.models.reading import (
    Defaults,
    read_fields,
    read_layer,
    read_model,
    read_num_layers,
)
from octavo.models.spec import ModelSpec

ARCHITECTURE = "LlamaForCausalLM"
DEFAULTS = Defaults(max_position_embeddings=2048)


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Llama configuration; UnsupportedModelError names a field that is refused."""
    fields = read_fields(config, ("attention_bias", "mlp_bias"))
    has_bias = fields.boolean("attention_bias", False)
    mlp_bias = fields.boolean("mlp_bias", False)
    layer = read_layer(fields, DEFAULTS, qkv_bias=has_bias, o_bias=has_bias, mlp_bias=mlp_bias)
    return read_model(ARCHITECTURE, fields, DEFAULTS, [layer] * read_num_layers(fields))


FAMILY = Family(
    architecture=ARCHITECTURE,
    aliases=("LlamaModel",),
    model_type="llama",
    read_spec=read_spec,
    default_eos_token_id=2,
    gguf=llama_gguf.GGUF,
)
