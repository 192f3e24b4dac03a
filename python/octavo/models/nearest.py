"""What octavo lacks for a family that it does not know, and which of its own is nearest.

The families themselves say so: each reads the configuration, and what it refuses is taken out and
noted until it accepts the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from typing import Any

from octavo.errors import UnsupportedModelError
from octavo.models.family import Family
from octavo.models.fields import FieldError, describe, printable

# What fields stand for that only some family reads, or none. A value that is falsy says no.
_MEANINGS = {
    "shared_expert_intermediate_size": "shared experts",
    "n_shared_experts": "shared experts",
    "num_shared_experts": "shared experts",
    "moe_intermediate_size": "experts of a width of their own",
    "first_k_dense_replace": "experts from some layer on only",
    "kv_lora_rank": "latent attention (MLA)",
    "q_lora_rank": "latent attention (MLA)",
    "state_size": "state-space layers",
    "ssm_cfg": "state-space layers",
    "mamba_d_state": "state-space layers",
    "linear_num_key_heads": "linear attention",
    "attention_sinks": "attention sinks",
    "swiglu_limit": "a limited activation",
    "rotary_dim": "rope of neighbouring elements",
    "alibi": "positions as biases of scores (ALiBi)",
    "parallel_attn": "attention and MLP side by side",
    "use_parallel_residual": "attention and MLP side by side",
    "encoder_layers": "an encoder",
    "is_encoder_decoder": "an encoder",
    "d_kv": "an encoder",
    "vision_config": "images",
    "audio_config": "sound",
    "text_config": "a model of several parts",
}
_MOST = 12  # fields refused one after the other; a family that needs more is not near


class _Recorded(dict[str, Any]):
    """A configuration that notes which of its fields were read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.read.add(str(name))
        return super().__contains__(name)


def describe_unknown(config: Mapping[str, Any], families: Iterable[Family]) -> str:
    """A sentence for the error about an unknown architecture."""
    name = describe_architecture(config)
    tried = [(family, *_try(family, config)) for family in families]

    def distance(entry: tuple[Family, list[str], set[str]]) -> tuple[float, ...]:
        family, lacking, read = entry
        return len(lacking) - len(read), -SequenceMatcher(a=name, b=family.architecture).ratio()

    family, lacking, read = min(tried, key=distance)
    extra = dict.fromkeys(
        f"{field} ({describe(value)}: {_MEANINGS[field]})"
        for field, value in config.items()
        if field in _MEANINGS and value and field not in read
    )
    missing = ", ".join(filter(None, dict.fromkeys([*extra, *lacking])))
    lacks = (
        f"octavo lacks for it: {missing}" if missing else "No field says what octavo lacks for it"
    )
    return f"{lacks}. The nearest family that octavo has is {family.architecture}"


def describe_architecture(config: Mapping[str, Any]) -> str:
    """The name that a configuration gives to itself."""
    names = config.get("architectures") or config.get("model_type")
    name = names[0] if isinstance(names, list) and names else names
    return name if isinstance(name, str) else ""


def _try(family: Family, config: Mapping[str, Any]) -> tuple[list[str], set[str]]:
    """What a family refuses of a configuration, and which of its fields it reads."""
    lacking: list[str] = []
    recorded = _Recorded(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while len(lacking) < _MOST:
            try:
                family.read_spec(recorded)
                break
            except FieldError as error:
                if error.field in config:
                    lacking.append(f"{printable(error.field)} ({describe(config[error.field])})")
                    recorded.pop(error.field, None)
                    continue
                lacking.append(error.field)
                if error.is_missing:  # a family of other names
                    lacking += [""] * _MOST
                break
            except UnsupportedModelError:
                break
    return lacking, recorded.read & config.keys()
