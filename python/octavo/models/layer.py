"""What a model consists of: every intermediate result, the op behind it, its inputs and weights.

Whoever needs to know what a layer looks like reads this list: names and shapes of weights, taps,
the data flow of `octavo diff`, what calibration measures, what `octavo bench` counts. Only the
layer loop (`csrc/core/decoder.cpp`) and the definition (`reference/llama.py`) are written by hand;
a test compares the taps of both with the list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from octavo.models.spec import LayerSpec, ModelSpec, NormSpec

# As in reference/ops.py and csrc/core/backend.h.
Op = Literal[
    "embed", "norm", "add_norm", "linear", "rope_and_store", "attention", "gated_activation"
]


@dataclass(frozen=True)
class Matrix:
    """A matrix (outputs, inputs), and perhaps a bias for each output.

    name: octavo's, without ".weight": "layers.3.q". shard_axis: what several devices divide among
    them: 0, the outputs (a device has some of the results), or 1, the inputs (a device has a part
    of every sum, and all_reduce adds the parts).
    """

    name: str
    outputs: int
    inputs: int
    bias: bool = False
    shard_axis: Literal[0, 1] = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.outputs, self.inputs


@dataclass(frozen=True)
class Node:
    """One intermediate result, and the op that makes it.

    tap: its name, the same in the reference, in the native core and in docs/taps.md. inputs: the
    taps that the op reads. width: numbers a row has. matrices: what the op multiplies by, or takes
    rows of. norm: of an op that normalizes; its weight has the name of the tap.
    """

    tap: str
    op: Op
    inputs: tuple[str, ...]
    width: int
    matrices: tuple[Matrix, ...] = ()
    norm: NormSpec | None = None

    @property
    def layer(self) -> int | None:
        """The layer's number; None before the first and behind the last."""
        return split_tap(self.tap)[0]

    @property
    def part(self) -> str:
        """The name without the layer: "layers.3.q" is "q"."""
        return split_tap(self.tap)[1]

    @property
    def matrix(self) -> Matrix:
        """The matrix of a linear op."""
        return self.matrices[0]

    def weight_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the weights that the op needs."""
        if self.norm is not None:
            yield f"{self.tap}.weight", (self.width,)
            if self.norm.bias:
                yield f"{self.tap}.bias", (self.width,)
        for matrix in self.matrices:
            yield f"{matrix.name}.weight", matrix.shape
            if matrix.bias:
                yield f"{matrix.name}.bias", (matrix.outputs,)


def model_nodes(spec: ModelSpec) -> list[Node]:
    """Every node of the model, in the order of execution."""
    hidden, vocab = spec.hidden_size, spec.vocab_size
    tables = [Matrix("embed", vocab, hidden)]
    if spec.learned_positions:
        tables.append(Matrix("positions", spec.max_position_embeddings, hidden))
    nodes = [Node("embed", "embed", (), hidden, tuple(tables))]
    for index, layer in enumerate(spec.layers):
        nodes += layer_nodes(layer, index, hidden)
    last = residual_before(len(spec.layers))
    nodes.append(Node("final_norm", "norm", (last,), hidden, norm=spec.final_norm))
    head = Matrix("embed" if spec.tie_word_embeddings else "lm_head", vocab, hidden)
    return [*nodes, Node("logits", "linear", ("final_norm",), vocab, (head,))]


def layer_nodes(layer: LayerSpec, index: int, hidden_size: int) -> list[Node]:
    """The nodes of the layer numbered `index`."""
    residual = residual_before(index)
    nodes: list[Node] = []

    def full(part: str) -> str:
        return part if part == residual else f"layers.{index}.{part}"

    def add(part: str, op: Op, inputs: tuple[str, ...], width: int) -> None:
        nodes.append(Node(full(part), op, tuple(map(full, inputs)), width))

    def add_norm(part: str, op: Op, inputs: tuple[str, ...]) -> None:
        nodes.append(Node(full(part), op, tuple(map(full, inputs)), hidden_size, norm=layer.norm))

    def add_linear(
        part: str, source: str, sizes: tuple[int, int], bias: bool, name: str = "", axis: int = 0
    ) -> None:
        matrix = Matrix(full(name or part), *sizes, bias, 1 if axis else 0)
        nodes.append(Node(full(part), "linear", (full(source),), sizes[0], (matrix,)))

    q_size, kv_size, intermediate = layer.q_size, layer.kv_size, layer.intermediate_size
    add_norm("attn_norm", "norm", (residual,))
    for part, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
        add_linear(part, "attn_norm", (size, hidden_size), layer.qkv_bias)
    q, k = "q", "k"
    if layer.rope is not None:
        q, k = "q_rope", "k_rope"
        add(q, "rope_and_store", ("q",), q_size)
        add(k, "rope_and_store", ("k",), kv_size)
    add("attn", "attention", (q, k, "v"), q_size)
    add_linear("attn_out", "attn", (hidden_size, q_size), layer.o_bias, "o", axis=1)
    add_norm("mlp_norm", "add_norm", (residual, "attn_out"))
    if layer.gated:
        add_linear("gate", "mlp_norm", (intermediate, hidden_size), layer.mlp_bias)
    add_linear("up", "mlp_norm", (intermediate, hidden_size), layer.mlp_bias)
    add("act", "gated_activation", ("gate", "up") if layer.gated else ("up",), intermediate)
    add_linear("mlp_out", "act", (hidden_size, intermediate), layer.mlp_bias, "down", axis=1)
    add("out", "add_norm", (residual, "attn_out", "mlp_out"), hidden_size)
    return nodes


def residual_before(layer: int) -> str:
    """The tap that holds the residual stream entering a layer."""
    return f"layers.{layer - 1}.out" if layer else "embed"


def split_tap(name: str) -> tuple[int | None, str]:
    """("layers.3.q") -> (3, "q"); ("embed") -> (None, "embed")."""
    if not name.startswith("layers."):
        return None, name
    _, index, part = name.split(".")
    return int(index), part


def tap_names(spec: ModelSpec) -> list[str]:
    """The names of all taps in the order of execution (see docs/taps.md)."""
    return [node.tap for node in model_nodes(spec)]


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every weight the spec needs, in octavo's names, with its shape.

    A tied head is not listed: `lm_head.weight` is then `embed.weight`.
    """
    return {name: shape for node in model_nodes(spec) for name, shape in node.weight_shapes()}


def linear_nodes(spec: ModelSpec) -> dict[str, Node]:
    """The products of all layers, by the name of their matrix: "layers.0.o" is tap attn_out's."""
    nodes = (node for node in model_nodes(spec) if node.layer is not None)
    return {node.matrix.name: node for node in nodes if node.matrices}
