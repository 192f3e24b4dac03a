"""CUDA: matrix products, packing and embeddings against the reference, in the emulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cuda_helpers import DEVICE, needs_cuda
from octavo import _native
from octavo.models.spec import WeightFormat
from octavo.reference import ops as reference
from octavo.reference import quantization as q
from reference_helpers import Float32, uniform

pytestmark = needs_cuda


def native(dtype: str, **options: Any) -> _native.Ops:
    return _native.Ops(DEVICE, dtype=dtype, **options)


def rounded(x: Float32, dtype: str) -> Float32:
    """x as numbers of `dtype`."""
    if dtype == "f32":
        return x
    if dtype == "f16":
        return x.astype(np.float16).astype(np.float32)
    return reference.round_to_bf16(x)


def error(actual: Any, expected: Any) -> float:
    """The largest, of the root mean square."""
    return float(np.abs(actual - expected).max() / np.sqrt(np.mean(np.square(expected))))


UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FORMATS = [
    WeightFormat("int8"),
    WeightFormat("int4", 32),
    WeightFormat("int4", 32, has_zeros=True),
    WeightFormat("int4", 64, has_zeros=True),
    WeightFormat("int4", 64, levels=UNEVEN),
    WeightFormat("int4", 96),
    WeightFormat("int4", 128, scale_dtype="f32"),
    WeightFormat("int4", 128, has_zeros=True),
    WeightFormat("int4", 256, levels=UNEVEN, has_zeros=True),
]
PLAIN_TOLERANCE = 5e-6  # float32 sums
# Of more than 64 rows, where the library multiplies by weights that were rounded.
ROUNDED_TOLERANCE = {"f32": 5e-6, "f16": 2e-3, "bf16": 1.5e-2}
F16_SCALES_TOLERANCE = 2e-3  # what float32 scales become beside 16-bit activations


def quantized(
    outputs: int, inputs: int, format: WeightFormat
) -> tuple[np.ndarray, Float32, Float32 | None]:
    """Codes as the native core takes them, scales, zeros."""
    generator = np.random.default_rng(outputs * 31 + inputs)
    shape = (outputs, format.num_groups(inputs))
    scales = generator.uniform(0.01, 0.1, shape).astype(np.float32)
    if format.scale_dtype == "bf16":
        scales = reference.round_to_bf16(scales)
    zeros = generator.integers(-8, 9, shape).astype(np.float32) if format.has_zeros else None
    if format.dtype == "int8":
        return generator.integers(-128, 128, (outputs, inputs)).astype(np.int8), scales, zeros
    return q.pack_int4(generator.integers(0, 16, (outputs, inputs))), scales, zeros


def dequantized(
    codes: np.ndarray, scales: Float32, zeros: Float32 | None, format: WeightFormat, inputs: int
) -> Float32:
    if format.dtype == "int4":
        codes = q.unpack_int4(codes)[:, :inputs]
    return q.dequantize(codes, scales, format, zeros)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("weight_dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1),
        (1, 7, 3),
        (3, 64, 101),
        (8, 72, 49),
        (40, 211, 35),
        (19, 128, 64),
        (9, 200, 70),
        (16, 640, 33),
        (70, 392, 150),
    ],
)
def test_plain_products_equal_the_reference(
    shape: tuple[int, int, int], weight_dtype: str, dtype: str
) -> None:
    rows, inputs, outputs = shape
    x, weight = uniform(rows, rows, inputs), uniform(rows + 1, outputs, inputs)
    bias = uniform(rows + 2, outputs) if rows % 2 else None
    expected = reference.linear(
        rounded(x, dtype).astype(np.float64), rounded(weight, weight_dtype), bias
    )
    actual = native(dtype).linear(x, weight, bias, weight_dtype)
    assert error(actual, expected) < PLAIN_TOLERANCE


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_quantized_products_equal_the_reference(format: WeightFormat, dtype: str) -> None:
    for rows, outputs, inputs in [
        (1, 16, 64),
        (2, 17, 34),
        (7, 33, 96),
        (11, 130, 328),
        (20, 150, 272),
        (45, 40, 200),
        (70, 33, 144),
    ]:
        codes, scales, zeros = quantized(outputs, inputs, format)
        x, bias = uniform(rows, rows, inputs), uniform(rows + 2, outputs)
        weight = dequantized(codes, scales, zeros, format, inputs)
        expected = reference.linear(rounded(x, dtype).astype(np.float64), weight, bias)
        actual = native(dtype).quantized_linear(x, codes, scales, format, zeros, bias)
        tolerance = PLAIN_TOLERANCE if rows <= 64 else ROUNDED_TOLERANCE[dtype]
        if format.scale_dtype == "f32" and dtype != "f32":
            tolerance = max(tolerance, F16_SCALES_TOLERANCE)
        assert error(actual, expected) < tolerance


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_embeddings_are_rows_of_the_table(dtype: str) -> None:
    for vocab, width, rows in [(1, 1, 1), (17, 7, 5), (50, 64, 33), (101, 200, 3)]:
        table, position_table = uniform(vocab, vocab, width), uniform(vocab + 1, 40, width)
        ids = np.array([(3 * i + vocab - 1) % vocab for i in range(rows)], dtype=np.int32)
        positions = np.array([(7 * i + 39) % 40 for i in range(rows)], dtype=np.int32)
        for weight_dtype in ("f32", "f16", "bf16"):
            stored = rounded(table, weight_dtype), rounded(position_table, weight_dtype)
            ops = native(dtype)
            assert (ops.embed(table, ids, dtype=weight_dtype) == stored[0][ids]).all()
            actual = ops.embed(table, ids, position_table, positions, weight_dtype)
            assert (actual == stored[0][ids] + stored[1][positions]).all()


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("format", [None, *FORMATS[:5], FORMATS[-1]], ids=str)
def test_a_row_has_the_same_bits_in_every_batch(format: WeightFormat | None, dtype: str) -> None:
    """Across all kernels and tiles: 1 to 8, 9 to 16, to 32, to 64 and more rows."""
    ops = native(dtype, deterministic=True)
    # 392 and 1400 inputs: 4 slices, and 6 of 256 whose last is cut short; 2 tiles of outputs.
    for outputs, inputs in [(136, 392), (20, 1400)]:
        x = uniform(inputs, 70, inputs) * np.float32(3)
        if format is None:
            weight = uniform(outputs, outputs, inputs)

            def product(rows: Float32, weight: Float32 = weight) -> Any:
                return ops.linear(rows, weight, None, dtype)
        else:
            codes, scales, zeros = quantized(outputs, inputs, format)

            def product(
                rows: Float32,
                codes: np.ndarray = codes,
                scales: Float32 = scales,
                zeros: Float32 | None = zeros,
            ) -> Any:
                return ops.quantized_linear(rows, codes, scales, format, zeros)

        together = product(x)
        for first, count in [(69, 1), (3, 5), (60, 8), (7, 9), (5, 16), (20, 17), (1, 33), (0, 64)]:
            assert (product(x[first : first + count]) == together[first : first + count]).all()
