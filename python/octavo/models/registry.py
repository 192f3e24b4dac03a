"""The model families: each has a file beside this one and an entry in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from octavo.errors import UnsupportedModelError
from octavo.models import (
    gemma2,
    gemma3,
    gpt2,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
    starcoder2,
)
from octavo.models.family import Family, GgufFamily
from octavo.models.fields import Fields
from octavo.models.nearest import describe_unknown

_ALL = (
    llama.FAMILY,
    mistral.FAMILY,
    mistral.MINISTRAL,
    mixtral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    qwen3_moe.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    phi3.FAMILY,
    smollm3.FAMILY,
    granite.FAMILY,
    olmo2.FAMILY,
    starcoder2.FAMILY,
    gpt2.FAMILY,
)
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {name: family for family in _ALL for name in (family.architecture, *family.aliases)}
)


def find_family(config: Mapping[str, Any]) -> Family:
    """The family that `architectures` names, or `model_type` where there is no such list."""
    fields = Fields(config, "config.json")
    supported = ", ".join(family.architecture for family in _ALL)
    architectures, model_type = config.get("architectures"), config.get("model_type")
    types = ", ".join(family.model_type for family in _ALL)
    if architectures is None and model_type is None:
        raise UnsupportedModelError(
            "config.json: architectures and model_type are missing; expected architectures to "
            f"name one of: {supported}"
        )
    if architectures is None:
        for family in _ALL:
            if model_type == family.model_type:
                return family
        raise UnsupportedModelError(
            f"{fields.error('model_type', model_type, types)}. {describe_unknown(config, _ALL)}"
        )
    if not isinstance(architectures, list) or not architectures:
        raise fields.error("architectures", architectures, f"a list naming {supported}")
    names = [name for name in architectures if isinstance(name, str) and name in FAMILIES]
    if not names:
        raise UnsupportedModelError(
            f"{fields.error('architectures', architectures, supported)}. "
            f"{describe_unknown(config, _ALL)}"
        )
    family = FAMILIES[names[0]]
    if model_type not in (None, family.model_type):
        expected = f"{family.model_type!r} (for {family.architecture})"
        raise fields.error("model_type", model_type, expected)
    return family


def find_gguf_family(metadata: Mapping[str, Any], source: str) -> tuple[Family, GgufFamily]:
    """The family that `general.architecture` of a GGUF file names. source: the file."""
    architecture = metadata.get("general.architecture")
    experts = bool(metadata.get(f"{architecture}.expert_count"))
    candidates = [(each, each.gguf) for each in _ALL if each.gguf]
    candidates.sort(key=lambda pair: pair[1].has_experts == experts)  # what fits comes last
    families = {pair[1].architecture: pair for pair in candidates}
    if not isinstance(architecture, str) or architecture not in families:
        supported = ", ".join(map(repr, families))
        raise Fields(metadata, source).error("general.architecture", architecture, supported)
    return families[architecture]
