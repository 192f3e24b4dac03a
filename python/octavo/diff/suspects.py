"""The usual mistakes, tried out: of a broken op, which one gives exactly what was seen.

Each suspect is the op's definition with one mistake in it, run on the inputs that the broken run
had. When one agrees with the run's output to rounding, the report can say what is wrong instead
of what might be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import combinations

import numpy as np

from octavo.diff.definition import OpInputs, define, op_call
from octavo.diff.measure import Float32, row_errors
from octavo.diff.tolerance import STEP_BF16
from octavo.models.layer import Op
from octavo.models.rope import default_rope
from octavo.models.spec import NormSpec
from octavo.reference import ops
from octavo.reference.nodes import add, expert_output
from octavo.reference.ops import Array

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
Suspect = tuple[str, Callable[[], Array]]
Call = Callable[..., Array]  # see `op_call`


def find_suspect(inputs: OpInputs, seen: Float32, tolerance: float) -> str | None:
    """The sentence of the mistake whose result is `seen` (rows, width), or None.

    tolerance: largest relative error of any row that still counts as the same. A suspect that
    cannot be told from the right op on this input is passed over.
    """
    right = define(inputs)
    if inputs.node.op == "attention" and inputs.model.kv_dtype == "bf16":
        # A weight that lies near the middle of two bfloat16 numbers may be rounded either way.
        tolerance += STEP_BF16
    suspects = _SUSPECTS.get(inputs.node.op)
    for sentence, compute in suspects(inputs, op_call(inputs)) if suspects else ():
        guess = compute().reshape(len(seen), -1).astype(np.float32)
        if guess.shape != seen.shape:
            continue
        error = float(row_errors(guess, seen).relative.max())
        difference = float(row_errors(guess, right).relative.max())
        if error <= tolerance and error < 0.1 * difference:
            return sentence
    return None


def _embed(inputs: OpInputs, op: Call) -> Iterator[Suspect]:
    table, ids = inputs.weight(inputs.node.matrices[0].name), inputs.token_ids
    yield "the table's rows without the positions' rows", partial(op, position_table=None)
    if inputs.node.scale != 1:
        yield "embed_multiplier left out", partial(op, scale=1.0)
    width = np.float32(table.shape[1])
    yield "the rows multiplied by sqrt(hidden_size)", lambda: table[ids] * np.sqrt(width)
    for step, which in ((-1, "before"), (1, "after")):
        shifted = (ids + step) % len(table)
        yield f"the row {which} each token's (ids off by one)", partial(table.__getitem__, shifted)


def _norm(inputs: OpInputs, op: Call) -> Iterator[Suspect]:
    """The mistakes of a sum, of a norm, and of a norm of a sum."""
    node, spec = inputs.node, inputs.node.norm
    if spec is None:
        yield from _sum(inputs, lambda terms, scale: op(terms=terms, scale=scale))
        return
    if len(node.inputs) > 1:
        yield from _sum(inputs, lambda terms, scale: op(x=add(terms, scale)))
    if not node.normalizes:
        return
    x, weight = add(inputs.operands, node.scale), inputs.weight(node.tap)
    bias = inputs.model.weights.get(f"{node.tap}.bias")
    yield "epsilon outside the square root", lambda: _norm_eps_outside(x, weight, bias, spec)
    for eps in (0.0, 1e-5, 1e-6, 1e-12):
        if eps != spec.eps:
            yield f"epsilon {eps:g} instead of {spec.eps:g}", partial(op, eps=eps)
    other = "layer" if spec.kind == "rms" else "rms"
    others: dict[str, Callable[[], Array]] = {
        "the weight left out": partial(op, weight=np.ones_like(weight)),
        "1 + weight in place of the weight": partial(op, weight=1 + weight),
        "the bias left out": partial(op, bias=None),
        f"a {other} norm instead of {spec.kind}": partial(op, kind=other),
        "no normalization at all": lambda: x,
    }
    if node.op == "norm_heads":
        one, each = np.ones(inputs.layer.head_dim, weight.dtype), np.resize(weight, x.shape[1])
        others["all heads normalized together"] = partial(op, weight=each)
        others["each head normalized by itself"] = lambda: op(weight=one) * each
    yield from others.items()


def _sum(inputs: OpInputs, op: Call) -> Iterator[Suspect]:
    """What a sum may lack or have twice.

    op: terms (rows, width), and `scale` of all but the first (the residual stream) -> what the op
    makes of them.
    """
    given = partial(op, scale=inputs.node.scale)
    nodes, node, terms = inputs.nodes, inputs.node, inputs.operands
    names = ["the residual", *(nodes[tap].part for tap in node.inputs[1:])]
    for count in range(1, len(terms)):
        for kept in combinations(range(len(terms)), count):
            missing = [name for index, name in enumerate(names) if index not in kept]
            sentence = f"the sum without {' and '.join(missing)}"
            yield sentence, partial(given, [terms[index] for index in kept])
    for norm in nodes.values():
        if not norm.normalizes or norm.op == "norm_heads" or norm.layer != node.layer:
            continue
        if norm is not node and norm.tap in inputs.taps:
            sentence = f"{names[-1]} added to {norm.part}, not to the residual"
            yield sentence, partial(given, [inputs.taps[norm.tap], terms[-1]])
    if inputs.node.scale != 1:
        yield "residual_multiplier left out", partial(op, terms, scale=1.0)
    for name, term in zip(names[1:], terms[1:], strict=True):
        yield f"{name} added twice", partial(given, [*terms, term])


def _norm_eps_outside(x: Array, weight: Array, bias: Array | None, spec: NormSpec) -> Array:
    x = x.reshape(-1, len(weight))
    centred = x - x.mean(axis=-1, keepdims=True) if spec.kind == "layer" else x
    root = np.sqrt((centred * centred).mean(axis=-1, keepdims=True))
    y: Array = centred / (root + np.float32(spec.eps)) * weight
    return y if bias is None else y + bias


def _linear(inputs: OpInputs, op: Call) -> Iterator[Suspect]:
    node, nodes, model = inputs.node, inputs.nodes, inputs.model
    name, (x,) = node.matrix.name, inputs.operands
    weight, bias = inputs.weight(name), model.weights.get(f"{name}.bias")
    if bias is not None:
        yield "the bias left out", partial(op, bias=None)
    if node.scale != 1:
        yield "logits_multiplier left out", partial(op, scale=1.0)
    if node.cap != 0:
        yield "logits_softcap left out", partial(op, cap=0.0)
    if weight.shape[0] == weight.shape[1]:
        yield "the weight transposed", partial(op, weight=weight.T)
    short = name.rpartition(".")[2]
    for other in nodes.values():
        if other.op != "linear" or other is node or other.matrix.shape != weight.shape:
            continue
        if other.inputs == node.inputs:  # q, k and v; gate and up
            other_short = other.matrix.name.rpartition(".")[2]
            sentence = f"the weight of {other_short} in place of {short}'s"
            yield sentence, op_call(replace(inputs, node=other))
        elif other.part == node.part and abs((other.layer or 0) - (node.layer or 0)) == 1:
            weight_there = inputs.weight(other.matrix.name)
            yield f"the weight of layer {other.layer}", partial(op, weight=weight_there)
    readers = {each.op for each in nodes.values() if node.tap in each.inputs}
    if readers & {"rope_and_store", "norm_heads"}:
        heads = weight.shape[0] // inputs.layer.head_dim
        paired = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        split = weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        sentence = "rows in GGUF's order (pairs side by side), not undone"
        yield sentence, partial(op, weight=paired)
        yield "GGUF's order of rows undone where there was none", partial(op, weight=split)
    before = nodes[node.inputs[0]]
    if before.normalizes and all(tap in inputs.taps for tap in before.inputs):
        unnormalized = add([inputs.taps[tap] for tap in before.inputs], before.scale)
        yield f"{before.part} left out: the input not normalized", partial(op, x=unnormalized)
    if node.layer is None and not model.spec.tie_word_embeddings:
        yield "the embedding table used as the head", partial(op, weight=inputs.weight("embed"))
    if node.matrix.is_router:
        sentence = "weight and activations rounded to bfloat16, as a router's never are"
        yield sentence, lambda: ops.linear(x, weight, bias, "bf16")
        yield "the product rounded to bfloat16", lambda: ops.round_to_bf16(op())
    elif name in model.formats or model.dtype == "bf16":
        to = "" if name in model.formats else " to bfloat16"
        yield f"activations not rounded{to}", lambda: ops.linear(x, weight, bias)
    else:
        sentence = "weight and activations rounded to bfloat16"
        yield sentence, lambda: ops.linear(x, weight, bias, "bf16")


def _rope(inputs: OpInputs, op: Call) -> Iterator[Suspect]:
    x, positions = inputs.heads(inputs.node.inputs[0]), inputs.positions
    frequencies, rope = inputs.model.frequencies[inputs.layer_index], inputs.layer.rope
    if frequencies is None or rope is None:
        return
    half = len(frequencies)
    order = np.arange(x.shape[-1])  # of a head's elements; those from 2 * half on do not turn
    swapped, pairs = order.copy(), order.copy()
    swapped[: 2 * half] = np.roll(order[: 2 * half], half)
    pairs[: 2 * half] = np.concatenate([order[0 : 2 * half : 2], order[1 : 2 * half : 2]])

    def neighbours() -> Array:
        return op(x=x[..., pairs])[..., np.argsort(pairs)]

    start, backwards = positions - positions[0], partial(op, frequencies=-frequencies)
    ways: dict[str, Callable[[], Array]] = {
        "no rotation": lambda: x,
        "halves swapped: the sine's sign is the other way round": backwards,
        "halves swapped on the way in": lambda: op(x=x[..., swapped]),
        "halves swapped on the way out": lambda: op()[..., swapped],
        "neighbours paired (i with i + 1) instead of halves": neighbours,
        "positions off by -1": partial(op, positions=positions - 1),
        "positions off by +1": partial(op, positions=positions + 1),
        "positions counted from the chunk's first token": partial(op, positions=start),
    }
    yield from ways.items()
    if rope.attention_factor != 1:
        yield "cosines and sines not multiplied", partial(op, attention_factor=1.0)
    others = []
    if rope.kind != "default":
        others.append((f"the {rope.kind} scaling left out", rope.theta))
    elif rope.theta != 10000.0:
        others.append(("theta 10000 instead of the model's", 10000.0))
    for sentence, theta in others:
        other = default_rope(theta, 2 * half).frequencies
        yield sentence, partial(op, frequencies=np.array(other, np.float32))


def _attention(inputs: OpInputs, op: Call) -> Iterator[Suspect]:
    layer, k, v = inputs.layer, inputs.keys, inputs.values
    source = inputs.nodes[inputs.node.inputs[0]]
    q, scale, window = inputs.heads(source.tap), layer.score_scale, layer.window
    wider, heads, rows = layer.q_size**-0.5, np.arange(layer.num_heads), len(q)
    yield "no scale", partial(op, scale=1.0)
    yield "scale 1 / head_dim, not its root", partial(op, scale=scale**2)
    yield "the scale applied twice over all heads: 1 / hidden_size", partial(op, scale=wider)
    if 1 < layer.num_kv_heads < layer.num_heads:
        order = heads % layer.num_kv_heads
        attend = partial(op, k=k[:, order], v=v[:, order])
        yield "query head h reads KV head h % num_kv_heads", attend
    if layer.num_kv_heads > 1:
        first = 0 * heads
        yield "every query head reads KV head 0", partial(op, k=k[:, first], v=v[:, first])
    # A query by itself is the last token's, which sees all.
    each = [partial(op, q=row[None], window=0) for row in q]
    sentence = "not causal: tokens see those behind them"
    yield sentence, lambda: np.concatenate([attend() for attend in each])
    if len(k) > rows:
        sentence = "only this chunk's keys and values seen, not the cache"
        yield sentence, partial(op, k=k[-rows:], v=v[-rows:])
    if layer.attention_softcap:
        yield "attention_softcap left out", partial(op, softcap=0.0)
    if window:
        yield "the window ignored", partial(op, window=0)
        yield "a window one too wide", partial(op, window=window + 1)
    if source.op == "rope_and_store":
        yield "q before rope", partial(op, q=inputs.heads(source.inputs[0]))
    if inputs.model.kv_dtype == "f32":
        cached = partial(op, k=ops.round_to_bf16(k), v=ops.round_to_bf16(v))
        yield "keys and values rounded to bfloat16", cached
        sentence = "queries, weights, keys and values rounded to bfloat16"
        yield sentence, partial(cached, dtype="bf16")
    elif inputs.model.kv_dtype == "bf16":
        weigh = partial(_weigh, k=k, v=v, scale=scale, window=window)
        weigh = partial(weigh, softcap=layer.attention_softcap)
        yield from _rounded_otherwise(op, q, weigh)


def _rounded_otherwise(op: Call, q: Array, weigh: Call) -> Iterator[Suspect]:
    """What may be rounded to bfloat16, or not, in attention over a bf16 cache.

    weigh: `_weigh` but for its queries and what is done otherwise.
    """
    unrounded, rounded_q = partial(op, dtype="f32"), ops.round_to_bf16(q)
    yield "float32 attention: neither queries nor weights rounded to bfloat16", unrounded
    yield "weights not rounded to bfloat16", partial(unrounded, q=rounded_q)
    yield "queries not rounded to bfloat16", partial(weigh, q)
    sentence = "weights are powers from the greatest score itself, not from a whole number"
    yield sentence, partial(weigh, rounded_q, whole=False)
    sentence = "weights divided by their sum before they are rounded to bfloat16"
    yield sentence, partial(weigh, rounded_q, divided_first=True)
    sentence = "the weights' sum taken after rounding them to bfloat16"
    yield sentence, partial(weigh, rounded_q, sum_of_rounded=True)


def _weigh(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    window: int,
    softcap: float,
    *,
    whole: bool = True,
    divided_first: bool = False,
    sum_of_rounded: bool = False,
) -> Array:
    """Attention over a bf16 cache, as `ops.attention` has it but for the one thing asked for.

    whole: the greatest score is rounded up before powers are taken from it. divided_first: weights
    are divided by their sum, then rounded. sum_of_rounded: they are rounded, then summed.
    """
    group, context, rows = q.shape[1] // k.shape[1], len(k), len(q)
    k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
    powers = ops.score(np.einsum("qhd,khd->hqk", q, k), scale, softcap, math.log2(math.e))
    distance = (context - rows + np.arange(rows))[:, None] - np.arange(context)
    hidden = (distance < 0) | ((distance >= window) if window else False)
    powers = np.where(hidden, -np.inf, powers)  # (heads, rows, context)
    greatest = powers.max(axis=-1, keepdims=True)
    weights = np.exp2(powers - (np.ceil(greatest) if whole else greatest))
    rounded = ops.round_to_bf16(weights)
    total = (rounded if sum_of_rounded else weights).sum(axis=-1, keepdims=True)
    weights = ops.round_to_bf16(weights / total) if divided_first else rounded / total
    out: Array = np.einsum("hqk,khd->qhd", weights, v)
    return out


def _activation(inputs: OpInputs, op: Call) -> Iterator[Suspect]:
    activation = inputs.layer.activation
    if inputs.layer.gated:
        gate, up = inputs.operands
        alone = partial(ops.activate, gate, activation)
        yield "gate and up swapped", partial(op, gate=up, up=gate)
        yield "no activation: gate * up", lambda: gate * up
        yield "the gate's activation alone, not multiplied by up", alone
        yield "up left without a gate", partial(ops.activate, up, activation)
    for other in ACTIVATIONS:
        if other != activation:
            yield f"{other} instead of {activation}", partial(op, activation=other)


def _moe(inputs: OpInputs, op: Call) -> Iterator[Suspect]:
    """The mistakes of the choice of experts, of their weights, and of an expert's own MLP.

    op: `ops.mix_experts`, whose `expert` is `nodes.expert_output` but for the expert and its rows.
    """
    _, logits = inputs.operands
    moe = inputs.layer.moe
    if moe is None or not isinstance(op, partial):
        return
    expert = op.keywords["expert"]
    name, weights, activation, multiply = expert.args
    count, chosen = moe.num_experts, moe.experts_per_token
    sentence = "the chosen experts' weights not normalized: their sum is not 1"
    if not moe.normalize:
        sentence = "the chosen experts' weights normalized, which they should not be"
    yield sentence, partial(op, normalize=not moe.normalize)
    for number in dict.fromkeys((1, chosen - 1, chosen + 1)):
        if 0 < number <= count and number != chosen:
            yield f"{number} experts a token, not {chosen}", partial(op, experts_per_token=number)
    yield (
        "the router's logits rounded to bfloat16",
        partial(op, router_logits=ops.round_to_bf16(logits)),
    )
    yield (
        "the experts' outputs added without their weights",
        partial(_unweighted, op, logits, chosen),
    )
    yield "the experts of the smallest logits", partial(op, router_logits=-logits)
    for step, which in ((1, "after"), (-1, "before")):
        shifted = partial(_other_expert, expert, count, step)
        yield (
            f"the expert {which} each chosen one (numbers off by one)",
            partial(op, expert=shifted),
        )
    swapped = dict(weights)
    for index in range(count):
        gate, up = (f"{name}experts.{index}.{part}.weight" for part in ("gate", "up"))
        swapped[gate], swapped[up] = weights[up], weights[gate]
    turned = partial(expert_output, name, swapped, activation, multiply)
    yield "gate and up of every expert swapped", partial(op, expert=turned)
    for other in ACTIVATIONS:
        if other != activation:
            activated = partial(expert_output, name, weights, other, multiply)
            yield f"{other} instead of {activation} in the experts", partial(op, expert=activated)


def _other_expert(expert: Call, count: int, step: int, index: int, x: Array) -> Array:
    result: Array = expert((index + step) % count, x)
    return result


def _unweighted(op: Call, logits: Array, chosen: int) -> Array:
    """The sum of the chosen experts' outputs: their number times what equal logits give."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :chosen]
    equal = np.full_like(logits, -1e4)
    np.put_along_axis(equal, order, 0, axis=1)
    result: Array = chosen * op(router_logits=equal, normalize=True)
    return result


_SUSPECTS: Mapping[Op, Callable[[OpInputs, Call], Iterator[Suspect]]] = {
    "embed": _embed,
    "norm": _norm,
    "add_norm": _norm,
    "norm_heads": _norm,
    "linear": _linear,
    "rope_and_store": _rope,
    "attention": _attention,
    "gated_activation": _activation,
    "moe": _moe,
}
