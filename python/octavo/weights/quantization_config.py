"""`quantization_config` of config.json: reading those that octavo can run, and writing its own.

The layout is that of the library compressed-tensors (quant_method "compressed-tensors"), which
llm-compressor writes and vLLM and transformers read. octavo runs its integer schemes:

- 4 bits in groups that are a multiple of 32 wide, symmetric or not, format "pack-quantized";
- 8 bits, one symmetric scale an output, format "pack-quantized" or "int-quantized"; there the
  activations may have 8 bits too, rounded for each token at run time (W8A8).

quant_method "octavo", format "octavo", is octavo's own, for formats that the library does not have:
the same fields, and a group's weights may name their `levels`, 16 ascending whole numbers. Codes
have the name of the float matrix, so that other programs stop at the wrong shape instead of making
random weights.

Anything else is refused by name. Fields that change no result (observers, ratios) are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from octavo.models.family import TensorNames
from octavo.models.fields import Fields
from octavo.models.layer import linear_nodes
from octavo.models.spec import UNIFORM_LEVELS, ModelSpec, WeightFormat

Layout = Literal["pack-quantized", "int-quantized", "octavo"]
_LAYOUTS: dict[str, Layout] = {
    "pack-quantized": "pack-quantized",
    "int-quantized": "int-quantized",
    "naive-quantized": "int-quantized",
    "octavo": "octavo",
}
_METHODS = ("compressed-tensors", "octavo")
_SOURCE = "config.json: quantization_config"


@dataclass(frozen=True)
class StoredMatrix:
    """How a checkpoint holds a matrix, or several in one. module: its name without an ending."""

    module: str
    shape: tuple[int, int]  # (outputs, inputs)
    format: WeightFormat
    layout: Layout


def read_quantization(
    config: Mapping[str, Any], spec: ModelSpec, names: TensorNames
) -> dict[str, StoredMatrix]:
    """The matrices that are stored as codes, by octavo's name without ".weight"; maybe none.

    Raises UnsupportedModelError with the field that octavo does not support.
    """
    values = config.get("quantization_config")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise Fields(config, "config.json").error("quantization_config", values, "an object")
    fields = Fields(values, _SOURCE)
    method = values.get("quant_method")
    if method not in _METHODS:
        supported = "'compressed-tensors', 'octavo', or no quantization"
        raise fields.error("quant_method", method, supported)
    if values.get("quantization_status", "compressed") != "compressed":
        raise fields.error(
            "quantization_status", values["quantization_status"], "'compressed' (codes are stored)"
        )
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config", "moe_sparsity_config"):
        value = values.get(name)
        dense = name == "sparsity_config" and isinstance(value, dict)
        if value and not (dense and value.get("format") == "dense"):
            raise fields.error(name, value, "null")
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise fields.error("config_groups", groups, "an object with one group or several")
    ignore = _names(fields, "ignore", values.get("ignore") or [])
    format = values.get("format")
    found = [
        _Group.read(name, group, format, own_levels=method == "octavo")
        for name, group in groups.items()
    ]
    stored, weight_map = {}, names.weight_map(spec)
    for name in [*linear_nodes(spec), *([] if spec.tie_word_embeddings else ["lm_head"])]:
        source = weight_map[name + ".weight"]
        module = source.module
        matching = [group for group in found if _matches(module, group.targets)]
        if not matching or _matches(module, ignore):
            continue
        if source.transform != "plain":
            raise fields.error("config_groups", module, "matrices that are stored as they are used")
        outputs, inputs = source.stored_shape
        stored[name] = matching[0].matrix(module, (outputs, inputs))
    return stored


@dataclass(frozen=True)
class _Group:
    """One entry of config_groups."""

    fields: Fields
    targets: tuple[str, ...]
    bits: int
    group_size: int  # 0: one scale an output
    symmetric: bool
    layout: Layout
    levels: tuple[int, ...]
    activation_bits: Literal[8, 16]

    @staticmethod
    def read(name: str, values: object, format: object, *, own_levels: bool) -> _Group:
        source = f"{_SOURCE}: config_groups: {name}"
        if not isinstance(values, dict):
            raise Fields({}, _SOURCE).error(f"config_groups: {name}", values, "an object")
        group = Fields(values, source)
        group.refuse_unless("output_activations", (), "null")
        weights = values.get("weights")
        if not isinstance(weights, dict):
            raise group.error("weights", weights, "an object")
        fields = Fields(weights, f"{source}: weights")
        format = values.get("format") or format
        known = isinstance(format, str) and format in _LAYOUTS
        if not isinstance(format, str) or not known or (format == "octavo") != own_levels:
            supported = "'octavo'" if own_levels else "'pack-quantized' or 'int-quantized'"
            raise group.error("format", format, supported)
        fields.refuse_unless("type", ("int",), "'int'")
        fields.refuse_unless("dynamic", (False,), "false")
        fields.refuse_unless("block_structure", (), "null")
        fields.refuse_unless("actorder", (False, "weight", "static"), "null, 'weight' or 'static'")
        symmetric = fields.boolean("symmetric", True)
        bits = fields.integer("num_bits", 4, 8)
        group_size = _group_size(fields)
        if bits == 8 and (group_size or not symmetric):
            wrong = "group_size" if group_size else "symmetric"
            supported = "one symmetric scale an output for 8 bits (strategy 'channel')"
            raise fields.error(wrong, weights.get(wrong), supported)
        if bits not in (4, 8):
            raise fields.error("num_bits", bits, "4 or 8")
        if bits == 4 and _LAYOUTS[format] == "int-quantized":
            raise group.error("format", format, "'pack-quantized' for 4 bits")
        if not own_levels:
            fields.refuse_unless("levels", (), "no levels (quant_method 'octavo' has them)")
        levels = _levels(fields)
        if levels != UNIFORM_LEVELS and (bits != 4 or not symmetric):
            raise fields.error("levels", list(levels), "none, but for symmetric 4 bits")
        targets = _names(group, "targets", values.get("targets"))
        return _Group(
            fields,
            targets,
            bits,
            group_size,
            symmetric,
            _LAYOUTS[format],
            levels,
            _activation_bits(group, values.get("input_activations"), bits),
        )

    def matrix(self, module: str, shape: tuple[int, int]) -> StoredMatrix:
        """The scheme applied to one matrix."""
        if self.bits == 8:
            format = WeightFormat("int8", activation_bits=self.activation_bits)
            return StoredMatrix(module, shape, format, self.layout)
        group_size = self.group_size or shape[1]
        if group_size % 32 or shape[1] % group_size:
            supported = f"a multiple of 32 that divides the width of {module} ({shape[1]})"
            raise self.fields.error("group_size", group_size, supported)
        format = WeightFormat("int4", group_size, not self.symmetric, self.levels)
        return StoredMatrix(module, shape, format, self.layout)


def _group_size(fields: Fields) -> int:
    """The group of a scheme, 0 for one scale an output."""
    strategy = fields.values.get("strategy")
    size = fields.values.get("group_size")
    if strategy is None:  # as the library infers it
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "channel":
        fields.refuse_unless("group_size", (-1,), "null for strategy 'channel'")
        return 0
    if strategy != "group":
        raise fields.error("strategy", strategy, "'group' or 'channel'")
    return fields.integer("group_size", 32, 2**20)


def _activation_bits(group: Fields, activations: object, bits: int) -> Literal[8, 16]:
    """8 for a W8A8 group as llm-compressor writes it; else 16, which loses nothing."""
    if activations is None:
        return 16
    supported = "null (weights alone are quantized), or for 8-bit weights W8A8's object"
    if bits != 8 or not isinstance(activations, dict):
        raise group.error("input_activations", activations, supported)
    fields = Fields(activations, f"{group.source}: input_activations")
    if fields.integer("num_bits", 1, 16) != 8:
        raise fields.error("num_bits", activations.get("num_bits"), "8")
    fields.refuse_unless("type", ("int",), "'int'")
    fields.refuse_unless("symmetric", (True,), "true")
    for name, value in (("dynamic", True), ("strategy", "token")):
        if activations.get(name) != value:
            expected = "true" if value is True else f"'{value}'"
            raise fields.error(name, activations.get(name), f"{expected} (rounded for each token)")
    return 8


def _levels(fields: Fields) -> tuple[int, ...]:
    """The levels of codes 0 to 15; -8 to 7 by default."""
    levels = fields.values.get("levels")
    if levels is None:
        return UNIFORM_LEVELS
    supported = "16 whole numbers from -127 to 127 in ascending order"
    if not isinstance(levels, list) or not all(type(level) is int for level in levels):
        raise fields.error("levels", levels, supported)
    found = tuple(levels)
    bounded = all(-127 <= level <= 127 for level in found)
    if len(found) != 16 or sorted(set(found)) != levels or not bounded:
        raise fields.error("levels", levels, supported)
    return found


def _names(fields: Fields, name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise fields.error(name, value, "a list of names")
    for entry in value:
        try:
            re.compile(entry.removeprefix("re:"))
        except re.error as error:
            raise fields.error(name, entry, f"a regular expression ({error})") from error
    return tuple(value)


def _matches(module: str, targets: Sequence[str]) -> bool:
    """The library's rule: the class, the whole name, or a pattern from the name's beginning."""
    return any(
        re.match(target[3:], module) is not None
        if target.startswith("re:")
        else target in ("Linear", module)
        for target in targets
    )


def choose_layout(formats: Iterable[WeightFormat]) -> Layout:
    """The layout of a directory that octavo writes: the library's, if it can hold the formats."""
    formats = tuple(formats)
    if any(format.activation_bits == 8 for format in formats):
        return "int-quantized"  # where other programs expect W8A8
    uniform = all(format.levels == UNIFORM_LEVELS for format in formats)
    return "pack-quantized" if uniform else "octavo"


