"""Reading a configuration's rope: `rope_theta`, `rope_scaling`, `rope_parameters`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from octavo.models import rope
from octavo.models.fields import Fields, Limit, describe
from octavo.models.spec import RopeSpec

# The fields of each kind beside the kind's name, theta and the rotating part of a head.
_FIELDS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast"}
        | {"beta_slow", "mscale", "mscale_all_dim", "truncate"}
    ),
    "longrope": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor"}
        | {"short_factor", "long_factor"}
    ),
}
_LENGTH = "original_max_position_embeddings"


class _Rope(NamedTuple):
    """What the kinds' readers need."""

    top: Fields  # the configuration
    fields: Fields  # the object that describes the rope
    theta: float
    dim: int  # of a head's elements, those that rotate
    max_positions: int

    def factor(self) -> float:
        return self.fields.number("factor", 0.0, exclude_low=True)

    def optional(self, name: str) -> float | None:
        if self.fields.values.get(name) is None:
            return None
        return self.fields.number(name, 0.0, exclude_low=True)

    def original_length(self, low: int = 1) -> int:
        """The length at top level, or else the object's own, or else the model's."""
        source = self.top if self.top.values.get(_LENGTH) else self.fields
        return source.integer(_LENGTH, low, Limit.POSITIONS, default=self.max_positions)


def read_rope(
    config: Mapping[str, Any],
    head_dim: int,
    max_positions: int,
    *,
    theta: float = 10000.0,
    layer_type: str | None = None,
    partial: bool = False,
    kinds: Mapping[str, str] | None = None,
) -> RopeSpec:
    """The rope of a configuration in the old or the new spelling.

    Old: `rope_theta` and `rope_scaling` (its kind named by `rope_type`, or `type`) at top level.
    New (transformers 5): one object `rope_parameters` with all of it, or one for each layer type.
    Where a file has both, the precedence is that of transformers: `rope_scaling`, if not empty,
    replaces `rope_parameters`, and what stands inside the object comes before the same at top
    level.

    theta: where the file has none. layer_type: whose object is wanted, where there are several.
    partial: whether the family knows `partial_rotary_factor`. kinds: other names of kinds.
    Raises UnsupportedModelError with the field that is refused.
    """
    top = Fields(config, "config.json")
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    values = config.get(name)
    if values is None:
        values = {}
    if isinstance(values, dict) and layer_type is not None and name == "rope_parameters":
        if any(not isinstance(each, dict | None) for each in values.values()):
            raise top.error(name, values, "an object for each layer type")
        name, values = f"{name}: {layer_type}", values.get(layer_type) or {}
    if not isinstance(values, dict):
        raise top.error(name, values, "an object or null")
    fields = Fields(values, f"config.json: {name}")
    named = values.get("rope_type", values.get("type", "default"))
    kind = (kinds or {}).get(named, named) if isinstance(named, str) else named
    if not isinstance(kind, str) or kind not in _FIELDS:
        name = "rope_type" if "rope_type" in values else "type"
        raise fields.error(name, named, ", ".join(_FIELDS))
    _check_names(fields, kind)
    theta_source = fields if "rope_theta" in values else top
    theta = theta_source.number("rope_theta", 0.0, default=theta, exclude_low=True)
    dim = _rotating(top, fields, head_dim, partial)
    with np.errstate(all="ignore"):  # what overflows is refused here
        spec = _READERS[kind](_Rope(top, fields, theta, dim, max_positions))
    turns = (*spec.frequencies, *spec.long_frequencies, spec.attention_factor)
    if not all(map(math.isfinite, turns)):
        raise fields.error("rope_type", kind, "a rope whose frequencies are finite numbers")
    return spec


def _rotating(top: Fields, fields: Fields, head_dim: int, partial: bool) -> int:
    """How many elements of a head rotate."""
    name = "partial_rotary_factor"
    source = fields if fields.values.get(name) is not None else top
    if not partial:
        source.refuse_unless(name, (1, 1.0), "1 (the whole head is rotated)")
        dim = head_dim
    elif source.values.get(name) is None:
        dim = head_dim
    else:
        dim = int(head_dim * source.number(name, 0.0, 1.0, exclude_low=True))
    if dim < 2 or dim % 2:
        expected = f"an even number of rotated elements (of {head_dim} in a head), at least 2"
        raise source.error("head_dim" if dim == head_dim else name, dim, expected)
    return dim


