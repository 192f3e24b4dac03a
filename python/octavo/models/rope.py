"""The frequencies of rotary position embeddings, as `transformers` computes them.

Su et al. 2021, arXiv 2104.09864: pair i of a head turns by theta^(-2i / dim) radians from one
position to the next. The other kinds change these frequencies for contexts that are longer than
those of the training. Reference and native core receive numbers and know no formula.

Everything is float32, in the order of operations of transformers' `modeling_rope_utils`, since a
position of 100,000 multiplies any difference; only the power is taken in float64 and then rounded.
`dim` is the number of a head's elements that rotate, from the first one on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from octavo.models.spec import ModelSpec, RopeSpec

Float32 = npt.NDArray[np.float32]
_ONE = np.float32(1)


def default_rope(theta: float, dim: int) -> RopeSpec:
    """theta^(-2i / dim)."""
    return _spec("default", theta, _ONE / _wavelengths(theta, dim))


def dynamic_rope(theta: float, dim: int, factor: float, original: int) -> RopeSpec:
    """The default for sequences of at most `original` tokens; `for_length` adds the rest."""
    rope = replace(default_rope(theta, dim), kind="dynamic", factor=factor)
    return replace(rope, original_length=original)


def _dynamic_frequencies(rope: RopeSpec, length: int) -> tuple[float, ...]:
    """Those of the base that suits a sequence of `length` tokens, more than the original ones.

    "NTK-aware" scaling, a formula of the Reddit users bloc97 and emozilla.
    """
    dim = 2 * len(rope.frequencies)
    with np.errstate(over="ignore"):  # an infinite base gives frequencies of 0, as in transformers
        stretched = np.float32(rope.factor * length) / np.float32(rope.original_length)
        growth = (stretched - np.float32(rope.factor - 1)) ** np.float32(dim / (dim - 2))
        base = np.float32(rope.theta) * growth
    return default_rope(float(base), dim).frequencies


def linear_rope(theta: float, dim: int, factor: float) -> RopeSpec:
    """Every frequency divided by `factor` (Chen et al. 2023, arXiv 2306.15595)."""
    return _spec("linear", theta, _ONE / _wavelengths(theta, dim) / np.float32(factor), factor)


def llama3_rope(
    theta: float, dim: int, factor: float, low: float, high: float, original: int
) -> RopeSpec:
    """Llama 3.1's rule.

    Frequencies that turn fewer than `low` times over the original context are divided by `factor`,
    those that turn more than `high` times stay, with a smooth transition between.
    """
    plain = _ONE / _wavelengths(theta, dim)
    context, divisor = np.float32(original), np.float32(factor)
    few, many = np.float32(low), np.float32(high)
    turn = np.float32(2 * math.pi) / plain  # positions to a full turn
    smooth = (context / turn - few) / (many - few)
    between = ((_ONE - smooth) * plain) / divisor + smooth * plain
    scaled = np.where(turn > context / few, plain / divisor, between)
    return _spec("llama3", theta, np.where(turn < context / many, plain, scaled), factor)


def yarn_rope(
    theta: float,
    dim: int,
    factor: float,
    original: int,
    *,
    beta_fast: float = 32,
    beta_slow: float = 1,
    truncate: bool = True,
    attention_factor: float | None = None,
) -> RopeSpec:
    """YaRN (Peng et al. 2023, arXiv 2309.00071).

    Pairs that turn more than `beta_fast` times over the original context stay, those that turn
    fewer than `beta_slow` times are divided by `factor`, with a linear ramp over the pairs between;
    truncate: the ramp's ends are whole numbers. attention_factor: None is 0.1 ln(factor) + 1.
    """

    def pair_with(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with(beta_fast), pair_with(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    wavelengths = _wavelengths(theta, dim)
    ramp = (np.arange(len(wavelengths), dtype=np.float32) - np.float32(low)) / np.float32(
        high - low
    )
    kept = _ONE - np.clip(ramp, _ONE * 0, _ONE)
    slower = _ONE / (np.float32(factor) * wavelengths)
    frequencies = slower * (_ONE - kept) + _ONE / wavelengths * kept
    if attention_factor is None:
        attention_factor = yarn_mscale(factor)
    return _spec("yarn", theta, frequencies, factor, attention_factor)


def yarn_mscale(factor: float, multiplier: float = 1.0) -> float:
    """By how much YaRN multiplies cosines and sines for a context `factor` times as long."""
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def longrope(
    theta: float,
    dim: int,
    short_factors: Sequence[float],
    long_factors: Sequence[float],
    original: int,
    factor: float,
    attention_factor: float,
) -> RopeSpec:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): each frequency has a divisor of its own.

    short_factors: for sequences of at most `original` tokens; long_factors: for longer ones.
    factor: by how much the model's context is longer than that.
    """
    wavelengths = _wavelengths(theta, dim)
    short, long = (
        _ONE / (np.asarray(factors, np.float32) * wavelengths)
        for factors in (short_factors, long_factors)
    )
    rope = _spec("longrope", theta, short, factor, attention_factor)
    return replace(rope, long_frequencies=tuple(long.tolist()), original_length=original)


def longrope_attention_factor(factor: float, original: int) -> float:
    """LongRoPE's factor of cosines and sines for a context `factor` times as long."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def for_length(spec: ModelSpec, max_model_len: int) -> ModelSpec:
    """The spec with the frequencies that sequences of at most `max_model_len` tokens need.

    A sequence turns by one set of frequencies from its first position to its last: those of
    transformers' forward pass over the whole of it. LongRoPE has two sets. With dynamic rope
    transformers has a set for each length, so that every new token would change all keys; here
    all long sequences have that of `max_model_len`, which transformers, too, keeps once it has seen
    a sequence of so many tokens. Where no sequence is long, the second set is left out.
    """

    def chosen(rope: RopeSpec) -> RopeSpec:
        if max_model_len <= rope.original_length:
            return replace(rope, long_frequencies=())
        if rope.kind == "dynamic" and rope.original_length:
            return replace(rope, long_frequencies=_dynamic_frequencies(rope, max_model_len))
        return rope

    return _with_ropes(spec, chosen)


def at_length(spec: ModelSpec, length: int) -> ModelSpec:
    """The spec for sequences of exactly `length` tokens: its ropes have one set of frequencies."""

    def chosen(rope: RopeSpec) -> RopeSpec:
        long = rope.long_frequencies
        return replace(
            rope, frequencies=long or rope.frequencies, long_frequencies=(), original_length=0
        )

    return _with_ropes(for_length(spec, length), chosen)


def _with_ropes(spec: ModelSpec, change: Callable[[RopeSpec], RopeSpec]) -> ModelSpec:
    layers = (
        layer if layer.rope is None else replace(layer, rope=change(layer.rope))
        for layer in spec.layers
    )
    return replace(spec, layers=tuple(layers))


def _wavelengths(theta: float, dim: int) -> Float32:
    """theta^(2i / dim), float32 (dim / 2 rounded up,)."""
    exponents = np.arange(0, dim, 2).astype(np.float32) / np.float32(dim)
    powers = [math.pow(theta, exponent) for exponent in exponents.tolist()]
    return np.array(powers).astype(np.float32)


def _spec(
    kind: str, theta: float, frequencies: Float32, factor: float = 1.0, attention: float = 1.0
) -> RopeSpec:
    values = tuple(frequencies.astype(np.float32).tolist())
    return RopeSpec(values, attention, kind, factor, theta)
