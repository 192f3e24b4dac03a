"""CUDA: GPUs whose blocks have little shared memory (99 KiB: capabilities 8.6, 8.9, 12.0)."""

from __future__ import annotations

import pytest
from cuda_helpers import DEVICE, emulated, needs_cuda

pytestmark = [
    needs_cuda,
    pytest.mark.skipif(DEVICE != "cuda_emulated", reason="a GPU has as much as it has"),
]

ALL_SHAPES_OF_BLOCKS = """
import hashlib
from cuda_attention_helpers import FORMATS as CACHES, attend, make_sequences
from cuda_linear_helpers import FORMATS, native, quantized
from ops_helpers import moe_inputs
from octavo import _native_ops
from reference_helpers import uniform
digest = hashlib.sha256()
for rows in (12, 17, 70, 100):
    x, weight = uniform(rows, rows, 264), uniform(7, 300, 264)
    for dtype in ("bf16", "f16"):
        ops = native(dtype, deterministic=True)
        digest.update(ops.linear(x, weight, None, dtype).tobytes())
        for format in FORMATS[::2]:
            codes, scales, zeros = quantized(300, 264, format)
            digest.update(ops.quantized_linear(x, codes, scales, format, zeros).tobytes())
for dtype, kv_dtype in CACHES:
    for head_dim in (64, 128):
        sequences = make_sequences([(70, 300), (1, 40), (90, 90)], (6, 2), head_dim, dtype)
        digest.update(attend(dtype, kv_dtype, sequences).tobytes())
for weights in ("bf16", "int8"):
    ops = _native_ops.Ops("cuda_emulated", dtype="bf16", deterministic=True)
    inputs = (*moe_inputs((150, 40, 72, 32, 3, 2), "spread"), True, "silu", weights)
    digest.update(ops.moe(*inputs).tobytes())
print(digest.hexdigest())
"""


def test_blocks_fit_and_give_the_same_bits() -> None:
    """Fewer stages, smaller tiles of many rows, attention with fewer rows a block."""
    little, much, wrong = (
        emulated(ALL_SHAPES_OF_BLOCKS, "SHARED_KIB", kib) for kib in (99, 227, 228)
    )
    assert len(little) == 65, little
    assert little == much
    assert "expected a number from 0 to 227" in wrong
