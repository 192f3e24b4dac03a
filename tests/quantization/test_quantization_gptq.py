"""GPTQ on small matrices: better than rounding where inputs differ, the same where they do not."""

from __future__ import annotations

import numpy as np
import pytest

from octavo.errors import WeightsError
from octavo.models.spec import WeightFormat
from octavo.quantization.grid import Grid
from octavo.quantize import gptq as module
from octavo.quantize.gptq import (
    Rounded,
    errors_under,
    gptq,
    inverse_factor,
    order_inputs,
    round_by_search,
)
from octavo.reference import quantization as definition

CURVED = tuple(float(level) for level in (-127, -91, -67, -49, -35, -23, -13, -4)) + tuple(
    float(level) for level in (4, 13, 23, 35, 49, 67, 91, 127)
)
FORMATS = [
    WeightFormat("int4", 32),
    WeightFormat("int4", 96, has_zeros=True),
    WeightFormat("int4", 64),
    WeightFormat("int4", 32, levels=CURVED),
]
INPUTS, OUTPUTS = 192, 37


def problem(seed: int = 0, tokens: int = 700) -> tuple[np.ndarray, np.ndarray]:
    """A matrix (inputs, outputs), and H of inputs that are correlated and of uneven size."""
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((24, INPUTS)) * 0.7
    x = generator.standard_normal((tokens, 24)) @ mixing
    x += generator.standard_normal((tokens, INPUTS))
    x *= np.exp(generator.standard_normal(INPUTS))
    weight = generator.standard_normal((INPUTS, OUTPUTS)) + 0.2
    return weight.astype(np.float32), (x.T @ x / tokens).astype(np.float32)


def cost(rounded: Rounded, weight: np.ndarray, hessian: np.ndarray) -> float:
    return float(errors_under(rounded.weights() - weight, hessian).sum())


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_outputs_err_less_than_by_rounding(format: WeightFormat, seed: int) -> None:
    weight, hessian = problem(seed)
    got = cost(gptq(weight, hessian, format), weight, hessian)
    rounded = round_by_search(weight, hessian, format)
    assert got < 0.6 * cost(rounded, weight, hessian)
    plain = round_by_search(weight, np.eye(INPUTS, dtype=np.float32), format)
    assert cost(rounded, weight, hessian) < cost(plain, weight, hessian)


def test_a_wrong_compensation_is_worse_than_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: later inputs are moved the wrong way."""
    weight, hessian = problem()
    format = FORMATS[0]
    factor = module._factor

    def turned(hessian: np.ndarray) -> np.ndarray:
        upper = factor(hessian)
        return 2 * np.diag(np.diag(upper)) - upper

    monkeypatch.setattr(module, "_factor", turned)
    wrong = cost(gptq(weight, hessian, format), weight, hessian)
    assert wrong > cost(round_by_search(weight, hessian, format), weight, hessian)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_with_inputs_all_alike_it_is_rounding(format: WeightFormat) -> None:
    weight, _ = problem(2)
    identity = np.eye(INPUTS, dtype=np.float32)
    got = gptq(weight, identity, format)
    grid, size = Grid(format), format.group_size
    for group, scale in enumerate(got.scales):
        zero = None if got.zeros is None else got.zeros[group]
        band = slice(group * size, (group + 1) * size)
        assert np.array_equal(got.steps[band], grid.steps(weight[band], scale, zero))
    rounded = round_by_search(weight, identity, format)
    assert cost(got, weight, identity) == pytest.approx(cost(rounded, weight, identity), rel=1e-5)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_codes_stand_for_its_weights(format: WeightFormat) -> None:
    weight, hessian = problem(3)
    rounded = gptq(weight, hessian, format)
    parts = rounded.split([5, OUTPUTS - 5])
    for matrix, part in zip(parts, (slice(0, 5), slice(5, OUTPUTS)), strict=True):
        assert np.array_equal(matrix.decode(format), rounded.weights()[:, part].T)
    assert len(np.unique(definition.unpack_int4(parts[0].codes))) == 16
    bits = rounded.scales.view(np.uint32)
    assert not (bits & np.uint32(0xFFFF)).any()  # bfloat16 numbers, as directories store them


@pytest.mark.parametrize("size", [1, 5, 64, 65, 130, 203])
def test_the_factor_of_the_inverse(size: int) -> None:
    x = np.random.default_rng(size).standard_normal((size + 30, size))
    hessian = x.T @ x
    upper = inverse_factor(hessian)
    assert np.array_equal(upper, np.triu(upper))
    assert np.allclose(upper.T @ upper @ hessian, np.eye(size), atol=1e-8)


def test_groups_stay_together_in_the_order() -> None:
    driven = np.array([1, 9, 2, 3, 20, 0, 5, 5, 7.5, 1, 1, 1])
    order = order_inputs(driven, 4)
    assert order.tolist() == [4, 6, 7, 5, 1, 3, 2, 0, 8, 9, 10, 11]


def test_inputs_that_are_never_driven_and_too_few_tokens() -> None:
    weight, _ = problem(4)
    x = np.random.default_rng(5).standard_normal((7, INPUTS)).astype(np.float32)
    x[:, 40:70] = 0
    hessian = x.T @ x
    rounded = gptq(weight, hessian, FORMATS[0])
    assert np.isfinite(rounded.weights()).all()
    # What no input drives is rounded like the rest, not thrown away.
    assert np.abs(rounded.weights() - weight)[40:70].mean() < 0.1
    still = gptq(weight, np.zeros_like(hessian), FORMATS[0])
    assert np.abs(still.weights() - weight).max() < 0.5


def test_uneven_sums_are_damped_until_they_can_be_factored() -> None:
    weight, hessian = problem(6)
    uneven = hessian - np.float32(0.02) * np.diag(hessian).mean() * np.eye(INPUTS, dtype=np.float32)
    uneven -= np.float32(np.linalg.eigvalsh(uneven)[0] + 0.02 * np.diag(hessian).mean()) * np.eye(
        INPUTS, dtype=np.float32
    )
    assert np.linalg.eigvalsh(uneven)[0] < -0.01 * np.diag(uneven).mean()
    assert np.isfinite(gptq(weight, uneven, FORMATS[0]).weights()).all()


def test_activations_that_are_no_numbers() -> None:
    weight, hessian = problem(7)
    hessian[3, 5] = np.nan
    with pytest.raises(WeightsError, match="NaN or infinity"):
        gptq(weight, hessian, FORMATS[0])
