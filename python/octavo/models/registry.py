"""Which model families there are: a file beside this one, and an entry in `FAMILIES`, each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from octavo.errors import UnsupportedModelError
from octavo.models import llama
from octavo.models.fields import Fields
from octavo.models.spec import ModelSpec


@dataclass(frozen=True)
class Family:
    """How to read one architecture of Hugging Face."""

    architecture: str  # in the field `architectures` of config.json
    model_type: str  # in its field `model_type`
    read_spec: Callable[[Mapping[str, Any]], ModelSpec]
    weight_map: Callable[[ModelSpec], dict[str, str]]  # octavo's names -> Hugging Face's
    ignored_weights: tuple[str, ...]  # patterns of names that a checkpoint may hold besides
    default_eos_token_id: int | None  # where config.json has no such field


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        llama.ARCHITECTURE: Family(
            architecture=llama.ARCHITECTURE,
            model_type=llama.MODEL_TYPE,
            read_spec=llama.read_spec,
            weight_map=llama.weight_map,
            ignored_weights=llama.IGNORED_WEIGHTS,
            default_eos_token_id=llama.DEFAULT_EOS_TOKEN_ID,
        )
    }
)


def find_family(config: Mapping[str, Any]) -> Family:
    """The family that `architectures` names, or `model_type` where there is no such list."""
    supported = ", ".join(FAMILIES)
    fields = Fields(config, "config.json")
    architectures = config.get("architectures")
    model_type = config.get("model_type")
    if architectures is None and model_type is None:
        raise UnsupportedModelError(
            "config.json: architectures and model_type are missing; expected architectures to "
            f"name one of: {supported}"
        )
    if architectures is not None:
        if not isinstance(architectures, list) or not architectures:
            raise fields.error("architectures", architectures, f"a list naming {supported}")
        names = [name for name in architectures if isinstance(name, str) and name in FAMILIES]
        if not names:
            raise fields.error("architectures", architectures, supported)
        family = FAMILIES[names[0]]
        if model_type not in (None, family.model_type):
            raise fields.error(
                "model_type", model_type, f"{family.model_type!r} (for {family.architecture})"
            )
        return family
    for family in FAMILIES.values():
        if model_type == family.model_type:
            return family
    raise fields.error(
        "model_type", model_type, ", ".join(family.model_type for family in FAMILIES.values())
    )
