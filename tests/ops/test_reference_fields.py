"""Fields that Llama does not use, against a second computation: plain NumPy, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from reference_helpers import max_error, random_weights, uniform
from spec_helpers import SPECS, make_spec

from octavo.models.layer import tap_names, weight_shapes
from octavo.models.spec import LayerSpec, ModelSpec, NormSpec
from octavo.reference import ops
from octavo.reference.llama import ReferenceModel

TOKENS = np.array([(17 * i * i + 3) % 61 for i in range(29)])
Weights = Mapping[str, np.ndarray]
# What is gated, without experts.
NAMES = [name for name, spec in SPECS.items() if spec.layers[0].gated and not spec.layers[0].moe]


class ByHand:
    """The logits and some taps of one sequence, as the papers write them; in float64.

    mistake: one that is made on purpose.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, mistake: str = "") -> None:
        self.spec, self.mistake = spec, mistake
        self.weights = {name: value.astype(np.float64) for name, value in weights.items()}
        self.keys: dict[int, list[np.ndarray]] = {i: [] for i in range(len(spec.layers))}
        self.values: dict[int, list[np.ndarray]] = {i: [] for i in range(len(spec.layers))}
        self.position = 0

    def forward(self, token: int) -> np.ndarray:
        spec, made = self.spec, self.mistake
        x = self.weights["embed.weight"][token]
        x = x if made == "embed_multiplier" else spec.embed_multiplier * x
        for index, layer in enumerate(spec.layers):
            halves = (("attn", self._attention), ("mlp", self._mlp))
            for part, sublayer in halves:
                name = f"layers.{index}."
                added = sublayer(index, layer, self._norm(f"{name}{part}_norm", layer.norm, x))
                if layer.output_norm is not None and made != "output_norm":
                    added = self._norm(f"{name}{part}_out_norm", layer.output_norm, added)
                if made == "residual_multiplier":
                    x = layer.residual_multiplier * x + added
                else:
                    x = x + layer.residual_multiplier * added
        x = self._norm("final_norm", spec.final_norm, x)
        head = "embed" if spec.tie_word_embeddings else "lm_head"
        logits = self.weights[f"{head}.weight"] @ x * spec.logits_multiplier
        cap = spec.logits_softcap
        self.position += 1
        return cap * np.tanh(logits / cap) if cap and made != "logits_softcap" else logits

    def _attention(self, index: int, layer: LayerSpec, x: np.ndarray) -> np.ndarray:
        name, width = f"layers.{index}.", layer.head_dim
        q, k, v = (self._linear(name + part, x) for part in "qkv")
        if layer.qk_norm != "none" and self.mistake != "qk_norm":
            q, k = (self._norm_heads(name, layer, part, y) for part, y in (("q", q), ("k", k)))
        heads = [self._turn(layer, y.reshape(-1, width)) for y in (q, k)]
        if self.mistake == "norm after rope" and layer.qk_norm != "none":
            heads = [
                self._norm_heads(name, layer, part, y.reshape(-1)).reshape(-1, width)
                for part, y in zip("qk", heads, strict=True)
            ]
        self.keys[index].append(heads[1])
        self.values[index].append(v.reshape(-1, width))
        out, group = [], layer.num_heads // layer.num_kv_heads
        first = max(0, self.position + 1 - layer.window) if layer.window else 0
        for head, query in enumerate(heads[0]):
            keys = [token[head // group] for token in self.keys[index][first:]]
            values = [token[head // group] for token in self.values[index][first:]]
            scores = np.array([query @ key for key in keys]) * layer.score_scale
            cap = layer.attention_softcap
            if cap and self.mistake != "attention_softcap":
                scores = cap * np.tanh(scores / cap)
            weights = np.exp(scores - scores.max())
            out.append(weights / weights.sum() @ np.array(values))
        return self._linear(name + "o", np.concatenate(out))

    def _norm_heads(self, name: str, layer: LayerSpec, part: str, x: np.ndarray) -> np.ndarray:
        weight = self.weights[f"{name}{part}_norm.weight"]
        each = (layer.qk_norm == "head") != (self.mistake == "head or row")
        parts = x.reshape(-1, layer.head_dim) if each else x[None]
        sizes = np.sqrt((parts**2).mean(axis=1, keepdims=True) + layer.norm.eps)
        normed = (parts / sizes).reshape(-1)
        return normed * np.resize(weight, len(normed))

    def _turn(self, layer: LayerSpec, heads: np.ndarray) -> np.ndarray:
        if layer.rope is None:
            return heads
        angles = np.float32(self.position) * np.array(layer.rope.frequencies, np.float32)
        half = len(angles)
        pairs = heads[:, :half] + 1j * heads[:, half : 2 * half]
        turned = pairs * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag, heads[:, 2 * half :]], axis=1)

    def _mlp(self, index: int, layer: LayerSpec, x: np.ndarray) -> np.ndarray:
        gate, up = (self._linear(f"layers.{index}.{part}", x) for part in ("gate", "up"))
        return self._linear(f"layers.{index}.down", ops.activate(gate, layer.activation) * up)

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.weights[f"{name}.weight"] @ x + self.weights.get(f"{name}.bias", 0)

    def _norm(self, name: str, norm: NormSpec, x: np.ndarray) -> np.ndarray:
        if norm.kind == "none":
            return x
        return x / np.sqrt((x**2).mean() + norm.eps) * self.weights[f"{name}.weight"]


def by_hand(spec: ModelSpec, mistake: str = "") -> np.ndarray:
    model = ByHand(spec, random_weights(spec, 1), mistake)
    return np.stack([model.forward(int(token)) for token in TOKENS])


@pytest.mark.parametrize("name", NAMES)
def test_the_definition_is_what_the_papers_write(name: str) -> None:
    spec = SPECS[name]
    logits = ReferenceModel(spec, random_weights(spec, 1), compute=np.float64).forward(TOKENS)
    # The reference's cosines are float32; nothing else is rounded on either side.
    assert max_error(logits, by_hand(spec)) < 1e-6


@pytest.mark.parametrize(
    ("name", "mistakes"),
    [
        ("head_norm", ["qk_norm", "head or row", "norm after rope"]),
        ("row_norm", ["qk_norm", "head or row", "norm after rope"]),
        ("output_norm", ["output_norm"]),
        ("softcap", ["attention_softcap"]),
        ("multipliers", ["embed_multiplier", "residual_multiplier"]),
        ("capped_logits", ["logits_softcap"]),
        ("gemma2_like", ["output_norm", "attention_softcap", "embed_multiplier"]),
        ("olmo2_like", ["output_norm", "qk_norm", "head or row"]),
    ],
)
def test_mistakes_are_found(name: str, mistakes: list[str]) -> None:
    spec = SPECS[name]
    right = ReferenceModel(spec, random_weights(spec, 1), compute=np.float64).forward(TOKENS)
    for mistake in mistakes:
        assert max_error(by_hand(spec, mistake), right) > 1e-3, mistake


def test_which_taps_the_fields_add() -> None:
    def added(**fields: Any) -> list[str]:
        plain = tap_names(make_spec())
        return [tap[9:] for tap in tap_names(make_spec(**fields)) if tap not in plain][:2]

    assert added(qk_norm="head") == added(qk_norm="row") == ["q_norm", "k_norm"]
    assert added(output_norm=NormSpec()) == ["attn_out_norm", "mlp_out_norm"]
    assert added(attention_softcap=3.0, residual_multiplier=0.5) == []
    shapes = weight_shapes(make_spec(qk_norm="head", output_norm=NormSpec()))
    assert shapes["layers.2.q_norm.weight"] == shapes["layers.2.k_norm.weight"] == (8,)
    assert shapes["layers.0.mlp_out_norm.weight"] == (22,)
    shapes = weight_shapes(make_spec(qk_norm="row"))
    assert shapes["layers.2.q_norm.weight"] == (48,)
    assert shapes["layers.2.k_norm.weight"] == (16,)
    bare = weight_shapes(make_spec(norm=NormSpec("none")))
    assert not [name for name in bare if "norm" in name]


def test_scale() -> None:
    x = uniform(3, 5, 7) * np.float32(30)
    assert np.array_equal(ops.scale(x, 1.0), x)
    assert np.array_equal(ops.scale(x, 0.5), x / 2)
    exact = x.astype(np.float64)
    capped = ops.scale(exact, 3.0, 7.0)
    np.testing.assert_allclose(capped, [[7 * np.tanh(3 * v / 7) for v in row] for row in exact])
    assert np.abs(capped).max() <= 7 and np.abs(capped).max() > 6.9
    assert np.allclose(ops.scale(x * 1e-5, 2.0, 50.0), x * 2e-5)  # small numbers stay
    assert ops.scale(np.float32([1e38, -1e38]), 3.0, 50.0).tolist() == [50, -50]


def test_norm_heads() -> None:
    x, weight = uniform(4, 3, 15), 1 + uniform(5, 5) * np.float32(0.5)
    expected = np.concatenate(
        [ops.norm(x[:, i : i + 5], weight, None, 1e-5) for i in (0, 5, 10)], axis=1
    )
    assert np.array_equal(ops.norm_heads(x, weight, None, 1e-5), expected)
    row = 1 + uniform(6, 15) * np.float32(0.5)
    assert np.array_equal(ops.norm_heads(x, row, None, 1e-5), ops.norm(x, row, None, 1e-5))


def test_no_norm() -> None:
    x = uniform(4, 3, 15)
    assert np.array_equal(ops.norm(x, None, None, 1e-5, "none"), x)
    total, normed = ops.add_norm(x, x * 3, None, None, 1e-5, "none")
    assert np.array_equal(total, x + x * 3) and np.array_equal(normed, total)
    for weight, kind in ((None, "rms"), (x[0], "none"), (x[0], "mean")):
        with pytest.raises(ValueError, match="norm kind"):
            ops.norm(x, weight, None, 1e-5, kind)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_softcap(dtype: str) -> None:
    """A cap far above every score changes nothing; one far below makes all weights alike."""
    q, k, v = uniform(1, 5, 4, 6) * 3, uniform(2, 9, 2, 6) * 3, uniform(3, 9, 2, 6)
    plain = ops.attention(q, k, v, 0.8, 0, dtype)
    assert max_error(ops.attention(q, k, v, 0.8, 0, dtype, softcap=1e4), plain) < 5e-3
    near = ops.attention(q, k, v, 0.8, 0, dtype, softcap=1e-4)
    means = [v[: 5 + i].mean(axis=0).repeat(2, axis=0) for i in range(5)]
    assert max_error(near, np.stack(means)) < (1e-3 if dtype == "f32" else 1e-2)
    assert max_error(ops.attention(q, k, v, 0.8, 0, dtype, softcap=2.0), plain) > 0.1
