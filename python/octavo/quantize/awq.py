"""AWQ: inputs that are driven hard are made larger in the matrix and smaller before it.

Lin et al. 2023 (arXiv 2306.00978). A matrix W with a factor s_j on each column and 1 / s_j on
each input computes what it did, but the columns with large factors suffer less by rounding. The
factors cost nothing where whatever comes before can take them:

    attn_norm -> q, k, v        mlp_norm -> gate, up        (weight and bias of the norm)
    v -> o                      up -> down, where gated     (rows of the matrix, and its bias)

Experts share the norm before them with their router, whose weights take the factors too.
Query heads that share a key/value head share its values, so their columns of o share factors too.
The factors are s_j = (rms of input j) ^ power; the power is the one of 11 from 0 to 1 with which
some of the outputs, rounded as all will be, suffer least: tr(E^T H E), H the mean of x x^T.
The paper takes the mean magnitude in place of the rms, which H's diagonal gives without a pass of
its own. Its second half, the search for where to clip each group, is `Grid.search`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from octavo.models.layer import Node
from octavo.models.spec import WeightFormat
from octavo.quantization.grid import Float32
from octavo.quantize.gptq import errors_under, round_by_search
from octavo.weights.tensor import float32_to_bf16

POWERS = tuple(step / 10 for step in range(11))
_JUDGES = 64  # of a matrix's outputs, so many
_ALL_JUDGES = 256  # of many matrices (experts), so many together
_LIMIT = 256.0  # of the factors, either way


def find_factors(
    hessian: Float32,
    matrices: Sequence[Float32],
    formats: Sequence[WeightFormat],
    shared: int = 1,
    head_dim: int = 1,
) -> Float32:
    """The factors of the inputs that `matrices` have in common, around 1.

    hessian: (inputs, inputs). matrices: float32 (inputs, outputs), and the int4 format of each.
    shared, head_dim: the inputs are heads of head_dim, and every `shared` of them take the same
    factors. Returns float32 (inputs,); all 1 where that is best.
    """
    size = np.sqrt(np.maximum(np.diag(hessian).astype(np.float64), 0))
    if shared > 1:
        heads = size.reshape(-1, shared, head_dim)
        mean = np.sqrt((heads**2).mean(axis=1, keepdims=True))
        size = np.broadcast_to(mean, heads.shape).reshape(-1)
    size = np.maximum(size, 1e-6 * size.max() or 1.0)
    judges = max(1, min(_JUDGES, _ALL_JUDGES // max(1, len(matrices))))
    some = [
        np.ascontiguousarray(matrix[:, :: -(-matrix.shape[1] // judges)]) for matrix in matrices
    ]
    best, least = np.ones(len(size), np.float32), np.inf
    for power in POWERS:
        factors = size**power
        factors = factors / np.sqrt(factors.max() * factors.min())
        factors = np.clip(factors, 1 / _LIMIT, _LIMIT).astype(np.float32)
        cost = 0.0
        for matrix, format in zip(some, formats, strict=True):
            driven = np.asarray(hessian / np.outer(factors, factors), np.float32)
            error = round_by_search(matrix * factors[:, None], driven, format).weights()
            error /= factors[:, None]
            error -= matrix
            cost += float(errors_under(error, hessian).sum(dtype=np.float64))
        if cost < least:
            best, least = factors, cost
    return best


def representable_factors(factors: Float32, vector: Float32) -> Float32:
    """Factors next to these by which a norm's weights can be divided without any loss.

    The divided weights are rounded to bfloat16, as they may be stored, and the factors are then
    what lies exactly between: weight / rounded(weight / factor). vector, factors: (inputs,).
    """
    bits = float32_to_bf16(vector / factors).astype(np.uint32) << np.uint32(16)
    divided = bits.view(np.float32)
    usable = (divided != 0) & np.isfinite(divided)
    result: Float32 = np.where(usable, vector / np.where(usable, divided, 1), 1).astype(np.float32)
    return result


def shared_rows(factors: Float32, shared: int, head_dim: int) -> Float32:
    """Of factors that every `shared` heads have in common, each once: (inputs / shared,)."""
    return np.ascontiguousarray(factors.reshape(-1, shared, head_dim)[:, 0]).reshape(-1)


def same_columns(node: Node) -> str | None:
    """The tap whose columns go straight into those of `node`: what divides the one divides both.

    The values of attention; what is multiplied by the gate. None of any other op.
    """
    if node.op == "attention":
        return node.inputs[2]
    return node.inputs[1] if node.op == "gated_activation" and len(node.inputs) > 1 else None
