"""Norms, activations, copied rows and log_softmax of the CUDA backend against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_helpers import DEVICE, needs_cuda, rounded
from reference_helpers import max_error, same_bits, uniform

from octavo import _native_ops
from octavo.reference import ops, sampling

pytestmark = needs_cuda

# The largest error allowed, relative to the root mean square of the expected values: a few float32
# roundings, and half a step of the activations' format at the largest value (a few times the mean).
TOLERANCES = {"f32": 3e-6, "bf16": 0.03, "f16": 0.004}
# Odd ones, one number, less than a warp, a width of real models, more than one group a thread.
SHAPES = [(1, 1), (3, 7), (2, 64), (5, 101), (17, 576), (1, 2049), (2, 4100), (70, 36)]


def cuda(dtype: str, row_gap: int = 0) -> _native_ops.Ops:
    return _native_ops.Ops(DEVICE, dtype=dtype, row_gap=row_gap)


def check(actual: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    assert max_error(actual, expected) <= TOLERANCES[dtype]
    if dtype != "f32":  # every number by itself: half a step of its own size, and a little
        step = 2.0**-8 if dtype == "bf16" else 2.0**-11
        allowed = np.abs(expected) * step * 1.01 + 1e-5 * np.abs(expected).max() + 2.0**-25
        assert (np.abs(actual - expected) <= allowed).all()


def norm_inputs(seed: int, rows: int, width: int) -> dict[str, np.ndarray]:
    """Small numbers, so that eps is no smaller than their squares and its place matters."""
    small = np.float32(0.02)
    return {
        "x": uniform(seed, rows, width) * small + np.float32(0.003),
        "residual": uniform(seed + 50, rows, width) * small,
        "weight": 1 + uniform(seed + 100, width) * np.float32(0.5),
        "bias": uniform(seed + 200, width),
    }


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms(kind: str, dtype: str) -> None:
    native = cuda(dtype)
    for seed, (rows, width) in enumerate(SHAPES):
        if width == 1 and kind == "layer":
            continue  # all zero
        given = norm_inputs(seed, rows, width)
        x, residual, weight = given["x"], given["residual"], given["weight"]
        for bias in (None, given["bias"]):
            expected = ops.norm(x.astype(np.float64), weight, bias, 1e-5, kind)
            check(native.norm(x, weight, bias, 1e-5, kind), expected, dtype)

            added = rounded(x, dtype)
            total, normed = native.add_norm(residual, x, weight, bias, 1e-5, kind)
            assert same_bits(total, residual + added)
            expected = ops.norm(total.astype(np.float64), weight, bias, 1e-5, kind)
            check(normed, expected, dtype)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_norm_heads(dtype: str) -> None:
    for rows, heads, width in [(1, 1, 2), (3, 5, 7), (5, 3, 64), (9, 2, 80), (2, 1, 4100)]:
        given = norm_inputs(width, rows, heads * width)
        sizes = np.repeat(1 + 5 * np.arange(heads, dtype=np.float32), width)
        x, weight = rounded(given["x"] * sizes, dtype), given["weight"][:width]
        expected = ops.norm_heads(x.astype(np.float64), weight, None, 1e-5)
        check(cuda(dtype).norm_heads(x, weight, None, 1e-5), expected, dtype)
        if heads > 1:
            together = ops.norm(x.astype(np.float64), np.tile(weight, heads), None, 1e-5)
            with pytest.raises(AssertionError):
                check(together, expected, dtype)
    with pytest.raises(ValueError, match="without a bias"):
        cuda(dtype).norm_heads(x, weight, weight, 1e-5)
    wide = np.ones((1, 16388), np.float32)
    with pytest.raises(ValueError, match="heads of 16388 numbers; expected at most 16384"):
        cuda(dtype).norm_heads(wide, wide[0], None, 1e-5)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_scale(dtype: str) -> None:
    for seed, (rows, width) in enumerate(SHAPES):
        x = rounded(uniform(seed, rows, width) * np.float32([0.03, 2, 40][seed % 3]), dtype)
        for factor, cap in [(0.37, 0.0), (1.0, 30.0), (3.3, 2.0)]:
            expected = ops.scale(x.astype(np.float64), factor, cap)
            check(cuda(dtype).scale(x, factor, cap), expected, dtype)
            with pytest.raises(AssertionError):
                check(ops.scale(x, 1.05 * factor), expected, dtype)


@pytest.mark.parametrize("width", [4096, 4097, 8191, 16384])
def test_wide_norms(width: int) -> None:
    given = norm_inputs(width, 2, width)
    expected = ops.norm(given["x"].astype(np.float64), given["weight"], given["bias"], 1e-5)
    check(cuda("f32").norm(given["x"], given["weight"], given["bias"], 1e-5), expected, "f32")


def test_norm_of_too_wide_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="rows of 16385 numbers; the kernel takes up to 16384"):
        cuda("f32").norm(uniform(1, 1, 16385), uniform(2, 16385), None, 1e-5)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated_activation(activation: str, dtype: str) -> None:
    native = cuda(dtype)
    for seed, (rows, width) in enumerate(SHAPES):
        # Far enough out that exp overflows somewhere in a careless sigmoid.
        gate = rounded(uniform(seed, rows, width) * np.float32([0.5, 4, 100][seed % 3]), dtype)
        up = rounded(uniform(seed + 100, rows, width) * np.float32(5), dtype)
        for first in (gate, None):
            arguments = [None if a is None else a.astype(np.float64) for a in (first, up)]
            expected = ops.gated_activation(*arguments, activation)
            check(native.gated_activation(first, up, activation), expected, dtype)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_take_rows(dtype: str) -> None:
    for rows, width in [(1, 1), (7, 5), (3, 6), (40, 576), (2, 2049)]:
        x = uniform(rows, rows, width)
        chosen = np.array([(5 * i + rows - 1) % rows for i in range(rows + 2)], dtype=np.int32)
        assert same_bits(cuda(dtype).take_rows(x, chosen), rounded(x[chosen], dtype))


@pytest.mark.parametrize(
    "op", ["norm", "layer norm", "add_norm", "norm_heads", "scale", "gated_activation"]
)
def test_row_alone_or_among_others(op: str) -> None:
    native = cuda("bf16")
    x, other, weight = uniform(1, 9, 101), uniform(2, 9, 101), uniform(3, 101)

    def run(rows: slice) -> Any:
        if op == "norm":
            return native.norm(x[rows], weight, None, 1e-5)
        if op == "layer norm":
            return native.norm(x[rows], weight, weight, 1e-5, "layer")
        if op == "add_norm":
            return native.add_norm(x[rows], other[rows], weight, None, 1e-5)[1]
        if op == "norm_heads":
            return native.norm_heads(x[rows, :99], weight[:33], None, 1e-5)
        if op == "scale":
            return native.scale(x[rows], 1.7, 0.9)
        return native.gated_activation(x[rows], other[rows], "silu")

    alone = np.concatenate([run(slice(i, i + 1)) for i in range(9)])
    assert same_bits(alone, run(slice(0, 9)))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("width", [8, 64, 101])
def test_gaps_between_rows_change_nothing(width: int, dtype: str) -> None:
    """Odd gaps and widths go number by number, gaps of 8 by four or 16 bytes at once."""
    given = norm_inputs(1, 5, width)
    x, residual, weight = given["x"], given["residual"], given["weight"]
    rows = np.array([3, 0, 4, 4], np.int32)
    results = []
    for gap in (0, 1, 4, 8):  # downloading checks that nobody wrote into a gap
        native = cuda(dtype, gap)
        results.append(
            [
                native.norm(x, weight, given["bias"], 1e-5),
                *native.add_norm(residual, x, weight, None, 1e-5, "layer"),
                native.norm_heads(np.tile(x, 2), weight, None, 1e-5),
                native.scale(x, 1.7, 0.9),
                native.gated_activation(x, residual, "silu"),
                native.gated_activation(None, residual, "gelu"),
                native.take_rows(x, rows),
                native.log_softmax(residual),
            ]
        )
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("vocab", [1, 7, 33, 1000, 49152])
def test_log_softmax(vocab: int) -> None:
    logits = uniform(vocab, 6, vocab) * np.float32([[1], [20], [0], [100], [1e-3], [3]])
    logits[1] += np.float32(1000)
    actual = cuda("bf16").log_softmax(logits)
    np.testing.assert_array_max_ulp(actual, sampling.log_softmax(logits), maxulp=2)


def test_planted_errors_are_found() -> None:
    """What a kernel might get wrong: each is far outside of the tolerance."""
    given = norm_inputs(3, 5, 101)
    x = given["x"].astype(np.float64)
    right = cuda("bf16").norm(given["x"], given["weight"], given["bias"], 1e-5)
    for wrong in (
        ops.norm(x, given["weight"], given["bias"], 2e-5),
        ops.norm(x, given["weight"], None, 1e-5),
        ops.norm(x, given["weight"], given["bias"], 1e-5, "layer"),
        ops.norm(np.where(np.arange(101) < 100, x, 0), given["weight"], given["bias"], 1e-5),
        ops.norm(x, np.roll(given["weight"], 1), given["bias"], 1e-5),
    ):
        with pytest.raises(AssertionError):
            check(right, wrong, "bf16")
    gate, up = (rounded(uniform(seed, 3, 40) * np.float32(2), "bf16") for seed in (1, 2))
    right = cuda("bf16").gated_activation(gate, up, "gelu")
    for wrong in (
        ops.gated_activation(up, gate, "gelu"),
        ops.gated_activation(gate, up, "silu"),
        ops.gated_activation(gate, up, "gelu_tanh") * np.float32(1.005),
    ):
        with pytest.raises(AssertionError):
            check(right, wrong, "bf16")
