"""What a model consists of: every intermediate result, the op behind it, its inputs and weights.

All code that depends on the structure of a layer reads this list: names and shapes of weights,
taps, the data flow of `octavo diff`, what calibration measures and `octavo bench` counts. Only the
layer loop (`csrc/core/decoder.cpp`) and the definition (`reference/llama.py`) are written by hand;
a test compares the taps of both with the list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from octavo.models.spec import LayerSpec, ModelSpec, MoeSpec, NormSpec

# As in reference/ops.py and csrc/core/backend.h.
Op = Literal[
    "embed",
    "norm",
    "add_norm",
    "norm_heads",
    "linear",
    "rope_and_store",
    "attention",
    "gated_activation",
    "moe",
]
# The matrices whose outputs go to the residual stream, by their taps.
_RESIDUAL_MATRICES = {"attn_out": "o", "mlp_out": "down"}


class Weight(NamedTuple):
    """A weight that an op needs. name: octavo's."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Matrix:
    """A matrix (outputs, inputs), and optionally a bias for each output.

    name: octavo's, without ".weight": "layers.3.q". is_router: neither it nor what it multiplies is
    ever rounded, since tokens whose logits are near each other would go to other experts.
    """

    name: str
    outputs: int
    inputs: int
    bias: bool = False
    is_router: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return self.outputs, self.inputs


@dataclass(frozen=True)
class Node:
    """One intermediate result, and the op that computes it.

    tap: its name, the same in the reference, in the native core and in docs/taps.md. inputs: the
    taps that the op reads. width: numbers in a row. matrices: those that the op multiplies by, or
    takes rows of. norm: for an op that normalizes; its weight has the name of the tap. group: how
    many numbers norm_heads normalizes together. scale: the result is multiplied by it; of add_norm,
    every input is but the first, the residual stream. cap: after that, where it is not 0, a number
    x becomes cap * tanh(x / cap).
    """

    tap: str
    op: Op
    inputs: tuple[str, ...]
    width: int
    matrices: tuple[Matrix, ...] = ()
    norm: NormSpec | None = None
    group: int = 0
    scale: float = 1.0
    cap: float = 0.0

    @property
    def normalizes(self) -> bool:
        """Whether the op divides by the size of what it reads, and has a weight for that."""
        return self.norm is not None and self.norm.kind != "none"

    @property
    def layer(self) -> int | None:
        """The layer's number; None before the first and after the last."""
        return split_tap(self.tap)[0]

    @property
    def part(self) -> str:
        """The name without the layer: "layers.3.q" is "q"."""
        return split_tap(self.tap)[1]

    @property
    def matrix(self) -> Matrix:
        """The matrix of a linear op."""
        return self.matrices[0]

    def weights(self) -> Iterator[Weight]:
        """The weights that the op needs."""
        if self.norm is not None and self.norm.kind != "none":
            width = self.group or self.width
            yield Weight(f"{self.tap}.weight", (width,))
            if self.norm.bias:
                yield Weight(f"{self.tap}.bias", (width,))
        for matrix in self.matrices:
            yield Weight(f"{matrix.name}.weight", matrix.shape)
            if matrix.bias:
                yield Weight(f"{matrix.name}.bias", (matrix.outputs,))