def make_quantization_config(modules: Mapping[str, WeightFormat], head: str) -> dict[str, Any]:
    """The field for config.json. modules: the checkpoint's name of each matrix -> its format.

    head: the checkpoint's name of the head, which stays a matrix of floats.

    The quant_method is "compressed-tensors" if that has all the formats, else "octavo".
    """
    layout = choose_layout(modules.values())
    by_format: dict[WeightFormat, list[str]] = {}
    for module, format in modules.items():
        by_format.setdefault(format, []).append(module)
    return {
        "quant_method": "octavo" if layout == "octavo" else "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": [head],
        "config_groups": {
            f"group_{index}": {
                "targets": _targets(names, modules),
                "weights": _weights(format),
                "input_activations": _activations(format),
                "output_activations": None,
            }
            for index, (format, names) in enumerate(by_format.items())
        },
    }


def _targets(names: Sequence[str], modules: Mapping[str, WeightFormat]) -> list[str]:
    """All linear layers, if all have the format; else patterns of kinds; else every name."""
    if len(names) == len(modules):
        return ["Linear"]
    kinds = {name.rsplit(".", 1)[1] for name in names}
    others = {name.rsplit(".", 1)[1] for name in modules if name not in set(names)}
    if kinds & others:
        return list(names)
    return [f"re:.*\\.{kind}$" for kind in sorted(kinds)]


# The library's fields for activations of W8A8.
_INT8_A_TOKEN: Mapping[str, Any] = MappingProxyType(
    {
        **{"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"},
        **{"group_size": None, "dynamic": True, "actorder": None, "block_structure": None},
        **{"observer": None, "observer_kwargs": {}},
    }
)


def _weights(format: WeightFormat) -> dict[str, Any]:
    grouped = format.dtype == "int4"
    levels = {} if format.levels == UNIFORM_LEVELS else {"levels": list(format.levels)}
    return {
        **levels,
        **_INT8_A_TOKEN,
        "num_bits": 4 if grouped else 8,
        "symmetric": not format.has_zeros,
        "strategy": "group" if grouped else "channel",
        "group_size": format.group_size if grouped else None,
        "dynamic": False,
        "observer": "minmax",
    }


def _activations(format: WeightFormat) -> dict[str, Any] | None:
    """The activations of int8 weights; None if they keep their precision."""
    return dict(_INT8_A_TOKEN) if format.activation_bits == 8 else None
