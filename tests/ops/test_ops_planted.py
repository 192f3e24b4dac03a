"""The tests of the ops would notice: every planted error is found by at least one case.

Each entry of PLANTED is a wrong version of one op, such as someone might write. It takes the
reference's place; the results of the case must then differ by more than the op's tolerance. (What
test_ops_compute.py compares natively is compared here with the right reference: the two are equal
within that tolerance.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ops_helpers import TOLERANCES, compute_cases
from reference_helpers import max_error

from octavo.reference import ops

Array = np.ndarray
PLANTED: dict[str, Callable[..., Any]] = {}


def planted(wrong: Callable[..., Any]) -> Callable[..., Any]:
    """Register a wrong op; its name is the op's, two underscores, and what is wrong."""
    PLANTED[wrong.__name__] = wrong
    return wrong


def truncate(x: Array) -> Array:
    """float32 to bfloat16 by cutting off, not rounding."""
    bits = x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(x.dtype)


@planted
def embed__next_row(table, ids, position_table=None, positions=None, dtype="f32"):
    return ops.embed(table, (ids + 1) % len(table), position_table, positions, dtype)


@planted
def embed__no_positions(table, ids, position_table=None, positions=None, dtype="f32"):
    return ops.embed(table, ids, None, None, dtype)


@planted
def embed__not_rounded(table, ids, position_table=None, positions=None, dtype="f32"):
    return ops.embed(table, ids, position_table, positions, "f32")


@planted
def norm__eps_outside_the_root(x, weight, bias, eps, kind="rms"):
    x = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    y = x / (np.sqrt(np.mean(x * x, -1, keepdims=True)) + eps) * weight
    return y if bias is None else y + bias


@planted
def norm__no_eps(x, weight, bias, eps, kind="rms"):
    return ops.norm(x, weight, bias, 1e-30, kind)


@planted
def norm__unbiased_variance(x, weight, bias, eps, kind="rms"):
    width = x.shape[-1]
    return ops.norm(x, weight, bias, eps * (width - 1) / width, kind) * math.sqrt(1 - 1 / width)


@planted
def norm__mean_not_subtracted(x, weight, bias, eps, kind="rms"):
    return ops.norm(x, weight, bias, eps, "rms")


@planted
def norm__no_bias(x, weight, bias, eps, kind="rms"):
    return ops.norm(x, weight, None, eps, kind)


@planted
def add_norm__of_x_alone(residual, x, weight, bias, eps, kind="rms"):
    return residual + x, ops.norm(x, weight, bias, eps, kind)


@planted
def add_norm__residual_kept(residual, x, weight, bias, eps, kind="rms"):
    return residual, ops.norm(residual + x, weight, bias, eps, kind)


@planted
def norm_heads__all_heads_together(x, weight, bias, eps, kind="rms"):
    return ops.norm(x, np.resize(weight, x.shape[-1]), bias, eps, kind)


@planted
def norm_heads__next_heads_weight(x, weight, bias, eps, kind="rms"):
    return ops.norm_heads(x, np.roll(weight, 1), bias, eps, kind)


@planted
def norm_heads__no_eps(x, weight, bias, eps, kind="rms"):
    return ops.norm_heads(x, weight, bias, 1e-30, kind)


@planted
def scale__no_factor(x, factor, cap=0.0):
    return ops.scale(x, 1.0, cap)


@planted
def scale__no_cap(x, factor, cap=0.0):
    return ops.scale(x, factor)


@planted
def scale__factor_after_the_cap(x, factor, cap=0.0):
    return ops.scale(x, 1.0, cap) * factor


@planted
def scale__clipped(x, factor, cap=0.0):
    return np.clip(x * factor, -cap, cap) if cap else x * factor


@planted
def linear__no_bias(x, weight, bias=None, dtype="f32"):
    return ops.linear(x, weight, None, dtype)


@planted
def linear__last_input_left_out(x, weight, bias=None, dtype="f32"):
    return ops.linear(x[:, :-1], weight[:, :-1], bias, dtype)


@planted
def linear__x_not_rounded(x, weight, bias=None, dtype="f32"):
    return ops.linear(x, ops.round_to_bf16(weight) if dtype == "bf16" else weight, bias)


