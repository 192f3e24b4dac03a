"""Products with quantized weights: the native core against their definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from octavo import _native
from octavo.config import RuntimeOptions
from octavo.models.spec import WeightFormat
from octavo.reference import quantization as q
from octavo.reference.ops import round_to_bf16
from runtime_helpers import VOCAB, make_batch, random_weights, tiny_spec

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
]
SHAPES = [(1, 16, 64), (1, 100, 576), (2, 17, 34), (7, 33, 96), (13, 130, 1024), (50, 5, 130)]
TOLERANCE = 3e-6  # of the root mean square, as for the other products


def make_arguments(
    rows: int, outputs: int, inputs: int, format: WeightFormat
) -> tuple[np.ndarray, ...]:
    """x, codes, scales, zeros or None, bias."""
    generator = np.random.default_rng(rows * outputs + inputs)
    shape = (outputs, format.num_groups(inputs))
    x = generator.standard_normal((rows, inputs), dtype=np.float32)
    scales = generator.uniform(0.001, 0.1, shape).astype(np.float32)
    if format.scale_dtype == "bf16" and format.dtype == "int4":
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
    x, codes, scales, zeros, bias = make_arguments(*shape, format)
    expected = q.quantized_linear(x.astype(np.float64), codes, scales, format, zeros, bias)
    results = []
    for isa in _native.available_isas():
        for num_threads in (1, 2):
            native = _native.Ops(num_threads=num_threads, isa=isa)
            results.append(native.quantized_linear(x, codes, scales, format, zeros, bias))
            alone = native.quantized_linear(x[-1:], codes, scales, format, zeros, bias)
            assert (alone == results[-1][-1:]).all()
    assert error(results[0], expected) < TOLERANCE
    for result in results[1:]:
        assert (result == results[0]).all()


def wrong_nibbles(x: Any, codes: Any, scales: Any, format: Any, zeros: Any, bias: Any) -> Any:
    swapped = (codes >> 4) | (codes << 4)
    return q.quantized_linear(x, swapped, scales, format, zeros, bias)


def wrong_zero_sign(x: Any, codes: Any, scales: Any, format: Any, zeros: Any, bias: Any) -> Any:
    return q.quantized_linear(x, codes, scales, format, -zeros, bias)


def wrong_group(x: Any, codes: Any, scales: Any, format: Any, zeros: Any, bias: Any) -> Any:
    return q.quantized_linear(x, codes, np.roll(scales, 1, axis=1), format, zeros, bias)


def wrong_levels(x: Any, codes: Any, scales: Any, format: Any, zeros: Any, bias: Any) -> Any:
    shifted = replace(format, levels=tuple(level + 1 for level in format.levels))
    return q.quantized_linear(x, codes, scales, shifted, zeros, bias)


def wrong_rounding(x: Any, codes: Any, scales: Any, format: Any, zeros: Any, bias: Any) -> Any:
    weight = q.dequantize(q.unpack_int4(codes), scales, format, zeros)
    return x @ weight.T + bias


@pytest.mark.parametrize(
    "wrong", [wrong_nibbles, wrong_zero_sign, wrong_group, wrong_levels, wrong_rounding]
)
def test_a_wrong_definition_would_be_noticed(wrong: Callable[..., Any]) -> None:
    format = WeightFormat("int4", 32, has_zeros=True)
    x, codes, scales, zeros, bias = make_arguments(3, 20, 96, format)
    native = _native.Ops().quantized_linear(x, codes, scales, format, zeros, bias)
    assert error(native, wrong(x, codes, scales, format, zeros, bias)) > 20 * TOLERANCE


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


def test_stacked_matrices_of_different_formats() -> None:
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
    options = RuntimeOptions("f32", "f32", 16, 256, 8, 128, formats=formats)
    runtime = _native.Runtime("cpu", spec, options)
    for name, (values, dtype) in arrays.items():
        runtime.load(name, values, dtype)
    assert runtime.missing_weights() == []
    runtime.alloc_kv(8)
    output = runtime.step(make_batch([([3, 1, 4, 1, 5], 0, [2])], range(5)), ["*"])
    for name, source in (("q", "attn_norm"), ("v", "attn_norm"), ("up", "mlp_norm")):
        steps, step = q.round_activations(output.taps[f"layers.1.{source}"].astype(np.float64))
        expected = (steps * step) @ weights[f"layers.1.{name}.weight"].T
        assert error(output.taps[f"layers.1.{name}"], expected) < TOLERANCE


def test_wrong_formats_are_refused() -> None:
    x, codes, scales, _, _ = make_arguments(1, 8, 64, WeightFormat("int4", 32))
    native = _native.Ops()
    with pytest.raises(ValueError, match="group_size is 24; expected a multiple of 32"):
        native.quantized_linear(x, codes, scales[:, [0, 1, 1]], WeightFormat("int4", 24))
    with pytest.raises(ValueError, match="codes has 32 columns; expected 64"):
        native.quantized_linear(x, codes, scales, WeightFormat("int8"))
    with pytest.raises(ValueError, match="levels has 3 entries"):
        native.quantized_linear(x, codes, scales, WeightFormat("int4", 32, levels=(0, 1, 2)))
    options = RuntimeOptions("f32", "f32", 16, 64, 2, 32, formats={"embed": WeightFormat("int8")})
    runtime = _native.Runtime("cpu", tiny_spec(), options)
    assert "embed.scale" in runtime.missing_weights()
    with pytest.raises(ValueError, match="does not take int4 rows"):
        runtime.load("embed.weight", np.zeros((VOCAB, 18), np.uint8), "int4")
