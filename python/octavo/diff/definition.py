"""Every op once more, by its definition, on the inputs that a run itself had.

An early mistake spoils everything after it, so that comparing two runs tap by tap finds only the
first. Here each tap of one run is compared with what the reference's op makes of the taps that
the same run fed into it: an op that is right passes however wrong its inputs are, and each of
several broken ops is found. What a model consists of is read from `octavo.models.layer`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from octavo.diff.measure import Float32, Float64, row_errors
from octavo.diff.ties import rounding_room
from octavo.diff.tolerance import EXPERT_STEPS
from octavo.models.layer import Node, model_nodes
from octavo.models.spec import LayerSpec
from octavo.reference import nodes, ops
from octavo.reference.llama import KVCache, ReferenceModel
from octavo.reference.ops import Array, Integers

Taps = Mapping[str, Float32]


@dataclass(frozen=True)
class OpInputs:
    """One op of a run and what it had before it: the run's own taps, the weights, the cache.

    node: the op. nodes: all of the model, by tap. taps: name -> (rows, width) of the tokens at
    `positions`. cache: the run's own keys and values up to those tokens.
    """

    model: ReferenceModel
    nodes: Mapping[str, Node]
    node: Node
    taps: Taps
    token_ids: Integers
    positions: Integers
    cache: KVCache

    @property
    def layer_index(self) -> int:
        if self.node.layer is None:
            raise ValueError(f"{self.node.tap} belongs to no layer; {self.node.op} needs one")
        return self.node.layer

    @property
    def layer(self) -> LayerSpec:
        return self.model.spec.layers[self.layer_index]

    @property
    def keys(self) -> Array:
        """The layer's, (context, num_kv_heads, head_dim), as the cache holds them."""
        return self.cache.keys[self.layer_index]

    @property
    def values(self) -> Array:
        """As `keys`."""
        return self.cache.values[self.layer_index]

    @property
    def operands(self) -> list[Float32]:
        """The taps that the op reads, (rows, width) each."""
        return [self.taps[name] for name in self.node.inputs]

    def heads(self, tap: str) -> Float32:
        """A tap split into heads, (rows, heads, head_dim)."""
        return self.taps[tap].reshape(len(self.positions), -1, self.layer.head_dim)

    def weight(self, name: str) -> Float32:
        """The weight of a matrix or a norm, by octavo's name without ".weight"."""
        return self.model.weights[f"{name}.weight"]


def op_call(inputs: OpInputs) -> partial[Array]:
    """The op's definition with its arguments filled in, as `nodes.op_call` gives it."""
    model, node = inputs.model, inputs.node
    return nodes.op_call(
        node,
        inputs.operands,
        model.weights,
        None if node.layer is None else inputs.layer,
        inputs.positions,
        token_ids=inputs.token_ids,
        cache=(inputs.keys, inputs.values) if node.op == "attention" else None,
        kv_dtype=model.kv_dtype,
        multiply=_multiply(model, node),
    )


def _multiply(model: ReferenceModel, node: Node) -> nodes.Multiply:
    """The product of the node's matrix, and what an adapter adds to it."""
    part = model.adapter_of(node)
    if part is None:
        return model.multiply

    def multiply(name: str, x: Array, weight: Array, bias: Array | None) -> Array:
        return model.multiply(name, x, weight, bias) + ops.low_rank(x, part, model.dtype)

    return multiply


def define(inputs: OpInputs) -> Float32:
    """What the op gives by its definition, (rows, width)."""
    return op_call(inputs)().reshape(len(inputs.positions), -1).astype(np.float32)


def own_errors(inputs: OpInputs, seen: Float32) -> Float64:
    """Relative error of `seen`, the run's tap (rows, width), from the op's definition, (rows,).

    Attention over a bf16 cache rounds its weights, of which some lie where two right computations
    may round them differently: what these can do to a row is taken off its error. So is what the
    rounding of experts' activations may do, between their two products.
    """
    right = define(inputs)
    relative = row_errors(seen, right).relative
    if inputs.node.op == "moe" and (inputs.model.dtype == "bf16" or inputs.model.formats):
        width = inputs.layer.intermediate_size
        rounded: Float64 = np.maximum(relative - EXPERT_STEPS / math.sqrt(width), 0.0)
        return rounded
    if inputs.node.op != "attention" or inputs.model.kv_dtype != "bf16":
        return relative
    arguments = dict(op_call(inputs).keywords)
    del arguments["dtype"]
    with np.errstate(invalid="ignore", over="ignore"):
        room = rounding_room(**arguments).reshape(right.shape)
        size = np.maximum(np.linalg.norm(right, axis=1), np.linalg.norm(seen, axis=1))
        allowed = np.linalg.norm(room, axis=1) / np.where(size > 0, size, 1)
    # Where NaN or infinity is about, there is nothing to allow for.
    allowed = np.where(np.isfinite(allowed), allowed, 0.0)
    left: Float64 = np.maximum(relative - allowed, 0.0)
    return left


class OpReplay:
    """Follows one run chunk by chunk, so that every op of it can be done once more.

    model: the definition, with the dtypes that the run is held to.
    """

    def __init__(self, model: ReferenceModel) -> None:
        self.model = model
        self.nodes = {node.tap: node for node in model_nodes(model.spec)}
        self.cache = KVCache()

    def ops(self, taps: Taps, token_ids: Integers) -> Iterator[OpInputs]:
        """The ops that can be checked, in the order of execution.

        taps: the run's taps for the next tokens; token_ids: those tokens, (rows,). An op is left
        out where the run does not have its tap or one of its inputs. Consume it to the end: it
        keeps the run's keys and values for the chunks to come.
        """
        start = self.cache.length
        positions = np.arange(start, start + len(token_ids))
        for node in self.nodes.values():
            if not all(source in taps for source in node.inputs):
                continue
            inputs = OpInputs(self.model, self.nodes, node, taps, token_ids, positions, self.cache)
            if node.op == "attention":
                # The run's own keys and values of these tokens, behind those before them.
                k, v = (
                    ops.to_cache(inputs.heads(name), self.model.kv_dtype)
                    for name in node.inputs[1:]
                )
                self.cache.extend(inputs.layer_index, k, v)
            # What an adapter adds to the embedding is seen in the whole run alone.
            is_adapted_table = node.op == "embed" and self.model.adapter_of(node) is not None
            if node.tap in taps and not is_adapted_table:
                yield inputs
        self.cache.length += len(token_ids)
