"""`adapter_config.json` of PEFT: which modules an adapter changes, by what rank and scale.

The fields and their meaning are those of `LoraConfig` in PEFT 0.21
(https://huggingface.co/docs/peft/package_reference/lora). A field that changes the result and is
not computed is refused by its name.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from octavo.errors import UnsupportedModelError
from octavo.models.fields import Fields, describe, printable, read_json_object

CONFIG = "adapter_config.json"
_MAX_RANK = 4096
_MAX_PATTERNS = 4096  # keys of rank_pattern or alpha_pattern: one for each module of a large model
_MAX_QUANTIFIERS = 6  # of a regular expression from a file: its time grows as a power of that
# Ways to start the training that leave the base model's own weights as they are.
_STARTS = ("gaussian", "eva", "orthogonal")
_REFUSED = {
    "use_dora": "false (DoRA scales the whole matrix; merge the adapter with PEFT)",
    "lora_bias": "false (merge the adapter with PEFT)",
    "modules_to_save": "null (whole modules of its own; merge the adapter with PEFT)",
    "trainable_token_indices": "null (token rows of its own; merge the adapter with PEFT)",
    "layer_replication": "null (a model with repeated layers; merge the adapter with PEFT)",
    "alora_invocation_tokens": "null (an adapter that begins in the middle of a text)",
    "ensure_weight_tying": "false (merge the adapter with PEFT)",
    **dict.fromkeys(
        ("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
        "null or false (another method than LoRA; merge the adapter with PEFT)",
    ),
}
# Fields that matter while training, or follow from what is read here; and those that are read.
_WITHOUT_EFFECT = """auto_mapping base_model_name_or_path corda_config eva_config fan_in_fan_out
    inference_mode loftq_config lora_dropout lora_ga_config megatron_config megatron_core
    peft_version qalora_group_size revision runtime_config velora_config"""
_READ = """alpha_pattern bias exclude_modules init_lora_weights layers_pattern layers_to_transform
    lora_alpha peft_type r rank_pattern target_modules target_parameters task_type use_rslora"""
_KNOWN = frozenset((*_WITHOUT_EFFECT.split(), *_READ.split(), *_REFUSED))


class AdapterConfig:
    """An adapter's configuration, checked; which modules it changes, and how.

    Modules have the names of the base model's checkpoint: "model.layers.0.self_attn.q_proj".
    """

    def __init__(self, values: dict[str, Any], source: str) -> None:
        """Raises UnsupportedModelError with the field, its value, and what is supported."""
        fields = self._fields = Fields(values, source)
        fields.refuse_unless("peft_type", ("LORA",), '"LORA"')
        fields.refuse_unless("task_type", ("CAUSAL_LM",), '"CAUSAL_LM" or null')
        fields.refuse_unless("bias", ("none",), '"none" (merge the adapter with PEFT)')
        for name, advice in _REFUSED.items():
            if values.get(name) not in (None, False, [], {}):
                raise fields.error(name, values[name], advice)
        fields.refuse_unless(
            "init_lora_weights",
            (True, False, *_STARTS),
            f"true, false, {', '.join(_STARTS)} (others change the base model; save the adapter "
            "again with PEFT's path_initial_model_for_weight_conversion)",
        )
        self._warn_of_unknown(values)
        self._use_rslora = fields.boolean("use_rslora", False)
        self._rank = fields.integer("r", 1, _MAX_RANK)
        self._alpha = fields.number("lora_alpha", -1e6, 1e6)
        self._ranks = self._patterns("rank_pattern", lambda f, key: f.integer(key, 1, _MAX_RANK))
        self._alphas = self._patterns("alpha_pattern", lambda f, key: f.number(key, -1e6, 1e6))
        self.parameters = self._read_parameters()
        self._targets = self._names_or_pattern("target_modules")
        self._excluded = self._names_or_pattern("exclude_modules") or []
        self._layers = self._layer_numbers()
        self._layer_patterns = self._read_layer_patterns()

    def rank(self, module: str) -> int:
        """The rank of a module's adapter."""
        return int(_first(self._ranks, module, self._rank))

    def scale(self, module: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) where rslora is used (Kalajdzievski 2023)."""
        rank = self.rank(module)
        alpha = float(_first(self._alphas, module, self._alpha))
        return alpha / (math.sqrt(rank) if self._use_rslora else rank)

    def targets(self, linear: Iterable[str], others: Iterable[str]) -> set[str]:
        """Of a model's modules, those that the adapter changes.

        linear: the matrices of the layers, which are what "all-linear" stands for. others: the
        embedding and the head.
        """
        if isinstance(self._targets, str) and self._targets.lower() == "all-linear":
            return {module for module in linear if not self._is_excluded(module)}
        return {module for module in (*linear, *others) if self._is_target(module)}

    def stacked_targets(self, stacks: Iterable[str]) -> set[str]:
        """Of tensors that hold a matrix of all experts, those that `target_parameters` names.

        Raises UnsupportedModelError for a name of any other parameter.
        """
        stacks = list(stacks)
        for entry in self.parameters:
            if not any(_ends_in(stack, (entry,)) for stack in stacks):
                expected = "gate_up_proj and down_proj of a model's experts"
                raise self._fields.error("target_parameters", entry, expected)
        return {stack for stack in stacks if _ends_in(stack, self.parameters)}

    def _read_parameters(self) -> list[str]:
        value = self._fields.values.get("target_parameters") or []
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self._fields.error("target_parameters", value, "a list of names of parameters")
        return value

    def _is_target(self, module: str) -> bool:
        if self._is_excluded(module):
            return False
        if isinstance(self._targets, str):
            return (
                _compile(self._fields, "target_modules", self._targets).fullmatch(module)
                is not None
            )
        if not _ends_in(module, self._targets):
            return False
        if not self._layers:
            return True
        for pattern in self._layer_patterns:
            if match := pattern.match(module):
                return int(match["layer"]) in self._layers
        return False

    def _is_excluded(self, module: str) -> bool:
        if isinstance(self._excluded, str):
            pattern = _compile(self._fields, "exclude_modules", self._excluded)
            return pattern.fullmatch(module) is not None
        return _ends_in(module, self._excluded)

    def _warn_of_unknown(self, values: dict[str, Any]) -> None:
        unknown = sorted(name for name in values.keys() - _KNOWN if values[name])
        if unknown:
            names = ", ".join(printable(name) for name in unknown[:8])
            warnings.warn(
                f"{self._fields.source}: octavo does not know the fields {names}, and ignores them",
                stacklevel=4,
            )

    def _patterns(self, name: str, read: Any) -> list[tuple[re.Pattern[str], float]]:
        """A field {pattern of modules: number}, in its order."""
        values = self._fields.values.get(name)
        if values is None:
            return []
        if not isinstance(values, dict) or len(values) > _MAX_PATTERNS:
            raise self._fields.error(name, values, f"an object of at most {_MAX_PATTERNS} numbers")
        numbers = Fields(values, f"{self._fields.source}: {name}")
        return [
            (_compile(self._fields, name, key, r"(?:.*\.)?(?:{})$"), read(numbers, key))
            for key in values
        ]

    def _names_or_pattern(self, name: str) -> list[str] | str:
        value = self._fields.values.get(name)
        if value is None and (name == "exclude_modules" or self.parameters):
            return []
        if isinstance(value, str):
            if value.lower() != "all-linear":
                _compile(self._fields, name, value)
            return value
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self._fields.error(
                name, value, "a list of names of modules, or a pattern of them"
            )
        return value

    def _layer_numbers(self) -> list[int]:
        value = self._fields.values.get("layers_to_transform")
        layers = [value] if type(value) is int else [] if value is None else value
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
            raise self._fields.error("layers_to_transform", value, "a list of numbers of layers")
        return layers

    def _read_layer_patterns(self) -> list[re.Pattern[str]]:
        value = self._fields.values.get("layers_pattern")
        patterns = [value] if isinstance(value, str) else value
        if not patterns:  # the first number in the name
            return [re.compile(r".*?\.[^.]*\.(?P<layer>\d{1,9})\.")]
        if not isinstance(patterns, list) or len(patterns) > 16:
            raise self._fields.error("layers_pattern", value, "a name, or a list of some")
        form = r"(?:^|.*?\.)(?:{})\.(?P<layer>\d{{1,9}})\."
        return [_compile(self._fields, "layers_pattern", each, form) for each in patterns]


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The configuration of an adapter's directory; UnsupportedModelError says what is wrong."""
    path = folder / CONFIG
    if not path.is_file():
        raise UnsupportedModelError(
            f"{folder} holds no {CONFIG}; expected a directory that PEFT's save_pretrained wrote"
        )
    return AdapterConfig(read_json_object(path, max_bytes=1 << 22), str(path))


