"""The usual mistakes, tried out: of a broken op, which one gives exactly what was seen.

Each suspect is the op's definition with one mistake in it, run on the inputs that the broken run
had. When one agrees with the run's output to rounding, the report can say what is wrong instead
of what might be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from octavo.diff.local import LINEAR_PARTS, Scene, define
from octavo.diff.measure import Float32, row_errors
from octavo.diff.tolerance import STEP_BF16
from octavo.models.spec import NormSpec, RopeSpec
from octavo.reference import ops
from octavo.reference.ops import Array

Suspect = tuple[str, Callable[[], Array]]


def find_suspect(scene: Scene, part: str, seen: Float32, tolerance: float) -> str | None:
    """The sentence of the mistake whose result is `seen` (rows, width), or None.

    tolerance: largest relative error of any row that still counts as the same. A suspect that
    cannot be told from the right op on this input is passed over.
    """
    right = define(scene, part).astype(np.float32)
    if part == "attn" and scene.model.kv_dtype == "bf16":
        # A weight that lies near the middle of two bfloat16 numbers may be rounded either way.
        tolerance += STEP_BF16
    for sentence, compute in suspects(scene, part):
        guess = compute().reshape(len(seen), -1).astype(np.float32)
        if guess.shape != seen.shape:
            continue
        error = float(row_errors(guess, seen).relative.max())
        difference = float(row_errors(guess, right).relative.max())
        if error <= tolerance and error < 0.1 * difference:
            return sentence
    return None


def suspects(scene: Scene, part: str) -> Iterator[Suspect]:
    """The mistakes that are known for the op behind tap `part`."""
    if part == "embed":
        yield from _embed(scene)
    elif part in ("attn_norm", "mlp_norm", "final_norm"):
        yield from _norm(scene, part)
    elif part in ("q_rope", "k_rope"):
        yield from _rope(scene, part)
    elif part == "attn":
        yield from _attention(scene)
    elif part == "act":
        yield from _activation(scene)
    elif part == "out":
        yield from _residual(scene)
    elif part == "logits":
        yield from _head(scene)
    elif part in LINEAR_PARTS:
        yield from _linear(scene, part)


def _embed(scene: Scene) -> Iterator[Suspect]:
    table = scene.model.weights["embed.weight"]
    width = np.float32(table.shape[1])
    x = table[scene.token_ids]
    yield "the table's rows without the positions' rows", lambda: x
    yield "the rows multiplied by sqrt(hidden_size)", lambda: x * np.sqrt(width)
    yield "the row before each token's (ids off by one)", lambda: table[scene.token_ids - 1]
    following = (scene.token_ids + 1) % len(table)
    yield "the row after each token's (ids off by one)", lambda: table[following]


def _norm(scene: Scene, part: str) -> Iterator[Suspect]:
    model = scene.model
    spec = model.spec.final_norm if part == "final_norm" else scene.layer.norm
    x = scene.residual
    if part == "mlp_norm":
        attn_out = scene.own("attn_out")
        yield (
            "the residual dropped: attention's output alone",
            lambda: scene.norm(part, spec, attn_out),
        )
        yield "attention's output not added to the residual", lambda: scene.norm(part, spec, x)
        x = x + attn_out
    name = part if part == "final_norm" else f"layers.{scene.layer_index}.{part}"
    weight, bias = model.weights[name + ".weight"], model.weights.get(name + ".bias")
    yield "epsilon outside the square root", lambda: _norm_eps_outside(x, weight, bias, spec)
    for eps in (0.0, 1e-5, 1e-6, 1e-12):
        if eps != spec.eps:
            yield (
                f"epsilon {eps:g} instead of {spec.eps:g}",
                partial(ops.norm, x, weight, bias, eps, spec.kind),
            )
    ones = np.ones_like(weight)
    yield "the weight left out", lambda: ops.norm(x, ones, bias, spec.eps, spec.kind)
    yield (
        "1 + weight in place of the weight",
        lambda: ops.norm(x, 1 + weight, bias, spec.eps, spec.kind),
    )
    yield "the bias left out", lambda: ops.norm(x, weight, None, spec.eps, spec.kind)
    other = "layer" if spec.kind == "rms" else "rms"
    yield (
        f"a {other} norm instead of {spec.kind}",
        lambda: ops.norm(x, weight, bias, spec.eps, other),
    )
    yield "no normalization at all", lambda: x


def _norm_eps_outside(x: Array, weight: Array, bias: Array | None, spec: NormSpec) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True) if spec.kind == "layer" else x
    root = np.sqrt((centred * centred).mean(axis=-1, keepdims=True))
    y: Array = centred / (root + np.float32(spec.eps)) * weight
    return y if bias is None else y + bias


def _linear(scene: Scene, part: str) -> Iterator[Suspect]:
    name, source = LINEAR_PARTS[part]
    x, weight, model = scene.own(source), scene.weight(name), scene.model
    full_name = f"layers.{scene.layer_index}.{name}"
    bias = model.weights.get(full_name + ".bias")
    multiply = partial(model.multiply, full_name, x)
    if bias is not None:
        yield "the bias left out", lambda: scene.linear(name, x, bias=False)
    if weight.shape[0] == weight.shape[1]:
        yield "the weight transposed", lambda: multiply(weight.T, bias)
    others = (("q", "k", "v"), ("gate", "up"))
    for other in next((group for group in others if name in group), ()):
        full = f"layers.{scene.layer_index}.{other}.weight"
        if other != name and full in model.weights and model.weights[full].shape == weight.shape:
            yield f"the weight of {other} in place of {name}'s", partial(scene.linear, other, x)
    for layer in (scene.layer_index - 1, scene.layer_index + 1):
        full = f"layers.{layer}.{name}.weight"
        if full in model.weights and model.weights[full].shape == weight.shape:
            yield (
                f"the weight of layer {layer}",
                partial(multiply, model.weights[full], bias),
            )
    if name in ("q", "k"):
        heads = weight.shape[0] // scene.layer.head_dim
        paired = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2)
        yield (
            "rows in GGUF's order (pairs side by side), not undone",
            lambda: multiply(paired.reshape(weight.shape), bias),
        )
        split = weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2)
        yield (
            "GGUF's order of rows undone where there was none",
            lambda: multiply(split.reshape(weight.shape), bias),
        )
    if full_name in model.formats:
        yield "activations not rounded", lambda: ops.linear(x, weight, bias)
    elif model.dtype == "bf16":
        yield "activations not rounded to bfloat16", lambda: ops.linear(x, weight, bias)
    else:
        yield (
            "weight and activations rounded to bfloat16",
            lambda: ops.linear(x, weight, bias, "bf16"),
        )


def _rope(scene: Scene, part: str) -> Iterator[Suspect]:
    x, positions = scene.heads(part[0]), scene.positions
    frequencies, rope = scene.model.frequencies[scene.layer_index], scene.layer.rope
    if frequencies is None or rope is None:
        return
    half = x.shape[-1] // 2

    def swap(values: Array) -> Array:
        return np.concatenate([values[..., half:], values[..., :half]], axis=-1)

    def neighbours() -> Array:
        halves = np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
        turned = ops.rope(halves, positions, frequencies)
        return np.stack([turned[..., :half], turned[..., half:]], axis=-1).reshape(x.shape)

    yield "no rotation", lambda: x
    yield (
        "halves swapped: the sine's sign is the other way round",
        lambda: ops.rope(x, positions, -frequencies),
    )
    yield "halves swapped on the way in", lambda: ops.rope(swap(x), positions, frequencies)
    yield "halves swapped on the way out", lambda: swap(ops.rope(x, positions, frequencies))
    yield "neighbours paired (i with i + 1) instead of halves", neighbours
    for step in (-1, 1):
        yield f"positions off by {step:+d}", partial(ops.rope, x, positions + step, frequencies)
    yield (
        "positions counted from the chunk's first token",
        lambda: ops.rope(x, positions - positions[0], frequencies),
    )
    plain = RopeSpec(theta=rope.theta)
    if rope.scaling != "default":
        yield (
            f"the {rope.scaling} scaling left out",
            lambda: ops.rope(x, positions, ops.rope_frequencies(plain, x.shape[-1])),
        )
    if rope.theta != 10000.0:
        default = replace(rope, theta=10000.0)
        yield (
            "theta 10000 instead of the model's",
            lambda: ops.rope(x, positions, ops.rope_frequencies(default, x.shape[-1])),
        )


def _attention(scene: Scene) -> Iterator[Suspect]:
    layer, k, v = scene.layer, scene.keys, scene.values
    if k is None or v is None:
        return
    q, scale, window = scene.heads("q" + scene.rotated), layer.score_scale, layer.window
    # With one mistake each: the rest is as over the model's own cache.
    attend = partial(ops.attention, dtype=ops.attention_dtype(scene.model.kv_dtype))
    yield "no scale", lambda: attend(q, k, v, 1.0, window)
    yield "scale 1 / head_dim, not its root", lambda: attend(q, k, v, scale**2, window)
    yield (
        "the scale applied twice over all heads: 1 / hidden_size",
        lambda: attend(q, k, v, layer.q_size**-0.5, window),
    )
    if 1 < layer.num_kv_heads < layer.num_heads:
        order = np.arange(layer.num_heads) % layer.num_kv_heads
        yield (
            "query head h reads KV head h % num_kv_heads",
            lambda: attend(q, k[:, order], v[:, order], scale, window),
        )
    if layer.num_kv_heads > 1:
        first = np.zeros(layer.num_heads, dtype=np.int64)
        yield (
            "every query head reads KV head 0",
            lambda: attend(q, k[:, first], v[:, first], scale, window),
        )
    yield (
        "not causal: tokens see those behind them",
        # A query by itself is the last token's, which sees all.
        lambda: np.concatenate([attend(row[None], k, v, scale) for row in q]),
    )
    if len(k) > len(q):
        rows = len(q)
        yield (
            "only this chunk's keys and values seen, not the cache",
            lambda: attend(q, k[-rows:], v[-rows:], scale, window),
        )
    if window:
        yield "the window ignored", lambda: attend(q, k, v, scale, 0)
        yield "a window one too wide", lambda: attend(q, k, v, scale, window + 1)
    if scene.rotated:
        yield "q before rope", lambda: attend(scene.heads("q"), k, v, scale, window)
    rounded = ops.round_to_bf16
    if scene.model.kv_dtype == "f32":
        yield (
            "keys and values rounded to bfloat16",
            lambda: ops.attention(q, rounded(k), rounded(v), scale, window),
        )
        yield (
            "queries, weights, keys and values rounded to bfloat16",
            lambda: ops.attention(q, rounded(k), rounded(v), scale, window, "bf16"),
        )
    elif scene.model.kv_dtype == "bf16":
        yield from _rounded_otherwise(q, k, v, scale, window)


def _rounded_otherwise(
    q: Array, k: Array, v: Array, scale: float, window: int
) -> Iterator[Suspect]:
    """What may be rounded to bfloat16, or not, in attention over a bf16 cache."""
    rounded = ops.round_to_bf16
    yield (
        "float32 attention: neither queries nor weights rounded to bfloat16",
        lambda: ops.attention(q, k, v, scale, window),
    )
    yield (
        "weights not rounded to bfloat16",
        lambda: ops.attention(rounded(q), k, v, scale, window),
    )

    def whole(powers: Array) -> Array:
        weights: Array = np.exp2(powers - np.ceil(powers.max(axis=-1, keepdims=True)))
        return weights

    def exact(powers: Array) -> Array:
        weights: Array = np.exp2(powers - powers.max(axis=-1, keepdims=True))
        return weights

    def total(weights: Array) -> Array:
        sums: Array = weights.sum(axis=-1, keepdims=True)
        return sums

    weigh = partial(_weigh, k=k, v=v, scale=scale, window=window)
    yield (
        "queries not rounded to bfloat16",
        lambda: weigh(q, lambda p: rounded(whole(p)) / total(whole(p))),
    )
    yield (
        "weights are powers from the greatest score itself, not from a whole number",
        lambda: weigh(rounded(q), lambda p: rounded(exact(p)) / total(exact(p))),
    )
    yield (
        "weights divided by their sum before they are rounded to bfloat16",
        lambda: weigh(rounded(q), lambda p: rounded(whole(p) / total(whole(p)))),
    )
    yield (
        "the weights' sum taken after rounding them to bfloat16",
        lambda: weigh(rounded(q), lambda p: rounded(whole(p)) / total(rounded(whole(p)))),
    )


def _weigh(
    q: Array, weights: Callable[[Array], Array], k: Array, v: Array, scale: float, window: int
) -> Array:
    """Attention with `weights` of the scores in powers of two, (heads, rows, context).

    Scores that a token does not see are -inf. The other arguments are those of `ops.attention`.
    """
    group, context, rows = q.shape[1] // k.shape[1], len(k), len(q)
    k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
    powers = np.einsum("qhd,khd->hqk", q, k) * np.float32(scale * math.log2(math.e))
    distance = (context - rows + np.arange(rows))[:, None] - np.arange(context)
    hidden = (distance < 0) | ((distance >= window) if window else False)
    out: Array = np.einsum("hqk,khd->qhd", weights(np.where(hidden, -np.inf, powers)), v)
    return out


def _activation(scene: Scene) -> Iterator[Suspect]:
    up, activation = scene.own("up"), scene.layer.activation
    gate = scene.own("gate") if scene.layer.gated else None
    if gate is not None:
        yield "gate and up swapped", lambda: ops.gated_activation(up, gate, activation)
        yield "no activation: gate * up", lambda: gate * up
        yield (
            "the gate's activation alone, not multiplied by up",
            lambda: ops.activate(gate, activation),
        )
        yield "up left without a gate", lambda: ops.activate(up, activation)
    for other in ("silu", "gelu", "gelu_tanh", "relu"):
        if other != activation:
            yield f"{other} instead of {activation}", partial(ops.gated_activation, gate, up, other)


def _residual(scene: Scene) -> Iterator[Suspect]:
    x, attn_out, mlp_out = scene.residual, scene.own("attn_out"), scene.own("mlp_out")
    yield "the residual dropped: the sublayers' outputs alone", lambda: attn_out + mlp_out
    yield "the residual dropped: the MLP's output alone", lambda: mlp_out
    yield "attention's output not added", lambda: x + mlp_out
    yield "the MLP's output not added", lambda: x + attn_out
    yield (
        "the MLP's output added to its own norm, not to the residual",
        lambda: scene.own("mlp_norm") + mlp_out,
    )
    yield "the MLP's output added twice", lambda: x + attn_out + mlp_out + mlp_out


def _head(scene: Scene) -> Iterator[Suspect]:
    model, x = scene.model, scene.taps["final_norm"]
    if not model.spec.tie_word_embeddings:
        yield (
            "the embedding table used as the head",
            lambda: model.multiply("lm_head", x, model.weights["embed.weight"], None),
        )
    yield (
        "the final norm left out",
        lambda: define(replace(scene, taps={**scene.taps, "final_norm": scene.residual}), "logits"),
    )
