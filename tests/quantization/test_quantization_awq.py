"""AWQ: folding factors changes nothing in floats, and helps where inputs are uneven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from runtime_helpers import random_weights, tiny_spec

from octavo.models.layer import linear_nodes
from octavo.models.spec import ModelSpec, NormSpec, WeightFormat
from octavo.quantize import calibrate as module
from octavo.quantize.awq import find_factors, representable_factors, shared_rows
from octavo.quantize.calibrate import LayerByLayer
from octavo.quantize.gptq import errors_under, round_by_search
from octavo.reference.llama import ReferenceModel
from octavo.weights.checkpoint import Checkpoint
from octavo.weights.tensor import Tensor, TensorInfo, TensorSource, float32_to_bf16

FORMAT = WeightFormat("int4", 32)
SPECS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "biases and layer norm": {
        "norm": NormSpec("layer", 1e-5, bias=True),
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
    },
    "ungated": {"gated": False, "activation": "gelu", "window": 5, "attention_scale": 0.7},
    "no rope, one key head": {"rope": None, "num_kv_heads": 1},
}


class Arrays(TensorSource):
    """A source of float32 tensors."""

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        self._weights = weights
        self.infos = {n: TensorInfo("f32", w.shape, w.nbytes) for n, w in weights.items()}

    def read(self, name: str) -> Tensor:
        return Tensor(self._weights[name], "f32")


class NotRounded:
    """In place of `Rounded`, and of its parts: the matrix as it came, (inputs, outputs)."""

    def __init__(self, weight: np.ndarray, *_: Any) -> None:
        self._weight = weight

    def split(self, sizes: Sequence[int]) -> list[NotRounded]:
        return [NotRounded(w) for w in np.split(self._weight, np.cumsum(sizes)[:-1], axis=1)]

    def decode(self, format: WeightFormat) -> np.ndarray:
        return self._weight.T


def weights_of(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Random weights; channels of very different size, as real models have them."""
    weights = random_weights(spec, seed=5)
    generator = np.random.default_rng(6)
    for name, values in weights.items():
        if "norm.weight" in name:
            values *= np.exp(2 * generator.standard_normal(values.shape)).astype(np.float32)
            values[3] = 0  # a channel that is switched off
    return weights


