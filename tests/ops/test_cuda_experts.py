"""Experts on CUDA: made of the ops that other tests hold to the reference, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_helpers import DEVICE, needs_cuda, rounded
from ops_helpers import MOE_SHAPES, ROUTINGS, TOLERANCES, double, moe_inputs
from reference_helpers import Float32, max_error, same_bits

from octavo import _native_ops
from octavo.reference import ops

pytestmark = needs_cuda
# (rows, inputs, width, outputs, experts, experts of a row): each way of multiplying, with tiles of
# 8, 16, 64 and 96 rows, and some rows more than a tile has; several slices of inputs.
SHAPES = [
    (1, 64, 32, 40, 8, 2),
    (3, 72, 40, 48, 4, 2),
    (9, 1032, 136, 24, 6, 4),
    (17, 64, 136, 72, 3, 2),
    (70, 72, 64, 64, 4, 2),
    (150, 40, 72, 32, 3, 2),
]


def made_of_products(native: Any, inputs: tuple[Any, ...], weights: str) -> Float32:
    """Each expert's three ops by themselves, mixed by the definition."""
    x, logits, gate, up, down, count = inputs

    def expert(index: int, some: Float32) -> Float32:
        opened, raised = (native.linear(some, half[index], None, weights) for half in (gate, up))
        activated = native.gated_activation(opened, raised, "silu")
        result: Float32 = native.linear(activated, down[index], None, weights)
        return result

    return ops.mix_experts(x, logits, count, True, down.shape[1], expert)


@pytest.mark.parametrize("shape", MOE_SHAPES[:-2], ids=str)
def test_in_float32_it_is_the_reference(shape: Any) -> None:
    native = _native_ops.Ops(DEVICE, row_gap=8)
    for routing in ROUTINGS:
        for normalize in (True, False):
            inputs = (*moe_inputs(shape, routing), normalize, "gelu")
            expected = ops.moe(*map(double, inputs[:5]), *inputs[5:])
            assert max_error(native.moe(*inputs), expected) <= TOLERANCES["moe"], routing


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "weights"), [("bf16", "bf16"), ("f16", "int8")])
def test_experts_are_products_of_their_rows(shape: Any, dtype: str, weights: str) -> None:
    """deterministic: `linear` then has one order of sums too. The result is rounded once."""
    native = _native_ops.Ops(DEVICE, dtype=dtype, deterministic=True)
    for routing in ROUTINGS:
        x, *rest = moe_inputs(shape, routing)
        inputs = (rounded(x, dtype), *rest)
        expected = rounded(made_of_products(native, inputs, weights), dtype)
        found = native.moe(*inputs, True, "silu", weights)
        step = 2.0**-7 if dtype == "bf16" else 2.0**-10  # of neighbouring numbers
        np.testing.assert_allclose(found, expected, rtol=step, atol=1e-4 * step)
        assert np.mean(found != expected) < 0.02, "few are rounded the other way"


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_a_row_has_the_same_bits_in_any_company(dtype: str) -> None:
    """Alone, among few rows, and among so many that other kernels multiply it."""
    native = _native_ops.Ops(DEVICE, dtype=dtype)
    for routing in ROUTINGS:
        x, logits, *experts, count = moe_inputs((130, 72, 40, 24, 4, 2), routing)
        x = rounded(x, dtype)
        whole = native.moe(x, logits, *experts, count, True, "silu", dtype)
        for size in (1, 5, 40):
            for first in (0, 3 * size):
                rows = slice(first, first + size)
                part = native.moe(x[rows], logits[rows], *experts, count, True, "silu", dtype)
                assert same_bits(part, whole[rows]), (routing, size)


def test_a_row_without_numbers_harms_no_other() -> None:
    x, logits, *experts, count = moe_inputs((6, 64, 32, 40, 5, 2), "spread")
    native = _native_ops.Ops(DEVICE, dtype="bf16")
    expected = native.moe(x, logits, *experts, count, True, "silu", "bf16")
    logits[2], x[2] = np.nan, np.nan
    logits[4, 3] = np.inf
    found = native.moe(x, logits, *experts, count, True, "silu", "bf16")
    others = [0, 1, 3, 5]
    assert same_bits(found[others], expected[others]) and np.isnan(found[2]).all()
