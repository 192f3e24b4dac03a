"""octavo diff names the usual mistakes of experts and their router."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from diff_helpers import compare, good_reference, random_weights, reference_with, small_spec

from octavo.diff.implementations import ReferenceImplementation
from octavo.models.spec import MoeSpec
from octavo.reference import ops
from octavo.reference.nodes import expert_output

EXPERTS = 5
Mix = Callable[..., Any]


def _flipped(x: Any, logits: Any, k: int, normalize: bool, outputs: int, expert: Mix) -> Any:
    return ops.mix_experts(x, logits, k, not normalize, outputs, expert)


def _one_fewer(x: Any, logits: Any, k: int, normalize: bool, outputs: int, expert: Mix) -> Any:
    return ops.mix_experts(x, logits, k - 1, normalize, outputs, expert)


def _rounded(x: Any, logits: Any, k: int, normalize: bool, outputs: int, expert: Mix) -> Any:
    return ops.mix_experts(x, ops.round_to_bf16(logits), k, normalize, outputs, expert)


def _unweighted(x: Any, logits: Any, k: int, normalize: bool, outputs: int, expert: Mix) -> Any:
    """Row by row, expert by expert."""
    chosen, _ = ops.route(logits, k, normalize)
    rows = [sum(expert(i, x[r : r + 1])[0] for i in own) for r, own in enumerate(chosen)]
    return np.array(rows)


def _smallest(x: Any, logits: Any, k: int, normalize: bool, outputs: int, expert: Mix) -> Any:
    return ops.mix_experts(x, -logits, k, normalize, outputs, expert)


def _shifted(x: Any, logits: Any, k: int, normalize: bool, outputs: int, expert: Mix) -> Any:
    return ops.mix_experts(
        x, logits, k, normalize, outputs, lambda index, some: expert((index + 1) % EXPERTS, some)
    )


def _gelu(x: Any, logits: Any, k: int, normalize: bool, outputs: int, expert: Any) -> Any:
    name, weights, _, multiply = expert.args
    other = partial(expert_output, name, weights, "gelu", multiply)
    return ops.mix_experts(x, logits, k, normalize, outputs, other)


def _swapped(x: Any, logits: Any, k: int, normalize: bool, outputs: int, expert: Any) -> Any:
    name, weights, activation, _ = expert.args

    def wrong(index: int, some: Any) -> Any:
        gate, up, down = (
            weights[f"{name}experts.{index}.{part}.weight"] for part in ("gate", "up", "down")
        )
        return ops.gated_activation(some @ up.T, some @ gate.T, activation) @ down.T

    return ops.mix_experts(x, logits, k, normalize, outputs, wrong)


MIXES = {
    "weights not normalized": (_flipped, "weights not normalized: their sum is not 1"),
    "one expert fewer": (_one_fewer, "1 experts a token, not 2"),
    "logits rounded": (_rounded, "the router's logits rounded to bfloat16"),
    "no weights": (_unweighted, "added without their weights"),
    "the smallest": (_smallest, "the experts of the smallest logits"),
    "off by one": (_shifted, "the expert after each chosen one"),
    "gelu": (_gelu, "gelu instead of silu in the experts"),
    "gate and up": (_swapped, "gate and up of every expert swapped"),
}


def run(normalize: bool = True, dtype: str = "f32", **changed: Any) -> Any:
    spec = small_spec(moe=MoeSpec(EXPERTS, 2, normalize))
    weights = random_weights(spec)
    options: dict[str, Any] = {"dtype": dtype, "kv_dtype": dtype}
    model = reference_with(**changed).ReferenceModel(spec, weights, **options)
    left = ReferenceImplementation(model, name="broken", is_definition=False)
    right = good_reference(spec, weights, **options)
    truth = good_reference(spec, right.model.weights) if dtype == "bf16" else None
    return compare(left, right, spec, weights, dtype=dtype, truth=truth, steps=0)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_nothing_is_found_where_nothing_is_wrong(dtype: str) -> None:
    assert run(dtype=dtype).ok


@pytest.mark.parametrize("mistake", MIXES)
def test_a_mistake_of_the_mixture_is_named(mistake: str) -> None:
    mix, words = MIXES[mistake]
    finding = run(mix_experts=mix).findings[0]
    assert (finding.tap, finding.op) == ("layers.0.mlp_out", "moe")
    assert words in finding.mistake


def test_weights_that_should_not_be_normalized() -> None:
    finding = run(normalize=False, mix_experts=_flipped).findings[0]
    assert finding.mistake.endswith("normalized, which they should not be")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_router_in_bf16_is_named(dtype: str) -> None:
    """Also where all other matrices are: the router's product is never rounded."""

    def rounding(x: Any, weight: Any, bias: Any = None, kind: str = "f32") -> Any:
        return ops.linear(x, weight, bias, "bf16" if len(weight) == EXPERTS else kind)

    finding = run(dtype=dtype, linear=rounding).findings[0]
    assert (finding.tap, finding.op) == ("layers.0.router", "linear")
    assert finding.mistake.endswith("rounded to bfloat16, as a router's never are")


def test_a_mistake_nobody_thought_of_is_not_named() -> None:
    def odd(*arguments: Any) -> Any:
        return ops.mix_experts(*arguments) * np.float32(1.01)

    finding = run(mix_experts=odd).findings[0]
    assert finding.tap == "layers.0.mlp_out" and finding.mistake is None