def model_nodes(spec: ModelSpec) -> list[Node]:
    """Every node of the model, in the order of execution."""
    hidden, vocab = spec.hidden_size, spec.vocab_size
    tables = [Matrix("embed", vocab, hidden)]
    if spec.learned_positions:
        tables.append(Matrix("positions", spec.max_position_embeddings, hidden))
    nodes = [Node("embed", "embed", (), hidden, tuple(tables), scale=spec.embed_multiplier)]
    for index, layer in enumerate(spec.layers):
        nodes += layer_nodes(layer, index, hidden)
    last = residual_before(len(spec.layers))
    nodes.append(Node("final_norm", "norm", (last,), hidden, norm=spec.final_norm))
    name = "embed" if spec.tie_word_embeddings else "lm_head"
    head = Matrix(name, vocab // spec.head_parts, hidden)
    scale, cap = spec.logits_multiplier, spec.logits_softcap
    return [*nodes, Node("logits", "linear", ("final_norm",), vocab, (head,), scale=scale, cap=cap)]


def layer_nodes(layer: LayerSpec, index: int, hidden_size: int) -> list[Node]:
    """The nodes of the layer numbered `index`."""
    residual = residual_before(index)
    nodes: list[Node] = []

    def full(part: str) -> str:
        return part if part == residual else f"layers.{index}.{part}"

    def add(
        part: str, op: Op, inputs: str, width: int, norm: NormSpec | None = None, group: int = 0
    ) -> None:
        names = tuple(map(full, inputs.split()))
        scale = layer.residual_multiplier if op == "add_norm" else 1.0
        nodes.append(Node(full(part), op, names, width, norm=norm, group=group, scale=scale))

    def multiply(part: str, source: str, outputs: int, inputs: int, bias: bool) -> None:
        matrix = Matrix(full(_RESIDUAL_MATRICES.get(part, part)), outputs, inputs, bias)
        nodes.append(Node(full(part), "linear", (full(source),), outputs, (matrix,)))

    def norm_for_residual(part: str) -> str:
        if layer.output_norm is None:
            return part
        add(f"{part}_norm", "norm", part, hidden_size, layer.output_norm)
        return f"{part}_norm"

    q_size, kv_size, intermediate = layer.q_size, layer.kv_size, layer.intermediate_size
    add("attn_norm", "norm", residual, hidden_size, layer.norm)
    for part, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
        multiply(part, "attn_norm", size, hidden_size, layer.qkv_bias)
    q, k = "q", "k"
    if layer.qk_norm != "none":
        group = layer.head_dim if layer.qk_norm == "head" else 0
        for part, size in (("q", q_size), ("k", kv_size)):
            add(f"{part}_norm", "norm_heads", part, size, layer.qk_norm_spec, group or size)
        q, k = "q_norm", "k_norm"
    if layer.rope is not None:
        add("q_rope", "rope_and_store", q, q_size)
        add("k_rope", "rope_and_store", k, kv_size)
        q, k = "q_rope", "k_rope"
    add("attn", "attention", f"{q} {k} v", q_size)
    multiply("attn_out", "attn", hidden_size, q_size, layer.o_bias)
    attn_out = norm_for_residual("attn_out")
    add("mlp_norm", "add_norm", f"{residual} {attn_out}", hidden_size, layer.norm)
    if layer.moe is None:
        halves = ("gate", "up") if layer.gated else ("up",)
        for part in halves:
            multiply(part, "mlp_norm", intermediate, hidden_size, layer.mlp_bias)
        add("act", "gated_activation", " ".join(halves), intermediate)
        multiply("mlp_out", "act", hidden_size, intermediate, layer.mlp_bias)
    else:
        nodes += _moe_nodes(layer, layer.moe, index, hidden_size)
    mlp_out = norm_for_residual("mlp_out")
    add("out", "add_norm", f"{residual} {attn_out} {mlp_out}", hidden_size)
    return nodes


def _moe_nodes(layer: LayerSpec, moe: MoeSpec, index: int, hidden_size: int) -> list[Node]:
    """The router, whose logits choose the experts, and all that the experts compute."""
    name, width = f"layers.{index}.", layer.intermediate_size
    experts = [f"{name}experts.{expert}." for expert in range(moe.num_experts)]
    halves = [
        Matrix(expert + part, width, hidden_size) for expert in experts for part in ("gate", "up")
    ]
    downs = [Matrix(expert + "down", hidden_size, width) for expert in experts]
    x, logits = f"{name}mlp_norm", f"{name}router"
    router = Matrix(logits, moe.num_experts, hidden_size, is_router=True)
    return [
        Node(logits, "linear", (x,), moe.num_experts, (router,)),
        Node(f"{name}mlp_out", "moe", (x, logits), hidden_size, (*halves, *downs)),
    ]


def residual_before(layer: int) -> str:
    """The tap that holds the residual stream entering a layer."""
    return f"layers.{layer - 1}.out" if layer else "embed"


def split_tap(name: str) -> tuple[int | None, str]:
    """("layers.3.q") -> (3, "q"); ("embed") -> (None, "embed"); and so of a matrix's name."""
    if not name.startswith("layers."):
        return None, name
    _, index, part = name.split(".", 2)
    return int(index), part


def tap_names(spec: ModelSpec) -> list[str]:
    """The names of all taps in the order of execution (see docs/taps.md)."""
    return [node.tap for node in model_nodes(spec)]


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every weight the spec needs, in octavo's names, with its shape.

    A tied head is not listed: `lm_head.weight` is then `embed.weight`.
    """
    return {weight.name: weight.shape for node in model_nodes(spec) for weight in node.weights()}


def linear_nodes(spec: ModelSpec) -> dict[str, Node]:
    """The products of all layers, by the name of their matrix: "layers.0.o" is tap attn_out's.

    Each matrix of an expert has a node of its own: that of the op with this matrix alone and with
    its input alone, which for "layers.0.experts.2.down" is no tap. Routers are not listed.
    """
    found = {}
    for node in model_nodes(spec):
        if node.layer is not None and node.op == "linear" and not node.matrix.is_router:
            found[node.matrix.name] = node
        for matrix in node.matrices if node.op == "moe" else ():
            inputs = () if matrix.name.endswith(".down") else node.inputs[:1]
            found[matrix.name] = replace(node, inputs=inputs, matrices=(matrix,))
    return found