def _check_names(fields: Fields, kind: str) -> None:
    """Refuse fields that would change the rotation; warn of those that transformers ignores too."""
    used = _FIELDS[kind] | {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for name, value in fields.values.items():
        if name in used or value is None:
            continue
        if isinstance(value, (dict, list)) and value:
            # One rope a kind of layer, per-frequency factors, sections of images and video.
            raise fields.error(name, value, f"plain numbers, as of rope type {kind!r}")
        warnings.warn(
            f"{fields.source}: {name} ({describe(value)}) is not a field of rope type "
            f"{kind!r}; it is ignored, as transformers does",
            stacklevel=2,
        )


def _default(read: _Rope) -> RopeSpec:
    return rope.default_rope(read.theta, read.dim)


def _linear(read: _Rope) -> RopeSpec:
    return rope.linear_rope(read.theta, read.dim, read.factor())


def _dynamic(read: _Rope) -> RopeSpec:
    if read.dim == 2:
        raise read.fields.error("rope_type", "dynamic", "more than one rotated pair of a head")
    most = Limit.POSITIONS / read.max_positions  # the longest sequence has factor times as many
    factor = read.fields.number("factor", 0.0, most, exclude_low=True)
    return rope.dynamic_rope(read.theta, read.dim, factor, read.max_positions)


def _llama3(read: _Rope) -> RopeSpec:
    factor = read.factor()
    low = read.fields.number("low_freq_factor", 0.0, exclude_low=True)
    high = read.fields.number("high_freq_factor", 0.0, exclude_low=True)
    if high <= low:
        raise read.fields.error(
            "high_freq_factor", high, f"a number above low_freq_factor ({low:g})"
        )
    return rope.llama3_rope(read.theta, read.dim, factor, low, high, read.original_length())


def _yarn(read: _Rope) -> RopeSpec:
    if read.theta <= 1:
        raise read.fields.error("rope_theta", read.theta, "a number above 1 (of rope type 'yarn')")
    original = read.original_length()
    factor = read.optional("factor") or read.max_positions / original
    attention = read.optional("attention_factor")
    scale, scale_all = (_or_zero(read.fields, name) for name in ("mscale", "mscale_all_dim"))
    if attention is None and scale and scale_all:
        attention = rope.yarn_mscale(factor, scale) / rope.yarn_mscale(factor, scale_all)
    return rope.yarn_rope(
        read.theta,
        read.dim,
        factor,
        original,
        beta_fast=_or_zero(read.fields, "beta_fast") or 32,
        beta_slow=_or_zero(read.fields, "beta_slow") or 1,
        truncate=read.fields.boolean("truncate", True),
        attention_factor=attention,
    )


def _or_zero(fields: Fields, name: str) -> float:
    """A number from 0, or 0 for null and where it is missing: transformers takes its default."""
    return 0.0 if fields.values.get(name) is None else fields.number(name, 0.0)


def _longrope(read: _Rope) -> RopeSpec:
    original = read.original_length(low=2)
    factor = read.optional("factor") or read.max_positions / original
    attention = read.optional("attention_factor")
    if attention is None:
        attention = rope.longrope_attention_factor(factor, original)
    short, long = (_factors(read, name) for name in ("short_factor", "long_factor"))
    return rope.longrope(read.theta, read.dim, short, long, original, factor, attention)


def _factors(read: _Rope, name: str) -> list[float]:
    values, pairs = read.fields.values.get(name), read.dim // 2
    expected = f"{pairs} numbers above 0, one for each rotated pair of a head"
    if not isinstance(values, list) or len(values) != pairs:
        raise read.fields.error(name, values, expected)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise read.fields.error(name, values, expected)
        if not 1e-30 < value < 1e30 or math.isnan(value):
            raise read.fields.error(name, values, expected)
    return values


_READERS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
