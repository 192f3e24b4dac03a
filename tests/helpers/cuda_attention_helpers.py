"""What the tests of attention on CUDA share."""

from __future__ import annotations

from functools import cache

import numpy as np
from cuda_helpers import DEVICE, rounded
from ops_helpers import (
    Sequence,
    double,
    make_sequence,
    native_attention,
)
from reference_helpers import Float32

from octavo import _native_ops
from octavo.diff.ties import rounding_room
from octavo.reference import ops

# Of activations and of the cache, and the largest error allowed relative to the root mean square.
# The largest outputs are three or four times that, and are rounded once as they are stored (bf16:
# 2^-9 of themselves, twice that just above a power of two); the weights are rounded too, with int8
# after the values' scales are in them. Over a bf16 cache the definition rounds them itself, and
# only a few may be rounded otherwise: `beyond_rounding` looks closer there.
FORMATS = {
    ("bf16", "bf16"): 1.4e-2,
    ("bf16", "int8"): 3e-2,
    ("f16", "f16"): 1.8e-3,
    ("f16", "int8"): 4e-3,
}
# The simple kernel: float32 throughout, but for what activations and cache are stored as, and for
# what the definition rounds over a bf16 cache.
SIMPLE_FORMATS = {("bf16", "f32"): 1.2e-2, ("f32", "f16"): 1e-5}
# Over a bf16 cache, every kernel: the error beyond that of storing the result, each number's own,
# and of weights that may be rounded either way (octavo.diff.ties), relative to the root mean
# square. It is float32's: 3e-6 was measured.
BEYOND_ROUNDING = 1e-5
STORED = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": 0.0}  # of the number itself


@cache
def native(dtype: str) -> _native_ops.Ops:
    return _native_ops.Ops(DEVICE, dtype=dtype)


def make_sequences(
    lengths: list[tuple[int, int]], heads: tuple[int, int], head_dim: int, dtype: str
) -> list[Sequence]:
    """lengths: new tokens and context. In numbers of the activations' format."""
    made = [make_sequence(7 + i, *length, heads, head_dim) for i, length in enumerate(lengths)]
    return [Sequence(*(rounded(x, dtype) for x in (s.q, s.k, s.v))) for s in made]


def attend(
    dtype: str, kv_dtype: str, sequences: list[Sequence], window: int = 0, block_size: int = 16
) -> Float32:
    scale = sequences[0].q.shape[2] ** -0.5
    return native_attention(native(dtype), sequences, scale, window, kv_dtype, block_size)[0]


def expect(kv_dtype: str, sequences: list[Sequence], window: int = 0) -> np.ndarray:
    outs = []
    for s in sequences:
        k, v = (double(rounded(x, kv_dtype)) for x in (s.k, s.v))
        scale, rounds = s.q.shape[2] ** -0.5, ops.attention_dtype(kv_dtype)
        outs.append(ops.attention(double(s.q), k, v, scale, window, rounds))
    return np.concatenate(outs)


def beyond_rounding(
    dtype: str, actual: np.ndarray, right: np.ndarray, sequences: list[Sequence], window: int
) -> float:
    """The largest error over a bf16 cache that rounding does not explain."""
    rooms = []
    for s in sequences:
        k, v = (rounded(x, "bf16") for x in (s.k, s.v))
        rooms.append(rounding_room(s.q, k, v, s.q.shape[2] ** -0.5, window))
    if not np.isfinite(actual).all():
        return float("inf")
    allowed = np.concatenate(rooms) + STORED[dtype] * np.abs(right)
    scale = np.sqrt(np.mean(np.square(right)))
    return float((np.abs(actual - right) - allowed).max() / scale)


def tokens_of(sequence: Sequence, start: int, stop: int) -> Sequence:
    """Tokens start to stop - 1 of a sequence that brings all of its tokens."""
    return Sequence(sequence.q[start:stop], sequence.k[:stop], sequence.v[:stop])
