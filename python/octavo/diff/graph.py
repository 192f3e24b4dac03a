"""Which tap is computed from which: the data flow of a `ModelSpec`, in the names of the taps."""

from __future__ import annotations

from octavo.models.layer import model_nodes
from octavo.models.spec import ModelSpec

# Parts of a layer in the order of execution, for tables and heat maps.
LAYER_PARTS = (
    "attn_norm", "q", "k", "v", "q_rope", "k_rope", "attn", "attn_out",
    "mlp_norm", "gate", "up", "act", "mlp_out", "out",
)  # fmt: skip


def tap_inputs(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """For every tap, in execution order, the taps that its op reads (weights left aside)."""
    return {node.tap: node.inputs for node in model_nodes(spec)}
