"""CUDA: matrix products, packing and embeddings against the reference, in the emulator."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import pytest
from cuda_helpers import needs_cuda, rounded
from cuda_linear_helpers import (
    BYTES_IN_GROUPS,
    F16_SCALES_TOLERANCE,
    FORMATS,
    MANY_OUTPUTS,
    PLAIN_ROWS,
    PLAIN_TOLERANCE,
    QUANTIZED_ROWS,
    ROUNDED_TOLERANCE,
    dequantized,
    error,
    native,
    quantized,
)
from reference_helpers import Float32, uniform

from octavo import _native_ops
from octavo.models.spec import WeightFormat
from octavo.reference import ops as reference

pytestmark = needs_cuda


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
        (257, 34, 144),
    ]:
        codes, scales, zeros = quantized(outputs, inputs, format)
        x, bias = uniform(rows, rows, inputs), uniform(rows + 2, outputs)
        weight = dequantized(codes, scales, zeros, format, inputs)
        expected = reference.linear(rounded(x, dtype).astype(np.float64), weight, bias)
        actual = native(dtype).quantized_linear(x, codes, scales, format, zeros, bias)
        assert error(actual, expected) < tolerance(rows, format, dtype)


def tolerance(rows: int, format: WeightFormat, dtype: str) -> float:
    """Of a product with quantized weights, where the library is to be had."""
    least = F16_SCALES_TOLERANCE if format.scale_dtype == "f32" and dtype != "f32" else 0.0
    return max(PLAIN_TOLERANCE if rows <= QUANTIZED_ROWS else ROUNDED_TOLERANCE[dtype], least)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("rows", "dtype"),
    [
        (11, "bf16"),
        (16, "f16"),
        (31, "bf16"),
        (64, "f16"),
        (65, "f16"),
        (96, "bf16"),
        (100, "bf16"),
        (128, "f16"),
        (129, "bf16"),
        (256, "f16"),
        (257, "bf16"),
    ],
)
def test_products_of_more_rows_equal_the_reference(
    rows: int, format: WeightFormat, dtype: str
) -> None:
    """Few tiles, which blocks share (4 slices of inputs), and many; the last of each cut short."""
    ops = native(dtype, row_gap=8)
    for outputs, inputs in [(30, 408), (MANY_OUTPUTS, 168)]:
        codes, scales, zeros = quantized(outputs, inputs, format)
        x, bias = uniform(rows, rows, inputs), uniform(rows + 2, outputs)
        weight = dequantized(codes, scales, zeros, format, inputs)
        expected = reference.linear(rounded(x, dtype).astype(np.float64), weight, bias)
        actual = ops.quantized_linear(x, codes, scales, format, zeros, bias)
        few = rows <= 16 and outputs < MANY_OUTPUTS
        assert ops.last_kernels().endswith("multiply_few" if few else "multiply_tile")
        assert error(actual, expected) < tolerance(rows, format, dtype)


def _input_left_out(x: Float32, weight: Float32, bias: Float32) -> Any:
    return reference.linear(np.where(np.arange(x.shape[1]) < x.shape[1] - 1, x, 0), weight, bias)


def _inputs_swapped(x: Float32, weight: Float32, bias: Float32) -> Any:
    """Two neighbours change places: a place in a unit that is off by one."""
    order = np.arange(x.shape[1])
    order[[34, 35]] = 35, 34
    return reference.linear(x[:, order], weight, bias)


def _outputs_of_the_next_row(x: Float32, weight: Float32, bias: Float32) -> Any:
    return reference.linear(np.roll(x, -1, axis=0), weight, bias)


def _last_row_twice(x: Float32, weight: Float32, bias: Float32) -> Any:
    return reference.linear(x[np.minimum(np.arange(len(x)), len(x) - 2)], weight, bias)


def _outputs_swapped(x: Float32, weight: Float32, bias: Float32) -> Any:
    return np.roll(reference.linear(x, weight, bias), 8, axis=1)


def _no_bias(x: Float32, weight: Float32, bias: Float32) -> Any:
    return reference.linear(x, weight, np.where(np.arange(len(bias)) < len(bias) - 1, bias, 0))


def _slice_left_out(x: Float32, weight: Float32, bias: Float32) -> Any:
    """Of the last rows' last outputs: a block that did not wait for one that shares its tile."""
    part = np.where(np.arange(x.shape[1]) // 128 == 2, 0, x)
    wrong = reference.linear(x, weight, bias)
    wrong[64:, 16:] = reference.linear(part, weight, bias)[64:, 16:]
    return wrong


@pytest.mark.parametrize(
    "plant",
    [
        _input_left_out,
        _inputs_swapped,
        _outputs_of_the_next_row,
        _last_row_twice,
        _outputs_swapped,
        _no_bias,
        _slice_left_out,
    ],
    ids=lambda plant: plant.__name__.strip("_"),
)
@pytest.mark.parametrize("format", [FORMATS[0], FORMATS[2], FORMATS[4], BYTES_IN_GROUPS], ids=str)
def test_a_planted_error_is_found(format: WeightFormat, plant: Any) -> None:
    """What the reference gives for a mistake is further away than the tolerance."""
    for outputs in (30, MANY_OUTPUTS):
        codes, scales, zeros = quantized(outputs, 392, format)
        x, bias = uniform(1, 100, 392), uniform(3, outputs)
        weight = dequantized(codes, scales, zeros, format, 392)
        given = rounded(x, "bf16").astype(np.float64)
        actual = native("bf16").quantized_linear(x, codes, scales, format, zeros, bias)
        assert error(actual, reference.linear(given, weight, bias)) < PLAIN_TOLERANCE
        assert error(actual, plant(given, weight, bias)) > 4 * PLAIN_TOLERANCE


@pytest.mark.parametrize("format", [None, FORMATS[0], FORMATS[2], BYTES_IN_GROUPS], ids=str)
def test_how_many_rows_go_by_tiles_can_be_set(
    format: WeightFormat | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above that the library multiplies, in another order: what tells them apart is the bits."""
    x, weight = uniform(1, 41, 392) * np.float32(3), uniform(2, 34, 392)
    codes, scales, zeros = quantized(34, 392, format or FORMATS[0])

    def product(rows: Float32, **options: Any) -> Any:
        ops = native("bf16", **options)
        if format is None:
            return ops.linear(rows, weight, None, "bf16")
        return ops.quantized_linear(rows, codes, scales, format, zeros)

    name, other = "OCTAVO_TILES_ROWS", "OCTAVO_QUANTIZED_TILES_ROWS"
    name, other = (name, other) if format is None else (other, name)
    by_tiles = product(x, deterministic=True)
    assert (product(x) == by_tiles).all() == (format is not None)
    monkeypatch.setenv(other, "9")
    monkeypatch.setenv(name, "40")
    assert (product(x[:40]) == by_tiles[:40]).all()
    assert (product(x) != by_tiles).any()
    assert (product(x, deterministic=True) == by_tiles).all()
    monkeypatch.setenv(name, "many")
    with pytest.raises(ValueError, match=name):
        native("bf16")


@pytest.mark.parametrize("row_gap", [0, 3, 4])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_embeddings_are_rows_of_the_table(dtype: str, row_gap: int) -> None:
    for vocab, width, rows in [(1, 1, 1), (17, 7, 5), (50, 64, 33), (101, 200, 3), (9, 1226, 4)]:
        table, position_table = uniform(vocab, vocab, width), uniform(vocab + 1, 40, width)
        ids = np.array([(3 * i + vocab - 1) % vocab for i in range(rows)], dtype=np.int32)
        positions = np.array([(7 * i + 39) % 40 for i in range(rows)], dtype=np.int32)
        for weight_dtype in ("f32", "f16", "bf16"):
            stored = rounded(table, weight_dtype), rounded(position_table, weight_dtype)
            ops = native(dtype, row_gap=row_gap)
            assert (ops.embed(table, ids, dtype=weight_dtype) == stored[0][ids]).all()
            actual = ops.embed(table, ids, position_table, positions, weight_dtype)
            assert (actual == stored[0][ids] + stored[1][positions]).all()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_quantized_embeddings_are_rows_of_the_table(format: WeightFormat, dtype: str) -> None:
    vocab, ids = 19, np.array([18, 0, 7, 7, 3], np.int32)
    for width in (34, 64, 328, 1226):
        codes, scales, zeros = quantized(vocab, width, format)
        kept = scales
        if format.is_grouped and format.scale_dtype == "f32" and dtype != "f32":
            kept = rounded(scales, "f16")
        rows = native(dtype, row_gap=3).quantized_embed(ids, width, codes, scales, format, zeros)
        table = dequantized(codes, kept, zeros, format, width)
        assert (rows == table[ids]).all()
        # What a kernel might get wrong: the row, the order in a unit, the block whose scale it is.
        swapped = np.arange(width)
        swapped[1:3] = 2, 1
        assert (rows != table[(ids + 1) % vocab]).mean() > 0.9
        assert (rows != table[ids][:, swapped]).any()
        if kept.shape[1] > 1:
            other = dequantized(codes, np.roll(kept, 1, axis=1), zeros, format, width)
            assert (rows != other[ids]).mean() > 0.8


@pytest.mark.parametrize(
    ("format", "dtype"),
    [*zip([None, None, *FORMATS[:5], BYTES_IN_GROUPS, FORMATS[-1]], cycle(["f16", "bf16"]))],
    ids=str,
)
def test_a_row_has_the_same_bits_in_every_batch(format: WeightFormat | None, dtype: str) -> None:
    """Across all kernels and tiles: 1 to 8, 9 to 16, to 32, to 64, to 96, to 128 and more rows."""
    without, beside = native(dtype, deterministic=True), native(dtype)
    # 392 and 1400 inputs: 4 slices, and 6 of 256 whose last is cut short; 2, 3 and 1 tiles of
    # outputs.
    for outputs, inputs in [(136, 392), (MANY_OUTPUTS, 136), (20, 1400)]:
        x = uniform(inputs, 257, inputs) * np.float32(3)
        if format is None:
            weight = uniform(outputs, outputs, inputs)

            def product(
                rows: Float32, ops: _native_ops.Ops = without, weight: Float32 = weight
            ) -> Any:
                return ops.linear(rows, weight, None, dtype)
        else:
            codes, scales, zeros = quantized(outputs, inputs, format)

            def product(
                rows: Float32,
                ops: _native_ops.Ops = without,
                codes: np.ndarray = codes,
                scales: Float32 = scales,
                zeros: Float32 | None = zeros,
            ) -> Any:
                return ops.quantized_linear(rows, codes, scales, format, zeros)

        together = product(x)
        others = [(3, 5), (60, 8), (5, 16), (0, 64), (161, 96), (0, 128), (1, 192), (1, 256)]
        for first, count in [
            *[(69, 1), (7, 9), (20, 17), (1, 33), (0, 65), (3, 100), (9, 129)],  # a kernel each
            *(others if outputs == 136 else []),
        ]:
            part, expected = x[first : first + count], together[first : first + count]
            assert (product(part) == expected).all()
            if count <= (PLAIN_ROWS if format is None else QUANTIZED_ROWS):
                assert (product(part, beside) == expected).all()


# What the kernel for 1 to 8 rows may meet: groups of 32, 64, 128, more, and of whole rows.
STREAMED: list[WeightFormat | None] = [
    None,
    *FORMATS,
    WeightFormat("int4", 512, has_zeros=True),
    WeightFormat("int4", 1024, scale_dtype="f32"),
    WeightFormat("int8", 1024),
]
TILE = 16  # outputs


def streamed(
    format: WeightFormat | None, outputs: int, inputs: int, dtype: str
) -> tuple[Callable[[Float32], Float32], Float32]:
    """The product with a matrix on the device, made anew as the environment says; the matrix."""
    if format is None:
        weight = uniform(outputs, outputs, inputs)
        return lambda x: native(dtype).linear(x, weight, None, dtype), rounded(weight, dtype)
    codes, scales, zeros = quantized(outputs, inputs, format)
    return (
        lambda x: native(dtype).quantized_linear(x, codes, scales, format, zeros),
        dequantized(codes, scales, zeros, format, inputs),
    )


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("format", STREAMED, ids=str)
def test_a_block_may_make_several_tiles(
    format: WeightFormat | None, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits whether a block makes one tile or goes on to others.

    The emulator has 4 processors, and two blocks a processor: 281 outputs are 18 tiles, the last of
    9 outputs, two or three of a block. 2048 inputs are 8 slices of a ring of bf16 or int8; 8192 are
    of four; 1400 are 6 of 256, the last half empty, where no block goes on.
    """
    many = MANY_OUTPUTS
    for outputs, inputs, rows in [(many, 2048, 3), (many, 1400, 8), (149, 8192, 1), (16, 128, 2)]:
        x = uniform(inputs, rows, inputs) * np.float32(2)
        product, weight = streamed(format, outputs, inputs, dtype)
        monkeypatch.setenv("OCTAVO_CUDA_TILES_APART", "1")
        one = product(x)
        monkeypatch.delenv("OCTAVO_CUDA_TILES_APART")
        assert (product(x) == one).all(), (outputs, inputs)
        expected = reference.linear(rounded(x, dtype).astype(np.float64), weight, None)
        rounds_scales = format is not None and format.scale_dtype == "f32"
        tolerance = F16_SCALES_TOLERANCE if rounds_scales else PLAIN_TOLERANCE
        assert error(one, expected) < tolerance


def test_planted_errors_of_tiles_are_found() -> None:
    """What a block that makes several tiles might get wrong is far outside of the tolerance."""
    product, weight = streamed(WeightFormat("int8"), 277, 2048, "bf16")
    x = rounded(uniform(2048, 3, 2048), "bf16")
    actual = product(x)
    right = reference.linear(x.astype(np.float64), weight, None)
    assert error(actual, right) < PLAIN_TOLERANCE
    for wrong in (
        reference.linear(x, np.roll(weight, 8 * TILE, axis=0), None),  # the tile before
        reference.linear(np.where(np.arange(2048) < 1792, x, 0), weight, None),  # no last slice
        # Sums that go on from the tile before.
        right + np.where(np.arange(277) >= 8 * TILE, np.roll(right, 8 * TILE, axis=1), 0),
    ):
        assert error(actual, wrong) > 1000 * PLAIN_TOLERANCE