def _first(patterns: list[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
    return next((number for pattern, number in patterns if pattern.match(module)), default)


def _ends_in(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith("." + name) for name in names)


def _compile(fields: Fields, name: str, pattern: object, form: str = "{}") -> re.Pattern[str]:
    """A regular expression from a file; one that could run for hours is refused.

    form: what is put around it.
    """
    expected = (
        f"a regular expression of at most {_MAX_QUANTIFIERS} repetitions, with none inside another"
    )
    if not isinstance(pattern, str) or len(pattern) > 4096 or _may_run_long(pattern):
        raise fields.error(name, pattern, expected)
    try:
        return re.compile(form.format(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise UnsupportedModelError(
            f"{fields.source}: {name} is {describe(pattern)}, which is no regular expression: "
            f"{error}"
        ) from error


_TOKENS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[()|]|[*+?]|\{[\d,]+\}|.", re.DOTALL)


def _may_run_long(pattern: str) -> bool:
    """Whether its search may take more steps than a name of a module deserves.

    A repeated group must hold no choice and no repetition (its tries grow exponentially), and few
    repetitions may follow each other (their tries grow as a power of their number).
    """
    groups: list[bool] = []  # of each open group, whether it holds a choice or a repetition
    closed, before, count = False, "", 0  # of the group that ended last; the token before
    for token in _TOKENS.findall(pattern):
        is_mark = token in ("*", "+", "?") or (len(token) > 2 and token[0] == "{")
        if token == "(":
            groups.append(False)
        elif token == ")":
            closed = groups.pop() if groups else False
            if groups and closed:
                groups[-1] = True
        elif token == "|" and groups:
            groups[-1] = True
        elif is_mark and before not in ("(", "mark"):  # "(?" begins a group, "+?" is one mark
            count += 1
            if before == ")" and token != "?" and closed:
                return True
            if groups:
                groups[-1] = True
            token = "mark"
        before = token
    return count > _MAX_QUANTIFIERS