@planted
def linear__cut_off_not_rounded(x, weight, bias=None, dtype="f32"):
    if dtype == "bf16":
        x, weight = truncate(x), truncate(weight)
    return ops.linear(x, weight, bias)


@planted
def linear__result_rounded(x, weight, bias=None, dtype="f32"):
    y = ops.linear(x, weight, bias, dtype)
    return ops.round_to_bf16(y) if dtype == "bf16" else y


def with_rope(rotate: Callable[..., Array]) -> Callable[..., Any]:
    """rope_and_store with another rotation."""

    def wrong(q, k, v, positions, slots, frequencies, num_slots, kv_dtype="f32", factor=1.0):
        if frequencies is not None:
            q, k = (rotate(x, positions, frequencies) * np.float32(factor) for x in (q, k))
        return ops.rope_and_store(q, k, v, positions, slots, None, num_slots, kv_dtype)

    return wrong


def halves_swapped(x: Array, positions: Array, frequencies: Array) -> Array:
    return ops.rope(x, -positions, frequencies)


def neighbours_paired(x: Array, positions: Array, frequencies: Array) -> Array:
    apart = np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    turned = ops.rope(apart, positions, frequencies)
    half = x.shape[-1] // 2
    return np.stack([turned[..., :half], turned[..., half:]], axis=-1).reshape(x.shape)


def position_off_by_one(x: Array, positions: Array, frequencies: Array) -> Array:
    return ops.rope(x, positions + 1, frequencies)


PLANTED["rope_and_store__halves_swapped"] = with_rope(halves_swapped)
PLANTED["rope_and_store__neighbours_paired"] = with_rope(neighbours_paired)
PLANTED["rope_and_store__position_off_by_one"] = with_rope(position_off_by_one)


