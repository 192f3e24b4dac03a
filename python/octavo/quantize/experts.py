"""What calibration has to know of experts: their matrices, and the tokens that go to them.

Tokens go to experts by the logits of the model that is being quantized, as they will. An expert to
which few tokens of the text go would be fitted to these few; it is rounded as without a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from octavo.models.layer import Node
from octavo.models.spec import MoeSpec
from octavo.quantization.grid import Float32
from octavo.reference import ops
from octavo.reference.ops import Integers

# Fewer tokens say too little: H then has a rank below any matrix's width, most of it damping.
LEAST_TOKENS = 64
_SHOWN = 6  # layers in a note


def split_experts(mix: Node) -> list[tuple[Node, Node, Node]]:
    """Gate, up and down of every expert of a moe node, as nodes of one matrix each."""
    nodes = [replace(mix, matrices=(matrix,)) for matrix in mix.matrices]
    downs = [node for node in nodes if node.matrix.name.endswith(".down")]
    halves = [node for node in nodes if node not in downs]
    return list(zip(halves[0::2], halves[1::2], downs, strict=True))


def rows_of_experts(router_logits: Float32, moe: MoeSpec) -> Iterator[Integers]:
    """For each expert in turn, the tokens that go to it. router_logits: (tokens, num_experts)."""
    chosen, _ = ops.route(router_logits, moe.experts_per_token, moe.normalize)
    for expert in range(moe.num_experts):
        yield np.flatnonzero((chosen == expert).any(axis=1))


def activate(
    weights: Mapping[str, Float32], gate: Node, up: Node, x: Float32, activation: str
) -> Float32:
    """What an expert's down matrix is given for rows of x: (rows, width)."""
    opened, raised = (x @ weights[f"{node.matrix.name}.weight"].T for node in (gate, up))
    return ops.gated_activation(opened, raised, activation)


def note_on_few(few: Mapping[int, Sequence[int]]) -> list[str]:
    """What to tell the user. few: by layer, the experts that were rounded without the text."""
    if not few:
        return []
    shown = [f"layer {layer}: {', '.join(map(str, few[layer]))}" for layer in sorted(few)[:_SHOWN]]
    rest = "; ..." if len(few) > _SHOWN else ""
    return [
        f"{sum(map(len, few.values()))} experts saw fewer than {LEAST_TOKENS} tokens of the text, "
        f"and were rounded without it ({'; '.join(shown)}{rest}); more windows may reach them"
    ]
