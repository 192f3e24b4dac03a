"""Products with quantized weights: the native core against their definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ops_helpers import TOLERANCES, grouped_activations, one_isa_of_each
from runtime_helpers import VOCAB, make_batch, random_weights, tiny_spec

from octavo import _native, _native_ops
from octavo.config import RuntimeOptions
from octavo.models.spec import WeightFormat
from octavo.reference import quantization as q
from octavo.reference.ops import round_to_bf16

# Levels that are not evenly spaced: the format of a normal distribution's quantiles has such.
UNEVEN = tuple(int(level) for level in np.sort(np.random.default_rng(5).normal(0, 50, 16)))
FORMATS = [
    WeightFormat("int8"),
    WeightFormat("int8", activation_bits=8),
    WeightFormat("int4", 32),
    WeightFormat("int4", 64, has_zeros=True),
    WeightFormat("int4", 128, scale_dtype="f32"),
    WeightFormat("int4", 96, has_zeros=True),
    WeightFormat("int4", 1024),
    WeightFormat("int4", 32, has_zeros=True, levels=UNEVEN),
    WeightFormat("int4", 32, scale_dtype="f16"),
    WeightFormat("int8", 32, scale_dtype="f16"),
    WeightFormat("int8", 96, scale_dtype="f32"),
    WeightFormat("int8", 128),
    WeightFormat("int8", 1024, scale_dtype="f16"),
]
SHAPES = [(1, 16, 64), (1, 100, 576), (2, 17, 34), (7, 33, 96), (13, 130, 1024), (50, 5, 130)]
TOLERANCE = TOLERANCES["linear"]  # of the root mean square, in either definition
ISAS = _native.available_isas()


def activations(isa: str, format: WeightFormat) -> str:
    """Which definition a product has: "whole" or "bf16"."""
    return grouped_activations(isa) if format.is_grouped else "whole"


def make_arguments(
    rows: int, outputs: int, inputs: int, format: WeightFormat
) -> tuple[np.ndarray, ...]:
    """x, codes, scales, zeros or None, bias."""
    generator = np.random.default_rng(rows * outputs + inputs)
    shape = (outputs, format.num_groups(inputs))
    x = generator.standard_normal((rows, inputs), dtype=np.float32)
    scales = generator.uniform(0.001, 0.1, shape).astype(np.float32)
    if format.scale_dtype == "f16":
        scales[0] = 6e-8 * generator.integers(1, 900, shape[1])  # what float16 has no exponent for
        scales = scales.astype(np.float16).astype(np.float32)
    elif format.scale_dtype == "bf16" and format.is_grouped:
        scales = round_to_bf16(scales)
    zeros = generator.integers(-8, 8, shape).astype(np.float32) if format.has_zeros else None
    bias = generator.standard_normal(outputs, dtype=np.float32)
    if format.dtype == "int8":
        codes = generator.integers(-128, 128, (outputs, inputs)).astype(np.int8)
    else:
        codes = q.pack_int4(generator.integers(0, 16, (outputs, inputs)))
    return x, codes, scales, zeros, bias


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.sqrt(np.mean(expected**2)))


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_equals_the_reference_with_the_same_bits_everywhere(
    shape: tuple[int, int, int], format: WeightFormat
) -> None:
    """The same bits on all instruction sets that have the same definition."""
    x, codes, scales, zeros, bias = make_arguments(*shape, format)
    results: dict[str, list[np.ndarray]] = {"whole": [], "bf16": []}
    for isa in ISAS:
        for num_threads in (1, 2):
            native = _native_ops.Ops(num_threads=num_threads, isa=isa)
            result = native.quantized_linear(x, codes, scales, format, zeros, bias)
            alone = native.quantized_linear(x[-1:], codes, scales, format, zeros, bias)
            assert (alone == result[-1:]).all()
            results[activations(isa, format)].append(result)
    for rounds, same in results.items():
        double = x.astype(np.float64)
        expected = q.quantized_linear(
            double, codes, scales, format, zeros, bias, grouped_activations=rounds
        )
        for result in same:
            assert error(result, expected) < TOLERANCE
            assert (result == same[0]).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_has_the_same_bits_in_every_batch(isa: str, format: WeightFormat) -> None:
    """On both sides of every limit: few rows or tiles of 16, one piece of rows or several."""
    x, codes, scales, zeros, bias = make_arguments(300, 70, 610, format)
    together = None
    for num_threads in (1, 2, 3):
        native = _native_ops.Ops(num_threads=num_threads, isa=isa)
        for rows in (300, 33, 17, 16, 5, 4, 2, 1):
            first = 300 - rows if num_threads == 2 else 0
            part = np.ascontiguousarray(x[first : first + rows])
            result = native.quantized_linear(part, codes, scales, format, zeros, bias)
            together = result if together is None else together
            assert (result == together[first : first + rows]).all(), (num_threads, rows)


@pytest.mark.parametrize("isa", ISAS)
def test_how_grouped_activations_are_rounded(isa: str) -> None:
    assert _native.grouped_activations(isa) == grouped_activations(isa)
    assert _native.grouped_activations() == _native.grouped_activations(
        str(_native.build_info()["isa"])
    )
    with pytest.raises(ValueError, match='isa is "mmx"'):
        _native.grouped_activations("mmx")


@pytest.mark.parametrize("kind", ["int4", "int4 with zeros", "int8"])
@pytest.mark.parametrize("group", [32, 96, 1024])
@pytest.mark.parametrize("isa", [isa for isa in ISAS if grouped_activations(isa) == "bf16"])
def test_bf16_products_of_whole_numbers_are_exact(isa: str, group: int, kind: str) -> None:
    """Where no sum needs rounding, every bit is known, whatever the order."""
    format = WeightFormat("int8", group)
    if kind != "int8":
        format = WeightFormat("int4", group, has_zeros=kind != "int4", levels=UNEVEN)
    for rows in (1, 4, 5, 40):
        _, codes, scales, zeros, _ = make_arguments(rows, 50, 1110, format)
        generator = np.random.default_rng(rows)
        x = generator.integers(-9, 10, (rows, 1110)).astype(np.float32)
        scales = np.exp2(generator.integers(-3, 1, scales.shape)).astype(np.float32)
        bias = generator.integers(-99, 99, 50).astype(np.float32)
        arguments = (codes, scales, format, zeros, bias)
        native = _native_ops.Ops(isa=isa).quantized_linear(x, *arguments)
        double = x.astype(np.float64)
        expected = q.quantized_linear(double, *arguments, grouped_activations="bf16")
        assert (native == expected).all()


def decode(codes: Any, scales: Any, format: WeightFormat, zeros: Any) -> Any:
    values = q.unpack_int4(codes) if format.dtype == "int4" else codes
    return q.dequantize(values, scales, format, zeros)


def wrong_nibbles(
    x: Any, codes: Any, scales: Any, format: Any, zeros: Any, bias: Any, **rounds: str
) -> Any:
    swapped = (codes >> 4) | (codes << 4)
    return q.quantized_linear(x, swapped, scales, format, zeros, bias, **rounds)


def wrong_zero_sign(
    x: Any, codes: Any, scales: Any, format: Any, zeros: Any, bias: Any, **rounds: str
) -> Any:
    return q.quantized_linear(x, codes, scales, format, -zeros, bias, **rounds)


def no_zeros(
    x: Any, codes: Any, scales: Any, format: Any, zeros: Any, bias: Any, **rounds: str
) -> Any:
    return q.quantized_linear(x, codes, scales, format, None, bias, **rounds)


def wrong_group(
    x: Any, codes: Any, scales: Any, format: Any, zeros: Any, bias: Any, **rounds: str
) -> Any:
    rolled = np.roll(scales, 1, axis=1)
    return q.quantized_linear(x, codes, rolled, format, zeros, bias, **rounds)


def wrong_levels(
    x: Any, codes: Any, scales: Any, format: Any, zeros: Any, bias: Any, **rounds: str
) -> Any:
    shifted = replace(format, levels=tuple(level + 1 for level in format.levels))
    return q.quantized_linear(x, codes, scales, shifted, zeros, bias, **rounds)


def not_rounded(
    x: Any, codes: Any, scales: Any, format: Any, zeros: Any, bias: Any, **rounds: str
) -> Any:
    weight = decode(codes, scales, format, zeros)
    return x @ weight.T + bias


def cut_off(
    x: Any, codes: Any, scales: Any, format: Any, zeros: Any, bias: Any, **rounds: str
) -> Any:
    """The lower half of each number dropped, where bf16 asks for the nearest."""
    cut = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return not_rounded(cut, codes, scales, format, zeros, bias)


def the_other_rounding(
    x: Any, codes: Any, scales: Any, format: Any, zeros: Any, bias: Any, grouped_activations: str
) -> Any:
    other = {"whole": "bf16", "bf16": "whole"}[grouped_activations]
    return q.quantized_linear(x, codes, scales, format, zeros, bias, grouped_activations=other)


def weights_as_bf16(
    x: Any, codes: Any, scales: Any, format: Any, zeros: Any, bias: Any, **rounds: str
) -> Any:
    """Codes times scales, rounded: what a product of bf16 matrices would make of them."""
    weight = decode(codes, scales, format, zeros)
    return q.rounded_product(x, round_to_bf16(weight), bias, format, **rounds)


WRONG = [
    wrong_nibbles,
    wrong_zero_sign,
    no_zeros,
    wrong_group,
    wrong_levels,
    not_rounded,
    cut_off,
    the_other_rounding,
    weights_as_bf16,
]


@pytest.mark.parametrize("isa", one_isa_of_each())
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_definition_would_be_noticed(wrong: Callable[..., Any], isa: str) -> None:
    """An instruction set of each definition, with few rows and with a tile of them."""
    format = WeightFormat("int4", 32, has_zeros=True)
    check_noticed(wrong, isa, format)


BYTES_WRONG = [wrong_group, not_rounded, cut_off, the_other_rounding, weights_as_bf16]


@pytest.mark.parametrize("isa", one_isa_of_each())
@pytest.mark.parametrize("wrong", BYTES_WRONG)
def test_a_wrong_definition_of_bytes_in_groups_would_be_noticed(
    wrong: Callable[..., Any], isa: str
) -> None:
    check_noticed(wrong, isa, WeightFormat("int8", 32))


def check_noticed(wrong: Callable[..., Any], isa: str, format: WeightFormat) -> None:
    rounds = grouped_activations(isa)
    for rows in (3, 19):
        x, codes, scales, zeros, bias = make_arguments(rows, 20, 96, format)
        arguments = (x, codes, scales, format, zeros, bias)
        native = _native_ops.Ops(isa=isa).quantized_linear(*arguments)
        right = q.quantized_linear(*arguments, grouped_activations=rounds)
        assert error(native, right) < TOLERANCE
        assert error(native, wrong(*arguments, grouped_activations=rounds)) > 20 * TOLERANCE


def test_numbers_are_rounded_to_int8_while_loading() -> None:
    spec = tiny_spec()
    weights = random_weights(spec)
    weights["embed.weight"][7] = 0  # a row that has no scale of its own
    options = RuntimeOptions("f32", "f32", 16, 256, 8, 128, formats={"embed": WeightFormat("int8")})
    runtime = _native.Runtime("cpu", spec, options)
    for name, values in weights.items():
        runtime.load(name, values, "f32")
    runtime.alloc_kv(8)
    tokens = list(range(VOCAB))
    output = runtime.step(make_batch([(tokens, 0, list(range(6)))]), ["embed"])
    codes, scales = q.round_to_int8(weights["embed.weight"])
    assert (output.taps["embed"] == q.dequantize(codes, scales, WeightFormat("int8"))).all()


@pytest.mark.parametrize("isa", ISAS)
def test_stacked_matrices_of_different_formats(isa: str) -> None:
    """v at 8 bits beside q and k at 4, down at 8: what mixed precision needs."""
    spec = tiny_spec(num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96)
    generator = np.random.default_rng(3)
    weights = random_weights(spec)
    formats = {}
    arrays: dict[str, tuple[np.ndarray, str]] = {k: (v, "f32") for k, v in weights.items()}
    for name in [n for n, v in weights.items() if v.ndim == 2 and n.startswith("layers.")]:
        matrix = name.removesuffix(".weight")
        wide = matrix.endswith((".v", ".down"))
        format = WeightFormat("int8") if wide else WeightFormat("int4", 32)
        formats[matrix] = format
        outputs, inputs = weights[name].shape
        shape = (outputs, format.num_groups(inputs))
        scales = round_to_bf16(generator.uniform(0.01, 0.02, shape).astype(np.float32))
        if wide:
            codes = generator.integers(-20, 20, (outputs, inputs)).astype(np.int8)
            arrays[name] = (codes, "int8")
        else:
            codes = generator.integers(0, 16, (outputs, inputs)).astype(np.uint8)
            arrays[name] = (q.pack_int4(codes), "int4")
        arrays[matrix + ".scale"] = (scales, "f32")
        weights[name] = q.dequantize(codes, scales, format)
    options = RuntimeOptions("f32", "f32", 16, 256, 8, 128, isa=isa, formats=formats)
    runtime = _native.Runtime("cpu", spec, options)
    for name, (values, dtype) in arrays.items():
        runtime.load(name, values, dtype)
    assert runtime.missing_weights() == []
    runtime.alloc_kv(8)
    output = runtime.step(make_batch([([3, 1, 4, 1, 5], 0, [2])], range(5)), ["*"])
    for name, source in (("q", "attn_norm"), ("v", "attn_norm"), ("up", "mlp_norm")):
        x = output.taps[f"layers.1.{source}"].astype(np.float64)
        format, weight = formats[f"layers.1.{name}"], weights[f"layers.1.{name}.weight"]
        rounds = activations(isa, format)
        expected = q.rounded_product(x, weight, None, format, grouped_activations=rounds)
        assert error(output.taps[f"layers.1.{name}"], expected) < TOLERANCE


def test_wrong_formats_are_refused() -> None:
    x, codes, scales, _, _ = make_arguments(1, 8, 64, WeightFormat("int4", 32))
    native = _native_ops.Ops()
    with pytest.raises(ValueError, match="group_size is 24; expected a multiple of 32"):
        native.quantized_linear(x, codes, scales[:, [0, 1, 1]], WeightFormat("int4", 24))
    with pytest.raises(ValueError, match="group_size is 48; expected a multiple of 32"):
        native.quantized_linear(x, x.astype(np.int8), scales[:1], WeightFormat("int8", 48))
    with pytest.raises(ValueError, match="zero points of int8; only int4 has them"):
        native.quantized_linear(x, codes, scales, WeightFormat("int8", 32, has_zeros=True))
    with pytest.raises(ValueError, match="activation_bits is 8; expected 16, or 8 with int8"):
        native.quantized_linear(x, codes, scales, WeightFormat("int8", 32, activation_bits=8))
    with pytest.raises(ValueError, match="scale_dtype is int8; expected bf16, f16 or f32"):
        wrong: Any = WeightFormat("int4", 32, scale_dtype="int8")  # type: ignore[arg-type]
        native.quantized_linear(x, codes, scales, wrong)
    with pytest.raises(ValueError, match="codes has 32 columns; expected 64"):
        native.quantized_linear(x, codes, scales, WeightFormat("int8"))
    with pytest.raises(ValueError, match="levels has 3 entries"):
        native.quantized_linear(x, codes, scales, WeightFormat("int4", 32, levels=(0, 1, 2)))
    options = RuntimeOptions("f32", "f32", 16, 64, 2, 32, formats={"embed": WeightFormat("int8")})
    runtime = _native.Runtime("cpu", tiny_spec(), options)
    assert "embed.scale" in runtime.missing_weights()
    with pytest.raises(ValueError, match="does not take int4 rows"):
        runtime.load("embed.weight", np.zeros((VOCAB, 18), np.uint8), "int4")
    options = replace(options, formats={"embed": WeightFormat("int8", 32)})
    runtime = _native.Runtime("cpu", tiny_spec(), options)
    with pytest.raises(ValueError, match="int8 in groups does not take f32 rows"):
        runtime.load("embed.weight", np.zeros((VOCAB, 36), np.float32), "f32")


def test_weights_come_in_runs_of_rows() -> None:
    """Runs divide panels of outputs; one out of order, or beyond the end, is refused."""
    spec = tiny_spec()
    format, weights = WeightFormat("int8", 32, scale_dtype="f16"), random_weights(spec)
    codes, scales = q.round_to_int8(np.pad(weights["embed.weight"], ((0, 0), (0, 28))), 32)
    codes = np.ascontiguousarray(codes[:, :36])
    halves = scales.astype(np.float16)
    options = RuntimeOptions("f32", "f32", 16, 256, 8, 128, formats={"embed": format})
    taps = []
    for run in (VOCAB, 1, 7, 16, 31):
        runtime = _native.Runtime("cpu", spec, options)
        for name, values in weights.items():
            if name != "embed.weight":
                runtime.load(name, values, "f32")
        for part, array, dtype in (("weight", codes, "int8"), ("scale", halves, "f16")):
            for first in range(0, VOCAB, run):
                assert f"embed.{part}" in runtime.missing_weights()
                runtime.load(f"embed.{part}", array[first : first + run], dtype, first)
            with pytest.raises(ValueError, match=f"from row {VOCAB} on; expected"):
                runtime.load(f"embed.{part}", array[:1], dtype, VOCAB)
        assert runtime.missing_weights() == []
        runtime.alloc_kv(8)
        tokens = list(range(VOCAB))
        output = runtime.step(
            make_batch([(tokens, 0, list(range(6)))], range(VOCAB)), ["embed", "logits"]
        )
        taps.append(output.taps)
    expected = q.dequantize(codes, halves.astype(np.float32), format)
    assert (taps[0]["embed"] == expected).all()
    for name in ("embed", "logits"):
        assert all((each[name] == taps[0][name]).all() for each in taps)
    runtime = _native.Runtime("cpu", spec, options)
    with pytest.raises(ValueError, match="from row 3 on; expected"):
        runtime.load("embed.weight", codes[3:5], "int8", 3)
    with pytest.raises(ValueError, match=r"has the shape \(2, 36\); expected"):
        runtime.load("embed.weight", codes[3:5], "int8")
