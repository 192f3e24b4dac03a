"""Rounding to int8 and int4: production code against the definition, and how good it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fit_levels import fit_levels
from runtime_helpers import tiny_spec

from octavo import _native
from octavo.errors import InvalidArgumentError
from octavo.models.spec import UNIFORM_LEVELS, WeightFormat
from octavo.quantization.grid import Grid
from octavo.quantization.levels import NONUNIFORM_LEVELS
from octavo.quantization.plan import Scheme, plan_formats, weight_bytes
from octavo.quantization.rounding import QuantizedMatrix, quantize_matrix
from octavo.reference import quantization as definition
from octavo.weights.tensor import float32_to_bf16

FORMATS = [
    WeightFormat("int8"),
    WeightFormat("int4", 32),
    WeightFormat("int4", 96),
    WeightFormat("int4", 32, has_zeros=True),
    WeightFormat("int4", 96, has_zeros=True),
    WeightFormat("int4", 32, levels=NONUNIFORM_LEVELS),
    WeightFormat("int4", 96, levels=NONUNIFORM_LEVELS),
]


def matrix(outputs: int = 37, inputs: int = 192, seed: int = 0) -> np.ndarray:
    """Rows of different size, off their centre, some groups of zeros or of one sign."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((outputs, inputs)) * generator.uniform(0.01, 3, (outputs, 1))
    weight += generator.uniform(-1, 1, (outputs, 1)) * 0.3
    weight[1, :96] = 0
    weight[2] = np.abs(weight[2])
    weight[4] = -np.abs(weight[4])
    weight[3] = 0
    return weight.astype(np.float32)


def codes_of(quantized: QuantizedMatrix, format: WeightFormat) -> np.ndarray:
    return definition.unpack_int4(quantized.codes) if format.dtype == "int4" else quantized.codes


def values_of(quantized: QuantizedMatrix, format: WeightFormat) -> np.ndarray:
    codes = codes_of(quantized, format)
    return definition.dequantize(codes, quantized.scales, format, quantized.zeros)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_round_to_nearest_is_the_definitions(format: WeightFormat) -> None:
    weight = matrix()
    got = quantize_matrix(weight, format, "rtn", num_threads=2)
    if format.dtype == "int8":
        codes, scales = definition.round_to_int8(weight)
        assert np.array_equal(got.scales, scales) and np.array_equal(got.codes, codes)
        return
    codes, scales, zeros = definition.round_to_int4(weight, format)
    assert np.array_equal(got.scales, scales)
    assert np.array_equal(codes_of(got, format), codes)
    assert (zeros is None) == (got.zeros is None)
    if zeros is not None and got.zeros is not None:
        assert np.array_equal(got.zeros, zeros) and len(np.unique(zeros)) > 5


