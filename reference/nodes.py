"""The op behind a node of `octavo.models.layer`, by its definition.

`llama.py` computes the whole model in order. This file computes one op from given inputs:
`octavo diff` repeats every op of a run on the run's own inputs, and calibration runs a text through
layers whose weights it changes between two ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce

import numpy as np

from octavo.models.layer import Node
from octavo.models.spec import LayerSpec
from octavo.reference import ops
from octavo.reference.ops import Array, Float32, Integers

Multiply = Callable[..., Array]
"""The product of a matrix, from name, x, weight and bias, as `ReferenceModel.multiply`."""


def multiply_plainly(name: str, x: Array, weight: Array, bias: Array | None) -> Array:
    """A product in which nothing is rounded."""
    return ops.linear(x, weight, bias)


def op_call(
    node: Node,
    operands: Sequence[Array],
    weights: Mapping[str, Float32],
    layer: LayerSpec | None,
    positions: Integers,
    *,
    token_ids: Integers | None = None,
    cache: tuple[Array, Array] | None = None,
    kv_dtype: str = "f32",
    multiply: Multiply = multiply_plainly,
) -> partial[Array]:
    """The op's definition with its arguments filled in.

    operands: the taps that the op reads, (rows, width) each. weights: by octavo's names. layer: of
    the node. positions: (rows,). token_ids: (rows,), of an embedding. cache: of attention, keys and
    values of the whole context, (context, num_kv_heads, head_dim); None: the operands are all there
    is of them. Where the node multiplies or caps its result, the call takes `scale` and `cap` too.
    Called without arguments the result gives (rows, width) or (rows, heads, head_dim);
    called with keywords, what other arguments give.
    """
    if node.op == "embed":
        if token_ids is None:
            raise ValueError(f"{node.tap} needs token_ids")
        tables = [weights[f"{matrix.name}.weight"] for matrix in node.matrices]
        call = partial(
            ops.embed,
            table=tables[0],
            token_ids=token_ids,
            position_table=tables[1] if len(tables) > 1 else None,
            positions=positions,
        )
        return _scaled(node, call)
    if node.norm is None and node.op == "add_norm":
        return partial(add, terms=operands, scale=node.scale)
    if node.norm is not None:
        weight, bias = weights.get(f"{node.tap}.weight"), weights.get(f"{node.tap}.bias")
        x, norm = add(operands, node.scale), node.norm
        by: Callable[..., Array] = ops.norm_heads if node.op == "norm_heads" else ops.norm
        return partial(by, x=x, weight=weight, bias=bias, eps=norm.eps, kind=norm.kind)
    if node.op == "linear":
        (x,), name = operands, node.matrix.name
        weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        product = multiply_plainly if node.matrix.is_router else multiply
        return _scaled(node, partial(product, name=name, x=x, weight=weight, bias=bias))
    if layer is None:
        raise ValueError(f"{node.tap} belongs to no layer; {node.op} needs one")
    if layer.moe is not None and node.op == "moe":
        x, logits = operands
        name, activation = node.tap.removesuffix(node.part), layer.activation
        return partial(
            ops.mix_experts,
            x=x,
            router_logits=logits,
            experts_per_token=layer.moe.experts_per_token,
            normalize=layer.moe.normalize,
            outputs=node.width,
            expert=partial(expert_output, name, weights, activation, multiply),
        )
    if node.op == "rope_and_store":
        x = split_heads(operands[0], layer)
        if layer.rope is None:
            return partial(ops.rope, x=x, positions=positions, frequencies=None)
        turns, factor = np.array(layer.rope.frequencies, np.float32), layer.rope.attention_factor
        return partial(
            ops.rope, x=x, positions=positions, frequencies=turns, attention_factor=factor
        )
    if node.op == "attention":
        q, k, v = (split_heads(operand, layer) for operand in operands)
        k, v = (k, v) if cache is None else cache
        return partial(
            ops.attention,
            q=q,
            k=k,
            v=v,
            scale=layer.score_scale,
            window=layer.window,
            dtype=ops.attention_dtype(kv_dtype),
            softcap=layer.attention_softcap,
        )
    if node.op == "gated_activation":
        *gates, up = operands
        gate, activation = gates[0] if gates else None, layer.activation
        return partial(ops.gated_activation, gate=gate, up=up, activation=activation)
    raise ValueError(f"{node.tap} is of the op {node.op!r}, which has no definition here")


def expert_output(
    name: str,
    weights: Mapping[str, Float32],
    activation: str,
    multiply: Multiply,
    index: int,
    x: Array,
) -> Array:
    """What expert `index` gives for rows of x. name: of the layer, "layers.3."."""

    def product(part: str, of: Array) -> Array:
        matrix = f"{name}experts.{index}.{part}"
        return multiply(matrix, of, weights[f"{matrix}.weight"], None)

    opened, raised = product("gate", x), product("up", x)
    return product("down", ops.gated_activation(opened, raised, activation))


def _scaled(node: Node, call: partial[Array]) -> partial[Array]:
    """The call with its result multiplied and capped as the node says."""
    if node.scale == 1 and node.cap == 0:
        return call

    def scaled(*, scale: float, cap: float, **arguments: object) -> Array:
        return ops.scale(call.func(**arguments), scale, cap)

    return partial(scaled, **call.keywords, scale=node.scale, cap=node.cap)


def add(terms: Sequence[Array], scale: float = 1.0) -> Array:
    """The sum in the order of execution: the residual takes attention's part, then the MLP's.

    scale: of all terms but the first, the residual (`LayerSpec.residual_multiplier`).
    """
    residual, *parts = terms
    return reduce(np.add, (ops.scale(part, scale) for part in parts), residual)


def split_heads(x: Array, layer: LayerSpec) -> Array:
    """(rows, width) -> (rows, heads, head_dim)."""
    return x.reshape(len(x), -1, layer.head_dim)
