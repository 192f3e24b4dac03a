"""Where two right computations of attention over a bf16 cache may round a weight differently.

The definition (`octavo.reference.ops.attention`, dtype "bf16") rounds each weight 2^(s - N) to
bfloat16. The score s is a float32 sum, and its last bits depend on the order of summation. A weight
that lies in the middle of two bfloat16 numbers, to within those bits, is therefore rounded to
either, and both are right. It is a step of 2^-7 of the weight at most, ten thousand times the
float32 rounding that all else is held to, so such weights are looked for one by one, and only they
are given room. Queries, keys and values are rounded alike by both.
"""

from __future__ import annotations

import math

import numpy as np

from octavo.diff.tolerance import UNIT_F32
from octavo.reference import ops
from octavo.reference.ops import Array

# Of the exponential and of rounding s - N: 4 u by the CUDA kernels' instruction (2^-22), the rest
# for the other roundings on the way.
_EXPONENTIAL_UNITS = 8.0


def rounding_room(
    q: Array, k: Array, v: Array, scale: float, window: int = 0, softcap: float = 0.0
) -> Array:
    """How far each element of `ops.attention(..., dtype="bf16")` may move by such weights.

    q: (rows, num_heads, head_dim); k, v: (context, num_kv_heads, head_dim), as the cache holds
    them. Returns (rows, num_heads, head_dim): the sum over the weights that are too near to a
    middle to tell, each one's step times |v|, over the sum of all weights. Mostly zeros.
    """
    rows, num_heads, head_dim = q.shape
    context, num_kv_heads = k.shape[0], k.shape[1]
    group = num_heads // num_kv_heads
    distance = (context - rows + np.arange(rows))[:, None] - np.arange(context)[None, :]
    hidden = (distance < 0) | ((distance >= window) if window else False)
    to_powers = q.dtype.type(scale * math.log2(math.e))
    room = np.empty_like(q)
    for kv_head in range(num_kv_heads):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        queries = ops.round_to_bf16(q[:, heads].transpose(1, 0, 2))  # (group, rows, head_dim)
        powers = ops.score(queries @ k[:, kv_head].T, scale, softcap, math.log2(math.e))
        powers = np.where(hidden, q.dtype.type(-np.inf), powers)
        weights = np.exp2(powers - np.ceil(np.max(powers, axis=-1, keepdims=True)))
        # An error of the score is one of the weight times ln 2. The sum of head_dim products of
        # either wanders off by no more than sqrt(head_dim) u of the sum of their sizes, which
        # is no less than |s|: four units of it are for what happens to s afterwards. A cap makes
        # such an error smaller, as it does s.
        sizes = (np.abs(queries) @ np.abs(k[:, kv_head]).T) * abs(to_powers)
        units = (2 * math.sqrt(head_dim) + 4) * sizes * math.log(2) + _EXPONENTIAL_UNITS
        _, exponents = np.frexp(weights)
        steps = np.ldexp(1.0, exponents - 8)  # between bfloat16 numbers of this size
        in_steps = weights / steps  # from 128 to 256
        from_middle = np.abs(in_steps - np.floor(in_steps) - 0.5)
        unsure = (weights > 0) & (from_middle <= units * UNIT_F32 * in_steps)
        moved = np.where(unsure, steps, 0.0) @ np.abs(v[:, kv_head])
        room[:, heads] = (moved / np.sum(weights, axis=-1, keepdims=True)).transpose(1, 0, 2)
    return room
