"""The `quantization_config` of the library compressed-tensors: reading it, and writing one.

llm-compressor writes the library's layouts (quant_method "compressed-tensors", "sparseml" in 2024);
vLLM and transformers read them. octavo reads:

- 4 and 8 bits with a scale a group, an output or a tensor, symmetric or not, formats
  "pack-quantized" and "int-quantized". With 8 bits and one symmetric scale an output the
  activations may have 8 bits too, rounded for each token at run time (W8A8);
- FP8 with a scale a tensor, an output or a block, formats "float-quantized" and "naive-quantized";
  `octavo.weights.float8` reads the weights. Activations are not rounded there.

quant_method "octavo", format "octavo", is octavo's own, for formats that the library does not have:
the same fields, and a group's weights may name their `levels`, 16 ascending whole numbers. Codes
have the name of the float matrix, so that other programs stop at the wrong shape instead of making
random weights.

Anything else is refused by name. Fields that change no result (observers, ratios) are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal

from octavo.models.fields import Fields
from octavo.models.spec import UNIFORM_LEVELS, WeightFormat
from octavo.weights.codes import CompressedMatrix, Layout
from octavo.weights.float8 import Float8Matrix, read_block
from octavo.weights.stored import CONVERTED, StoredMatrix

Scheme = Callable[[str, tuple[int, int]], StoredMatrix | None]
"""(module, (outputs, inputs)) -> how it is stored; None: as plain numbers."""

_LAYOUTS: dict[str, Layout] = {
    "pack-quantized": "pack-quantized",
    "int-quantized": "int-quantized",
    "naive-quantized": "int-quantized",
    "octavo": "octavo",
}
_FLOAT_FORMATS = ("float-quantized", "naive-quantized")
_WRITTEN = ("compressed", "frozen")  # "frozen": files of 2024, whose tensors are compressed too


def read_compressed_tensors(fields: Fields) -> Scheme:
    """How each module is stored. fields: quantization_config.

    Raises UnsupportedModelError, now or when it is called, with the field that it does not read.
    """
    values = fields.values
    if values.get("quantization_status", "compressed") not in _WRITTEN:
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
    own_levels = values.get("quant_method") == "octavo"
    found = [
        _read_group(fields, name, group, values.get("format"), own_levels=own_levels)
        for name, group in groups.items()
    ]
    by_target = {target: group for group in found for target in group.targets}

    def scheme(module: str, shape: tuple[int, int]) -> StoredMatrix | None:
        matching = _matching(module, by_target)
        if not matching or _matching(module, ignore):
            return None
        return by_target[matching[0]].matrix(module, shape)

    return scheme


def _read_group(
    parent: Fields, name: str, values: object, format: object, *, own_levels: bool
) -> _FloatGroup | _IntegerGroup:
    source = f"{parent.source}: config_groups: {name}"
    if not isinstance(values, dict):
        raise parent.error(f"config_groups: {name}", values, "an object")
    group = Fields(values, source)
    group.refuse_unless("output_activations", (), "null")
    weights = values.get("weights")
    if not isinstance(weights, dict):
        raise group.error("weights", weights, "an object")
    fields = Fields(weights, f"{source}: weights")
    format = values.get("format") or format
    if weights.get("type") == "float":
        return _FloatGroup(group, fields, format)
    known = isinstance(format, str) and format in _LAYOUTS
    if not isinstance(format, str) or not known or (format == "octavo") != own_levels:
        supported = "'octavo'" if own_levels else "'pack-quantized' or 'int-quantized'"
        raise group.error("format", format, supported)
    return _IntegerGroup(group, fields, _LAYOUTS[format])


class _FloatGroup:
    """FP8. Activations may be of any kind: octavo keeps theirs in more bits."""

    def __init__(self, group: Fields, fields: Fields, format: object) -> None:
        weights = fields.values
        if format not in _FLOAT_FORMATS or weights.get("num_bits", 8) != 8:
            supported = "'int', or of format 'float-quantized' with 8 bits"
            raise fields.error("type", "float", supported)
        fields.refuse_unless("symmetric", (True,), "true")
        fields.refuse_unless("dynamic", (False,), "false")
        strategy = weights.get("strategy") or "tensor"
        if strategy not in ("tensor", "channel", "block"):
            raise fields.error("strategy", strategy, "'tensor', 'channel' or 'block'")
        self.block: tuple[int, int] | None = None
        if strategy == "block":
            self.block = read_block(fields, weights.get("block_structure"), "block_structure")
        self.targets = _names(group, "targets", group.values.get("targets"))

    def matrix(self, module: str, shape: tuple[int, int]) -> StoredMatrix:
        """The scheme applied to one matrix."""
        return Float8Matrix(module, shape, CONVERTED, block=self.block)


class _IntegerGroup:
    """Whole-number codes."""

    def __init__(self, group: Fields, fields: Fields, layout: Layout) -> None:
        self.fields, self.layout = fields, layout
        fields.refuse_unless("type", ("int",), "'int', or 'float' of 8 bits")
        fields.refuse_unless("dynamic", (False,), "false")
        fields.refuse_unless("block_structure", (), "null")
        orders = (False, True, "weight", "static", "group", "dynamic")
        fields.refuse_unless("actorder", orders, "null, 'weight', 'static' or 'group'")
        self.ordered = fields.values.get("actorder") in (True, "group", "dynamic")
        self.symmetric = fields.boolean("symmetric", True)
        self.bits = fields.integer("num_bits", 4, 8)
        if self.bits not in (4, 8):
            raise fields.error("num_bits", self.bits, "4 or 8")
        if self.bits == 4 and layout == "int-quantized":
            raise group.error("format", "int-quantized", "'pack-quantized' for 4 bits")
        self.strategy, self.group_size = _grouping(fields)
        if layout != "octavo":
            fields.refuse_unless("levels", (), "no levels (quant_method 'octavo' has them)")
        self.levels = _levels(fields)
        if self.levels != UNIFORM_LEVELS and (self.bits != 4 or not self.symmetric):
            raise fields.error("levels", list(self.levels), "none, but for symmetric 4 bits")
        self.targets = _names(group, "targets", group.values.get("targets"))
        activations = group.values.get("input_activations")
        self.activation_bits = _activation_bits(group, activations, self.bits)

    def matrix(self, module: str, shape: tuple[int, int]) -> StoredMatrix:
        """The scheme applied to one matrix."""
        group_size = self.group_size or shape[1]
        if shape[1] % group_size:
            supported = f"a number that divides the width of {module} ({shape[1]})"
            raise self.fields.error("group_size", group_size, supported)
        matrix = CompressedMatrix(
            module,
            shape,
            CONVERTED,
            bits=self.bits,
            group_size=group_size,
            levels=self.levels,
            activation_bits=self.activation_bits,
            layout=self.layout,
            symmetric=self.symmetric,
            per_tensor=self.strategy == "tensor",
            ordered=self.ordered,
        )
        format = matrix.running_format(not self.symmetric, matrix.groups())
        return matrix if self.ordered else replace(matrix, format=format)


def _grouping(fields: Fields) -> tuple[str, int]:
    """("tensor", "channel" or "group", the group size; 0: all inputs of an output)."""
    strategy = fields.values.get("strategy")
    size = fields.values.get("group_size")
    if strategy is None:  # as the library infers it
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy in ("channel", "tensor"):
        fields.refuse_unless("group_size", (-1,), f"null for strategy {strategy!r}")
        return strategy, 0
    if strategy != "group":
        raise fields.error("strategy", strategy, "'group', 'channel' or 'tensor'")
    return strategy, fields.integer("group_size", 1, 2**20)


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


def _matching(module: str, targets: Iterable[str]) -> list[str]:
    """Those that name the module, in the library's order, of which the first counts.

    The whole name comes first, then patterns from the name's beginning by the alphabet, then the
    class.
    """
    found = [
        target
        for target in targets
        if (
            re.match(target[3:], module) is not None
            if target.startswith("re:")
            else target in ("Linear", module)
        )
    ]
    return sorted(found, key=lambda target: (target != module, target == "Linear", target))


def choose_layout(formats: Iterable[WeightFormat], is_turned: bool = False) -> Layout:
    """The layout of a directory that octavo writes: the library's, if it can hold the formats.

    is_turned: the family's float matrices lie as (inputs, outputs) (GPT-2). Codes lie the other way
    round, so other programs would multiply by the wrong matrix; the library knows no such modules.
    """
    formats = tuple(formats)
    if is_turned:
        return "octavo"
    if any(format.activation_bits == 8 for format in formats):
        return "int-quantized"  # where other programs expect W8A8
    uniform = all(format.levels == UNIFORM_LEVELS for format in formats)
    return "pack-quantized" if uniform else "octavo"


def make_quantization_config(
    modules: Mapping[str, WeightFormat], left_out: Sequence[str], layout: Layout
) -> dict[str, Any]:
    """The field for config.json. modules: the checkpoint's name of each matrix -> its format.

    left_out: the checkpoint's names, or patterns of them, of the matrices that stay floats.

    The quant_method is "octavo" if that is the layout, else "compressed-tensors".
    """
    by_format: dict[WeightFormat, list[str]] = {}
    for module, format in modules.items():
        by_format.setdefault(format, []).append(module)
    return {
        "quant_method": "octavo" if layout == "octavo" else "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(left_out),
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
    grouped = format.is_grouped
    levels = {} if format.levels == UNIFORM_LEVELS else {"levels": list(format.levels)}
    return {
        **levels,
        **_INT8_A_TOKEN,
        "num_bits": 4 if format.dtype == "int4" else 8,
        "symmetric": not format.has_zeros,
        "strategy": "group" if grouped else "channel",
        "group_size": format.group_size if grouped else None,
        "dynamic": False,
        "observer": "minmax",
    }


def _activations(format: WeightFormat) -> dict[str, Any] | None:
    """The activations of int8 weights; None if they keep their precision."""
    return dict(_INT8_A_TOKEN) if format.activation_bits == 8 else None
