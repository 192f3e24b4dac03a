"""Where every op is computed, and what usually goes wrong there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from octavo.models.layer import Node, Op


@dataclass(frozen=True)
class OpSources:
    """cpu, cuda: the files of the native core. hint: the usual mistakes, in one sentence."""

    cpu: str
    cuda: str
    hint: str


_ELEMENTWISE = "csrc/cpu/backend.cpp, csrc/cpu/kernels/elementwise.h"
_DECODER = "csrc/core/decoder.cpp"
_COSINES = "csrc/core/weights.cpp (cosines and sines)"

OP_SOURCES: Mapping[Op, OpSources] = MappingProxyType(
    {
        "embed": OpSources(
            "csrc/cpu/linear.cpp",
            "csrc/cuda/elementwise/embed.cu",
            "Usually token ids off by one, a table loaded wrongly, or learned positions left out.",
        ),
        "norm": OpSources(
            _ELEMENTWISE,
            "csrc/cuda/elementwise/norm.cu",
            "Usually epsilon (its value, or outside the square root), the mean taken over the "
            "wrong width, or the weight left out.",
        ),
        "add_norm": OpSources(
            f"{_ELEMENTWISE}, {_DECODER}",
            f"csrc/cuda/elementwise/norm.cu, {_DECODER}",
            "Usually the residual dropped or added twice, or epsilon outside the square root.",
        ),
        "norm_heads": OpSources(
            f"{_ELEMENTWISE}, {_DECODER}",
            f"csrc/cuda/elementwise/norm.cu, {_DECODER}",
            "Usually the mean over all heads where each has its own (or the reverse), the weight, "
            "or epsilon.",
        ),
        "linear": OpSources(
            f"csrc/cpu/linear.cpp, csrc/cpu/kernels/linear.h, {_DECODER}",
            f"csrc/cuda/products/linear.cu (which names the kernels), {_DECODER}",
            "Usually the weights: a wrong entry in the weight map, a transposed matrix, or a bias "
            "left out.",
        ),
        "rope_and_store": OpSources(
            f"csrc/cpu/attention.cpp, {_COSINES}",
            f"csrc/cuda/elementwise/rope.cu, {_COSINES}",
            "Usually the halves (element i turns with i + head_dim/2, first half minus), positions "
            "off by one, or a rope scaling that was not read.",
        ),
        "attention": OpSources(
            "csrc/cpu/attention.cpp, csrc/cpu/kernels/attention.h",
            "csrc/cuda/attention/attention.cu (which names the kernels)",
            "Usually the scale or cap, the mapping of query heads to KV heads, the causal mask or "
            "window off by one, or keys and values read from the wrong slot; by a few thousandths "
            "alone, what is rounded over a bf16 cache.",
        ),
        "gated_activation": OpSources(
            _ELEMENTWISE,
            "csrc/cuda/elementwise/elementwise.cu",
            "Usually gate and up swapped (the activation belongs to gate), or another activation.",
        ),
        "moe": OpSources(
            "csrc/cpu/moe.cpp, csrc/cpu/linear.cpp",
            "csrc/cuda/products/experts.cu (which names the kernels)",
            "Usually experts in another order, gate and up swapped, or weights that are normalized "
            "and should not be, or the reverse.",
        ),
    }
)

_QKV = (
    "Usually the weights: a wrong entry in the weight map, a transposed matrix, GGUF's order of "
    "q and k rows, a bias left out, or q, k and v packed in another order."
)
_GATE_UP = "Usually gate and up loaded or packed the other way round."
# Where the usual mistakes of a tap are others than its op's.
_TAP_HINTS: Mapping[str, str] = MappingProxyType(
    {
        "q": _QKV,
        "k": _QKV,
        "v": _QKV,
        "attn_out": "Usually the heads laid out in another order than the o matrix expects, or its "
        "bias.",
        "gate": _GATE_UP,
        "up": _GATE_UP,
        "router": "Usually the weights or the product rounded, which a router's never are, or the "
        "experts' rows in another order.",
        "mlp_out": "Usually the down matrix (transposed, another layer's), or its bias.",
        "logits": "Usually a head that should be tied to the embedding and is not, or the reverse; "
        "or the multiplier or cap of the logits.",
    }
)


def hint_for(node: Node) -> str:
    """The usual mistakes behind a tap, in one sentence."""
    return _TAP_HINTS.get(node.part, OP_SOURCES[node.op].hint)


def files_of(op: Op, op_files: str) -> str:
    """The definition, and where an implementation computes the op (see `op_files` there)."""
    definition, sources = f"reference/ops.py ({op})", OP_SOURCES[op]
    if op_files == "reference":
        return definition
    found = {"native": sources.cpu, "cuda": sources.cuda}.get(op_files)
    if found is None:
        loads = " (and its loading of the weights)" if op in ("embed", "linear") else ""
        found = op_files + loads
    return f"{definition}; {found}"
