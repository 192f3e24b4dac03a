"""octavo diff names a field of a layer or of a model that one of the two leaves out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from diff_helpers import (
    compare,
    good_reference,
    random_weights,
    reference_with,
    small_spec,
)

from octavo.diff.implementations import ReferenceImplementation
from octavo.models.rope import default_rope
from octavo.models.spec import ModelSpec, NormSpec
from octavo.reference import ops
from octavo.reference.llama import ReferenceModel

FACTORS = {"embed_multiplier": 2.5, "logits_multiplier": 0.4, "logits_softcap": 0.9}
FIELDS: dict[str, Any] = {
    "attention_softcap": 0.5,
    "residual_multiplier": 0.4,
    "output_norm": NormSpec(),
    "qk_norm": "head",
}
SPEC = replace(small_spec(**FIELDS), **FACTORS)
BARE = replace(
    small_spec(norm=NormSpec("none"), output_norm=NormSpec(), qk_norm="row"), final_norm=NormSpec()
)


def without(field: str) -> ModelSpec:
    if field in FACTORS:
        return replace(SPEC, **{field: 0.0 if "cap" in field else 1.0})
    value = 0.0 if "cap" in field else 1.0
    return replace(SPEC, layers=tuple(replace(each, **{field: value}) for each in SPEC.layers))


@pytest.mark.parametrize("spec", [SPEC, BARE], ids=["all fields", "no norm before"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_nothing_is_found_where_nothing_is_wrong(spec: ModelSpec, dtype: str) -> None:
    options: dict[str, Any] = {"dtype": dtype, "kv_dtype": dtype}
    weights = random_weights(spec)
    left, right = (good_reference(spec, weights, **options) for _ in range(2))
    truth = good_reference(spec, left.model.weights) if dtype == "bf16" else None
    result = compare(left, right, spec, weights, dtype=dtype, truth=truth, chunk_size=9)
    assert result.ok and not result.missing, result.findings
    own = [tap.own[0] for tap in result.taps]
    assert None in own or max(own) == 0, own


@pytest.mark.parametrize(
    ("field", "tap"),
    [
        ("embed_multiplier", "embed"),
        ("attention_softcap", "layers.0.attn"),
        ("residual_multiplier", "layers.0.mlp_norm"),
        ("logits_multiplier", "logits"),
        ("logits_softcap", "logits"),
    ],
)
def test_a_field_left_out_is_named(field: str, tap: str) -> None:
    weights = random_weights(SPEC)
    model = ReferenceModel(without(field), weights)
    left = ReferenceImplementation(model, name="broken", is_definition=False)
    result = compare(left, good_reference(SPEC, weights), SPEC, weights, steps=0)
    first = result.findings[0]
    assert (first.tap, first.mistake) == (tap, f"{field} left out")


def _all_heads(x: Any, weight: Any, bias: Any, eps: float, kind: str = "rms") -> Any:
    return ops.norm(x, np.resize(weight, x.shape[1]), bias, eps, kind)


def _each_head(x: Any, weight: Any, bias: Any, eps: float, kind: str = "rms") -> Any:
    width = SPEC.layers[0].head_dim
    return ops.norm_heads(x, np.ones(width, np.float32), None, eps) * weight


@pytest.mark.parametrize(
    ("spec", "wrong", "sentence"),
    [
        (SPEC, _all_heads, "all heads normalized together"),
        (BARE, _each_head, "each head normalized by itself"),
    ],
)
def test_which_heads_are_normalized_together(spec: ModelSpec, wrong: Any, sentence: str) -> None:
    weights = random_weights(spec)
    model = reference_with(norm_heads=wrong).ReferenceModel(spec, weights)
    left = ReferenceImplementation(model, name="broken", is_definition=False)
    result = compare(left, good_reference(spec, weights), spec, weights, steps=0)
    first = result.findings[0]
    assert (first.op, first.tap, first.mistake) == ("norm_heads", "layers.0.q_norm", sentence)


def test_half_of_each_head_rotated() -> None:
    spec = small_spec(rope=default_rope(100.0, 4))
    weights = random_weights(spec)
    result = compare(good_reference(spec, weights), good_reference(spec, weights), spec, weights)
    assert result.ok, result.findings