@pytest.mark.parametrize("method", ["rtn", "search"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_weight_is_near_its_code(format: WeightFormat, method: str) -> None:
    weight = matrix()
    got = quantize_matrix(weight, format, method)
    assert got.scales.shape == (37, format.num_groups(192))
    bits = float32_to_bf16(got.scales).astype(np.uint32) << 16
    assert np.array_equal(bits.view(np.float32), got.scales)  # nothing is lost in a directory
    error = np.abs(values_of(got, format) - weight)
    scales = np.repeat(np.abs(got.scales), 192 // format.num_groups(192), axis=1)
    # Nearest, but where the range was cut off.
    widest = max(np.diff(format.levels)) if format.dtype == "int4" else 1
    assert np.mean(error <= scales * 0.502 * widest) > 0.98
    assert np.array_equal(values_of(got, format)[3], np.zeros(192))
    if got.zeros is not None:  # of 4 bits; those of groups of one sign lie at an end
        assert got.zeros.min() == -8 and got.zeros.max() == 7


@pytest.mark.parametrize("format", FORMATS[1:], ids=str)
def test_the_search_is_better_in_every_group(format: WeightFormat) -> None:
    weight = matrix(outputs=300, seed=5)

    def errors(method: str) -> np.ndarray:
        values = values_of(quantize_matrix(weight, format, method), format)
        groups = (values - weight).reshape(300, -1, format.group_size).astype(np.float64)
        return np.square(groups).sum(axis=2)

    rtn, search = errors("rtn"), errors("search")
    uniform = format.levels == UNIFORM_LEVELS
    assert search.sum() < (0.85 if uniform and not format.has_zeros else 0.95) * rtn.sum()
    if not format.has_zeros:
        # Round to nearest's own scale is among those tried, as 7.5 steps of the longer side.
        assert np.mean(search <= rtn * (1 + 1e-5)) == 1.0


def test_levels_closer_together_leave_less_error() -> None:
    weight = np.random.default_rng(3).standard_normal((100, 576), dtype=np.float32)
    errors = {}
    for levels in (UNIFORM_LEVELS, NONUNIFORM_LEVELS):
        format = WeightFormat("int4", 32, levels=levels)
        off = values_of(quantize_matrix(weight, format), format) - weight
        errors[levels] = np.square(off).sum() / np.square(weight).sum()
    assert errors[NONUNIFORM_LEVELS] < 0.83 * errors[UNIFORM_LEVELS] < 0.0058


def test_the_levels_are_fitted() -> None:
    fitted = fit_levels(num_groups=500, rounds=40, seed=4)
    assert np.abs(np.subtract(fitted, NONUNIFORM_LEVELS)).max() <= 5
    assert fitted[0] == -127 and list(fitted) == sorted(set(fitted))


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_ties_between_levels_take_the_upper(scale: float) -> None:
    """Every middle between two levels, exactly, and the numbers beside it."""
    levels = np.array(NONUNIFORM_LEVELS)
    middles = np.repeat((levels[1:] + levels[:-1]) / 2, 2)
    weight = np.concatenate([[-127], middles, [106]])[None].astype(np.float32) * np.float32(scale)
    weight[0, 2:-1:2] = np.nextafter(weight[0, 2:-1:2], np.float32(-np.inf * scale))
    format = WeightFormat("int4", 32, levels=NONUNIFORM_LEVELS)
    got = quantize_matrix(weight, format, "rtn")
    assert got.scales[0, 0] == scale
    upper, lower = np.arange(1, 16), np.arange(15)
    expected = np.concatenate([[0], np.stack([upper, lower], axis=1).ravel(), [15]])
    assert np.array_equal(codes_of(got, format)[0], expected)
    assert np.array_equal(definition.round_to_int4(weight, format)[0][0], expected)


@pytest.mark.parametrize("format", FORMATS[1:], ids=str)
def test_importance_decides_whose_errors_count(format: WeightFormat) -> None:
    generator = np.random.default_rng(8)
    weight = matrix(outputs=200, seed=9)
    importance = generator.lognormal(sigma=2.0, size=192).astype(np.float32)
    plain = quantize_matrix(weight, format)
    weighted = quantize_matrix(weight, format, importance=importance)

    def error(got: QuantizedMatrix) -> float:
        return float((np.square(values_of(got, format) - weight) * importance).sum())

    assert error(weighted) < 0.9 * error(plain)
    same = quantize_matrix(weight, format, importance=np.full(192, 0.25, np.float32))
    assert np.mean(same.scales == plain.scales) > 0.99  # but for the rounding of sums
    unused = quantize_matrix(weight, format, importance=np.zeros(192, np.float32))
    assert np.array_equal(unused.codes, same.codes)  # inputs that are always 0 count alike
    for wrong in (-1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="importance"):
            quantize_matrix(weight, format, importance=np.full(192, wrong, np.float32))


def test_how_the_work_is_cut_changes_nothing() -> None:
    weight = matrix(outputs=1500, seed=2)
    format = WeightFormat("int4", 32, has_zeros=True)
    whole = quantize_matrix(weight, format, num_threads=3)
    rows = quantize_matrix(np.ascontiguousarray(weight[700:705]), format, num_threads=1)
    assert np.array_equal(whole.codes[700:705], rows.codes)
    assert np.array_equal(whole.scales[700:705], rows.scales)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_nan_and_infinity_stay_visible(format: WeightFormat) -> None:
    weight = matrix()
    weight[5, 7], weight[9, 100] = np.nan, -np.inf
    got = quantize_matrix(weight, format)
    bad = np.isnan(got.scales)
    assert bad.sum() == 2 and bad[5].any() and bad[9].any()
    if format.dtype == "int8":
        codes, scales = definition.round_to_int8(weight)
        assert np.array_equal(got.codes, codes)
        assert np.array_equal(got.scales, scales, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-38, 3e-30, 1e30])
def test_extreme_sizes_do_no_harm(scale: float) -> None:
    weight = (matrix().astype(np.float64) * scale).astype(np.float32)
    for format in FORMATS:
        got = quantize_matrix(weight, format)
        assert np.isfinite(values_of(got, format)).all()


def test_a_width_that_the_group_does_not_divide_is_an_error() -> None:
    with pytest.raises(ValueError, match="width of 100 in groups of 32"):
        quantize_matrix(matrix(inputs=100), WeightFormat("int4", 32))
    with pytest.raises(ValueError, match="levels of their own with zero points"):
        quantize_matrix(matrix(), WeightFormat("int4", 32, True, NONUNIFORM_LEVELS))


def test_the_plan_takes_the_largest_group_that_divides() -> None:
    spec = tiny_spec()  # hidden 36, query heads 60, intermediate 44: nothing divides
    formats, notes = plan_formats(spec, Scheme("int4"))
    assert set(formats.values()) == {WeightFormat("int8")}
    assert len(formats) == 14 and notes and all("int8" in note for note in notes)
    wide = tiny_spec(intermediate_size=128, head_dim=16)  # down 128, o 96
    formats, notes = plan_formats(wide, Scheme("int4", 128, symmetric=False))
    assert formats["layers.0.down"] == WeightFormat("int4", 128, has_zeros=True)
    assert formats["layers.1.o"] == WeightFormat("int4", 32, has_zeros=True)
    assert formats["layers.1.q"] == WeightFormat("int8")
    assert "o: groups of 32 (width 96), since 128 does not divide the width" in notes
    assert plan_formats(wide, Scheme("int4", 64))[0]["layers.0.down"].group_size == 64
    assert "embed" not in formats


def test_bytes_of_weights() -> None:
    spec = tiny_spec()
    plain = weight_bytes(spec, {}, "f32")
    assert plain == 4 * sum(  # by hand: embedding, five norms, and two layers' matrices
        [83 * 36, 5 * 36, 2 * (36 * (60 + 20 + 20) + 36 * 60 + 3 * 36 * 44)]
    )
    saved = plain - weight_bytes(spec, {"embed": WeightFormat("int8")}, "f32")
    assert saved == 3 * 83 * 36 - 4 * 83


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int5",), "scheme is 'int5'; expected one of int8, w8a8, int4"),
        (("int4", 48), "group_size is 48; expected one of 32, 64, 128"),
        (("int8", 32, False), "asymmetric"),
        (("int4", 32, True, "magic"), "method is 'magic'"),
        (("int4-nonuniform", 32, False), "levels that are not uniform no zero points"),
        (("int8", 32, True, "rtn", ("*",)), "named for int8, but the scheme is int8"),
    ],
)
def test_schemes_that_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Scheme(*arguments)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("format", FORMATS[1:], ids=str)
def test_the_native_search_is_the_search(format: WeightFormat, shared: bool) -> None:
    """Of NumPy, group for group, but for costs that rounding makes equal; on every instruction set.

    37 groups: the last five of them are a part of a vector.
    """
    grid, generator = Grid(format), np.random.default_rng(11)
    x = generator.standard_normal((format.group_size, 37), dtype=np.float32)
    x *= generator.lognormal(sigma=3.0, size=37).astype(np.float32)
    x[:, 3] = 0
    x[:, 20] = np.abs(x[:, 20])
    shares = generator.lognormal(size=x.shape).astype(np.float32) if shared else None
    scale, zero = grid.search(x, shares=shares)
    levels = [] if grid.is_uniform else grid.levels.tolist()
    candidates: Any = grid.candidates()
    found: list[Any] = [
        _native.search_scales(x, candidates, levels, grid.has_zeros, shares, isa)
        for isa in _native.available_isas()
    ]
    for values in found:
        assert np.array_equal(values[0], found[0][0])
    assert np.mean(found[0][0] == scale) > 0.95

    def costs(scale: np.ndarray, zero: np.ndarray | None) -> np.ndarray:
        errors = np.square(grid.steps(x, scale, zero) * scale - x, dtype=np.float64)
        total: np.ndarray = (errors if shares is None else errors * shares).sum(axis=0)
        return total

    np.testing.assert_allclose(costs(*found[0]), costs(scale, zero), rtol=1e-5)
    other = None if shares is None else np.ones_like(shares)
    assert shares is None or (grid.search_natively(x, other)[0] != scale).any()
    assert (found[0][1] is None) == (zero is None)


def test_what_the_native_search_does_not_take_is_named() -> None:
    x, shares = np.ones((32, 5), np.float32), np.ones((32, 4), np.float32)
    with pytest.raises(ValueError, match="there are 3 levels; expected 16, or none"):
        _native.search_scales(x, [1.0], [1.0, 2.0, 3.0], False, None)
    with pytest.raises(ValueError, match="shares have another shape than x"):
        _native.search_scales(x, [1.0], [], False, shares)
    with pytest.raises(ValueError, match="x has no members"):
        _native.search_scales(x[:0], [1.0], [], False, None)
    with pytest.raises(ValueError, match='isa is "mmx"'):
        _native.search_scales(x, [1.0], [], False, None, "mmx")