@planted
def rope_and_store__half_a_head_apart(q, k, v, at, slots, turns, n, kv_dtype="f32", factor=1.0):
    """As if element i turned with i + head_dim / 2, however few turn."""
    if turns is not None:
        whole = np.zeros(q.shape[-1] // 2, np.float32)
        whole[: len(turns)] = turns
        turns = whole
    return ops.rope_and_store(q, k, v, at, slots, turns, n, kv_dtype, factor)


@planted
def rope_and_store__factor_left_out(q, k, v, at, slots, turns, n, kv_dtype="f32", factor=1.0):
    return ops.rope_and_store(q, k, v, at, slots, turns, n, kv_dtype)


@planted
def rope_and_store__v_rotated(q, k, v, at, slots, turns, n, kv_dtype="f32", factor=1.0):
    v = ops.rope(v, at, turns)
    return ops.rope_and_store(q, k, v, at, slots, turns, n, kv_dtype, factor)


@planted
def rope_and_store__next_slot(q, k, v, at, slots, turns, n, kv_dtype="f32", factor=1.0):
    slots = np.where(slots >= 0, (slots + 1) % n, slots)
    return ops.rope_and_store(q, k, v, at, slots, turns, n, kv_dtype, factor)


@planted
def rope_and_store__slot_minus_one_stored(q, k, v, at, slots, turns, n, kv_dtype="f32", factor=1.0):
    return ops.rope_and_store(q, k, v, at, slots % n, turns, n, kv_dtype, factor)


@planted
def rope_and_store__not_rounded(q, k, v, at, slots, turns, n, kv_dtype="f32", factor=1.0):
    return ops.rope_and_store(q, k, v, at, slots, turns, n, "f32", factor)


@planted
def rope_and_store__rounded_before_rope(q, k, v, at, slots, turns, n, kv_dtype="f32", factor=1.0):
    k = ops.to_cache(k, kv_dtype)
    return ops.rope_and_store(q, k, v, at, slots, turns, n, kv_dtype, factor)


@planted
def attention__no_scale(q, k, v, scale, window=0, dtype="f32", softcap=0.0):
    return ops.attention(q, k, v, 1.0, window, dtype, softcap)


@planted
def attention__last_key_unseen(q, k, v, scale, window=0, dtype="f32", softcap=0.0):
    if len(k) == len(q):
        return ops.attention(q, k, v, scale, window, dtype, softcap)
    return ops.attention(q, k[:-1], v[:-1], scale, window, dtype, softcap)


@planted
def attention__not_causal(q, k, v, scale, window=0, dtype="f32", softcap=0.0):
    rows = [ops.attention(q[i : i + 1], k, v, scale, window, dtype, softcap) for i in range(len(q))]
    return np.concatenate(rows)


@planted
def attention__window_one_too_wide(q, k, v, scale, window=0, dtype="f32", softcap=0.0):
    return ops.attention(q, k, v, scale, window + 1 if window else 0, dtype, softcap)


@planted
def attention__no_window(q, k, v, scale, window=0, dtype="f32", softcap=0.0):
    return ops.attention(q, k, v, scale, 0, dtype, softcap)


@planted
def attention__no_softcap(q, k, v, scale, window=0, dtype="f32", softcap=0.0):
    return ops.attention(q, k, v, scale, window, dtype)


@planted
def attention__softcap_before_the_scale(q, k, v, scale, window=0, dtype="f32", softcap=0.0):
    return ops.attention(q, k, v, scale, window, dtype, softcap * scale)


@planted
def attention__heads_interleaved(q, k, v, scale, window=0, dtype="f32", softcap=0.0):
    heads, kv_heads = q.shape[1], k.shape[1]
    order = np.arange(heads) % kv_heads
    return ops.attention(q, k[:, order], v[:, order], scale, window, dtype, softcap)


@planted
def attention__scale_of_another_width(q, k, v, scale, window=0, dtype="f32", softcap=0.0):
    return ops.attention(q, k, v, scale * 1.01, window, dtype, softcap)


@planted
def attention__queries_not_rounded(q, k, v, scale, window=0, dtype="f32", softcap=0.0):
    return attention_unrounded(q, k, v, scale, window, dtype, softcap, "q")


@planted
def attention__weights_not_rounded(q, k, v, scale, window=0, dtype="f32", softcap=0.0):
    return attention_unrounded(q, k, v, scale, window, dtype, softcap, "weights")


@planted
def attention__sum_of_rounded_weights(q, k, v, scale, window=0, dtype="f32", softcap=0.0):
    """As if the weights that are added up were those that meet the values."""
    if dtype == "f32":
        return ops.attention(q, k, v, scale, window, softcap=softcap)
    ones = np.ones_like(v)
    share = ops.attention(q, k, ones, scale, window, dtype, softcap)  # rounded over unrounded sum
    return ops.attention(q, k, v, scale, window, dtype, softcap) / share


def attention_unrounded(q, k, v, scale, window, dtype, softcap, what):
    """ops.attention with one of the two roundings of "bf16" left out."""
    if dtype == "f32":
        return ops.attention(q, k, v, scale, window, softcap=softcap)
    if what == "weights":
        return ops.attention(ops.round_to_bf16(q), k, v, scale, window, softcap=softcap)
    # q exactly, as a sum of three bf16 numbers in thrice as many dimensions.
    first = ops.round_to_bf16(q)
    second = ops.round_to_bf16(q - first)
    parts = np.concatenate([first, second, ops.round_to_bf16(q - first - second)], axis=-1)
    wide = ops.attention(parts, np.tile(k, 3), np.tile(v, 3), scale, window, dtype, softcap)
    return wide[..., : q.shape[-1]]


@planted
def gated_activation__gate_and_up_swapped(gate, up, activation):
    return ops.gated_activation(up if gate is not None else None, up, activation)


@planted
def gated_activation__gate_left_out(gate, up, activation):
    return ops.gated_activation(None, up, activation)


@planted
def gated_activation__gelu_by_tanh(gate, up, activation):
    return ops.gated_activation(gate, up, {"gelu": "gelu_tanh"}.get(activation, activation))


@planted
def gated_activation__quick_gelu(gate, up, activation):
    if not activation.startswith("gelu"):
        return ops.gated_activation(gate, up, activation)
    first = up if gate is None else gate
    with np.errstate(over="ignore"):
        y = first / (1 + np.exp(-1.702 * first))
    return y if gate is None else y * up


def with_route(wrong: Callable[..., Any]) -> Callable[..., Any]:
    """moe with another choice: wrong(logits, experts of a row, normalize) -> experts, weights."""

    def moe(x, logits, gate, up, down, count, normalize=True, activation="silu", dtype="f32"):
        chosen, weights = wrong(logits, count, normalize)
        dense = np.full(logits.shape, -np.inf)
        np.put_along_axis(dense, chosen, np.log(weights), axis=1)
        total = np.exp(dense).sum(axis=1, keepdims=True)
        y = ops.moe(x, dense, gate, up, down, count, True, activation, dtype)
        return y * total  # `route` made the weights' sum 1

    return moe


def upper_of_equal_ones(logits: Array, count: int, normalize: bool) -> tuple[Array, Array]:
    chosen, weights = ops.route(logits[:, ::-1], count, normalize)
    return logits.shape[1] - 1 - chosen, weights


def next_expert(logits: Array, count: int, normalize: bool) -> tuple[Array, Array]:
    chosen, weights = ops.route(logits, count, normalize)
    return (chosen + 1) % logits.shape[1], weights


def equal_weights(logits: Array, count: int, normalize: bool) -> tuple[Array, Array]:
    chosen, weights = ops.route(logits, count, normalize)
    return chosen, np.broadcast_to(weights.mean(axis=1, keepdims=True), weights.shape)


PLANTED["moe__upper_of_equal_ones"] = with_route(upper_of_equal_ones)
PLANTED["moe__next_expert"] = with_route(next_expert)
PLANTED["moe__equal_weights"] = with_route(equal_weights)


@planted
def moe__normalized_the_other_way(x, logits, gate, up, down, count, normalize=True, *rest):
    return ops.moe(x, logits, gate, up, down, count, not normalize, *rest)


@planted
def moe__one_expert_too_few(x, logits, gate, up, down, count, normalize=True, *rest):
    return ops.moe(x, logits, gate, up, down, max(count - 1, 1), normalize, *rest)


@planted
def moe__gate_and_up_swapped(x, logits, gate, up, down, count, normalize=True, *rest):
    return ops.moe(x, logits, up, gate, down, count, normalize, *rest)


@planted
def moe__weights_before_the_experts(x, logits, gate, up, down, count, normalize=True, *rest):
    """The weight multiplies what an expert is given, not what it gives."""
    chosen, weights = ops.route(logits, count, normalize)
    out = np.zeros((len(x), down.shape[1]))
    for place in range(count):
        alone = np.full(logits.shape, -np.inf)
        np.put_along_axis(alone, chosen[:, [place]], 0.0, axis=1)
        out += ops.moe(x * weights[:, [place]], alone, gate, up, down, 1, True, *rest)
    return out


@planted
def take_rows__next(x, rows):
    return ops.take_rows(x, (rows + 1) % len(x))


CASES = compute_cases()


@pytest.mark.parametrize("name", PLANTED)
def test_planted_error_is_found(name: str) -> None:
    op = name.split("__")[0]
    broken = SimpleNamespace(**{**vars(ops), op: PLANTED[name]})
    found = []
    for case in (case for case in CASES if case.op == op):
        right, wrong = case.reference(ops), case.reference(broken)
        worst = max(max_error(a, b) for a, b in zip(wrong, right, strict=True))
        if worst > TOLERANCES[op]:
            found.append((worst, str(case)))
    assert found, f"no case of {op} notices {name}"
    # Well over the tolerance somewhere, so that it is no matter of luck.
    assert max(found)[0] > 20 * TOLERANCES[op], max(found)


def test_every_compute_op_has_a_planted_error() -> None:
    assert {name.split("__")[0] for name in PLANTED} == set(ops.OPS)


def test_the_measure_itself() -> None:
    x = np.linspace(-1, 1, 50)
    assert max_error(x, x) == 0
    assert max_error(x + 1e-6, x) > 1e-6
    assert max_error(np.where(x > 0.9, np.nan, x), x) == math.inf
    assert max_error(x[:-1], x) == math.inf