def folded(
    spec: ModelSpec,
    weights: Mapping[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    method: str = "awq",
) -> tuple[LayerByLayer, dict[str, np.ndarray]]:
    """A calibration with the rounding left out, and the weights that it made."""
    for name in ("round_by_search", "gptq"):
        monkeypatch.setattr(module, name, NotRounded)
    checkpoint = Checkpoint(Arrays(weights))
    # The factors' search needs a group that divides; what it judges by is not what is tested.
    formats = {
        name: WeightFormat("int4", node.matrix.inputs) for name, node in linear_nodes(spec).items()
    }
    tokens = np.random.default_rng(1).integers(0, spec.vocab_size, (3, 19), np.int32)
    run = LayerByLayer(spec, checkpoint, formats, method, tokens)
    changed: dict[str, Any] = {}
    for index in range(len(spec.layers)):
        run.quantize_layer(index)
        changed |= {name: w for name, w in run.rough.weights.items() if w.ndim == 2}
    return run, {**weights, **changed, **run.vectors}


def logits(spec: ModelSpec, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    return ReferenceModel(spec, weights).forward(np.arange(23) * 7 % spec.vocab_size)


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
def test_folding_changes_no_output(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny_spec(**fields)
    weights = weights_of(spec)
    run, changed = folded(spec, weights, monkeypatch)
    expected = logits(spec, weights)
    assert np.allclose(logits(spec, changed), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    exact, rough = (stream.tap("layers.1.out") for stream in (run.exact, run.rough))
    assert np.allclose(rough, exact, rtol=0, atol=1e-4 * np.abs(exact).max())
    # Something was folded, out of every place that can take it.
    prefix = "layers.1."
    assert "layers.1.attn_norm.weight" in run.vectors and "layers.1.mlp_norm.weight" in run.vectors
    ratio = changed[prefix + "v.weight"] / np.where(
        weights[prefix + "v.weight"] == 0, 1, weights[prefix + "v.weight"]
    )
    assert ratio.std() > 0.01
    if fields.get("qkv_bias"):
        assert not np.allclose(changed[prefix + "v.bias"], weights[prefix + "v.bias"])
    # Planted: a norm that was left as it was.
    name = "layers.0.mlp_norm.weight"
    wrong = logits(spec, {**changed, name: weights[name]})
    assert np.abs(wrong - expected).max() > 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("fields", SPECS.values(), ids=SPECS)
def test_without_errors_there_is_nothing_to_make_up_for(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The targets are what the float model has, biases and residual stream included."""
    spec = tiny_spec(**fields)
    weights = weights_of(spec)
    _, changed = folded(spec, weights, monkeypatch, "gptq")
    for name, values in weights.items():
        assert np.allclose(changed[name], values, rtol=0, atol=1e-3 * np.abs(values).max()), name


def test_query_heads_that_share_values_share_factors() -> None:
    factors = np.arange(12, dtype=np.float32)  # 2 KV heads, 3 query heads each, of 2 dimensions
    assert shared_rows(factors, 3, 2).tolist() == [0, 1, 6, 7]
    generator = np.random.default_rng(0)
    x = generator.standard_normal((300, 96)) * np.exp(generator.standard_normal(96))
    hessian = (x.T @ x / 300).astype(np.float32)
    weight = generator.standard_normal((96, 41)).astype(np.float32)
    found = find_factors(hessian, [weight], [FORMAT], shared=3, head_dim=8)
    heads = found.reshape(4, 3, 8)
    assert np.array_equal(heads, np.repeat(heads[:, :1], 3, axis=1))
    assert found.std() > 0.1


@pytest.mark.parametrize("has_zeros", [False, True])
def test_factors_lower_the_error_of_uneven_inputs(has_zeros: bool) -> None:
    generator = np.random.default_rng(3)
    size = np.where(np.arange(128) % 17 == 0, 30.0, 1.0)  # a few inputs driven hard
    x = generator.standard_normal((400, 128)) * size
    hessian = (x.T @ x / 400).astype(np.float32)
    matrices = [generator.standard_normal((128, n)).astype(np.float32) for n in (33, 70)]
    format = WeightFormat("int4", 64, has_zeros=has_zeros)
    factors = find_factors(hessian, matrices, [format, format])
    assert factors[0] / factors[1] > 1.5

    def cost(scale: np.ndarray) -> float:
        total = 0.0
        for weight in matrices:
            driven = hessian / np.outer(scale, scale)
            values = round_by_search(weight * scale[:, None], driven, format).weights()
            total += float(errors_under(values / scale[:, None] - weight, hessian).sum())
        return total

    assert cost(factors) < 0.95 * cost(np.ones(128, np.float32))


def test_inputs_all_alike_take_no_factors() -> None:
    weight = np.random.default_rng(4).standard_normal((64, 20)).astype(np.float32)
    identity = np.eye(64, dtype=np.float32)
    assert np.array_equal(find_factors(identity, [weight], [FORMAT]), np.ones(64, np.float32))
    assert np.array_equal(find_factors(identity, [], []), np.ones(64, np.float32))
    assert np.array_equal(find_factors(0 * identity, [weight], [FORMAT]), np.ones(64, np.float32))


def test_divided_norms_are_bfloat16_numbers() -> None:
    generator = np.random.default_rng(5)
    vector = generator.standard_normal(50).astype(np.float32)
    vector[7] = 0
    wanted = np.exp(generator.standard_normal(50)).astype(np.float32)
    factors = representable_factors(wanted, vector)
    assert np.abs(factors / wanted - 1)[vector != 0].max() < 2**-8
    assert factors[7] == 1
    divided = vector / factors
    exact = (float32_to_bf16(divided).astype(np.uint32) << np.uint32(16)).view(np.float32)
    assert np.abs(divided - exact).max() < 1e-6
