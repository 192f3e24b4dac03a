"""The reference's forward pass: causal, the same in any chunking, and with every field in use."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from reference_helpers import NativeModel, max_error, random_weights
from spec_helpers import SPECS

from octavo.models.layer import model_nodes, tap_names, weight_shapes
from octavo.reference import ops
from octavo.reference.llama import KVCache, ReferenceModel

TOKENS = np.array([(17 * i * i + 3) % 61 for i in range(29)])


def model(name: str, **options: object) -> ReferenceModel:
    spec = SPECS[name]
    return ReferenceModel(spec, random_weights(spec, 1), **options)  # type: ignore[arg-type]


class ReadWeights(dict[str, np.ndarray]):
    """Weights that note which of them are asked for."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        super().__init__(weights)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: object = None) -> object:
        self.read |= {name} & set(self)
        return super().get(name, default)


@pytest.mark.parametrize("name", SPECS)
def test_layer_py_lists_what_the_definition_and_the_native_core_compute(name: str) -> None:
    """models/layer.py's nodes against both layer loops: names, order, widths, data flow, weights.

    Of the data flow: whatever has an input comes behind it, and nothing but the logits is made for
    nobody.
    """
    nodes = model_nodes(SPECS[name])
    listed = [(node.tap, node.width) for node in nodes]
    reference, by_reference = model(name), dict[str, np.ndarray]()
    reference.weights = read = ReadWeights(reference.weights)
    reference.forward(TOKENS, taps=by_reference)
    by_native: dict[str, np.ndarray] = {}
    weights = random_weights(SPECS[name], 1)
    NativeModel(SPECS[name], weights, max_tokens=64).forward(TOKENS, by_native)
    for taps in (by_reference, by_native):
        assert [(tap, value.shape[1]) for tap, value in taps.items()] == listed
    assert read.read == set(weights)
    made: set[str] = set()
    for node in nodes:
        assert made.issuperset(node.inputs), node.tap
        made.add(node.tap)
    assert made - {tap for node in nodes for tap in node.inputs} == {"logits"}
    for node in nodes:
        if node.op == "linear":
            assert (node.width, node.inputs) == (node.matrix.outputs, node.inputs[:1])
            (source,) = (other for other in nodes if other.tap == node.inputs[0])
            assert node.matrix.inputs == source.width


@pytest.mark.parametrize("name", SPECS)
def test_taps_in_order_with_shapes(name: str) -> None:
    taps: dict[str, np.ndarray] = {}
    logits = model(name).forward(TOKENS, taps=taps)
    assert list(taps) == tap_names(SPECS[name])
    layer = SPECS[name].layers[0]
    widths = {"q": layer.q_size, "k_rope": layer.kv_size, "up": 37, "out": 22}
    widths["attn"] = layer.q_size
    for tap, value in taps.items():
        assert value.dtype == np.float32 and len(value) == len(TOKENS)
        assert np.isfinite(value).all() and value.std() > 0.01, tap
        assert value.shape[1] == widths.get(tap.split(".")[-1], value.shape[1])
    assert logits.shape == (29, 61) and np.array_equal(logits, taps["logits"])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kv_dtype", ["f32", "bf16"])
def test_whole_in_chunks_or_token_by_token(name: str, kv_dtype: str) -> None:
    reference = model(name, kv_dtype=kv_dtype, compute=np.float64)
    whole = reference.forward(TOKENS)
    for cuts in ([1], [28], [7, 14, 21], list(range(1, 29))):
        cache = KVCache()
        pieces = [reference.forward(piece, cache) for piece in np.split(TOKENS, cuts)]
        assert cache.length == 29 and cache.keys[0].shape[0] == 29
        # Not to the last bit: matrix products of other shapes add up in another order, and where
        # that straddles a rounding to bfloat16 the step is larger.
        tolerance = 1e-12 if kv_dtype == "f32" else 1e-3
        assert max_error(np.concatenate(pieces), whole) < tolerance


@pytest.mark.parametrize("name", SPECS)
def test_causal(name: str) -> None:
    reference = model(name)
    other = TOKENS.copy()
    other[20:] = (other[20:] + 1) % 61
    one, two = reference.forward(TOKENS), reference.forward(other)
    assert max_error(one[:20], two[:20]) < 1e-6
    assert (np.abs(one - two)[20:].max(axis=1) > 1e-3).all()


@pytest.mark.parametrize("name", SPECS)
def test_native_core_equals_the_reference(name: str) -> None:
    """Every tap of every kind of layer, in chunks on the native side."""
    spec, weights = SPECS[name], random_weights(SPECS[name], 1)
    expected: dict[str, np.ndarray] = {}
    model(name, compute=np.float64).forward(TOKENS, taps=expected)
    native, pieces = NativeModel(spec, weights, max_tokens=64), []
    for piece in np.split(TOKENS, [3, 4, 20]):
        pieces.append(dict[str, np.ndarray]())
        native.forward(piece, pieces[-1])
    assert list(pieces[0]) == tap_names(spec)
    for tap, value in expected.items():
        assert max_error(np.concatenate([taps[tap] for taps in pieces]), value) < 2e-5, tap

    rounded = {"dtype": "bf16", "kv_dtype": "bf16"}
    judge = model(name, compute=np.float64, **rounded).forward(TOKENS)
    own_rounding = max_error(judge, expected["logits"])
    logits = NativeModel(spec, weights, max_tokens=64, **rounded).forward(TOKENS)
    assert max_error(logits, judge) < 0.5 * own_rounding


def test_position_matters() -> None:
    for name in ("llama", "gpt2_like"):
        logits = model(name).forward(np.array([5, 9, 9, 9]))
        assert np.abs(logits[1] - logits[3]).max() > 1e-3


def test_window_hides_what_is_far() -> None:
    """Three layers of window 3 reach back 6 tokens and not one more."""
    spec = SPECS["llama"]
    spec = replace(spec, layers=tuple(replace(layer, window=3) for layer in spec.layers))
    reference = ReferenceModel(spec, random_weights(spec, 1), compute=np.float64)
    base = reference.forward(TOKENS)[-1]
    for back, matters in ((7, False), (6, True), (1, True)):
        other = TOKENS.copy()
        other[-1 - back] = (other[-1 - back] + 1) % 61
        assert (np.abs(reference.forward(other)[-1] - base).max() > 1e-6) == matters, back


# With experts rounding may send a token to another one.
@pytest.mark.parametrize("name", [name for name in SPECS if SPECS[name].layers[0].moe is None])
def test_float64_and_bf16(name: str) -> None:
    judge = model(name, compute=np.float64).forward(TOKENS)
    assert judge.dtype == np.float64
    assert 0 < max_error(model(name).forward(TOKENS), judge) < 2e-5
    rounded = model(name, dtype="bf16", kv_dtype="bf16").forward(TOKENS)
    assert 1e-3 < max_error(rounded, judge) < 0.3
    # The model rounds its matrices once for all; ops.linear's own rounding is the definition.
    assert np.array_equal(
        model(name, dtype="bf16")._linear("layers.0.q", judge[:, :22].astype(np.float32)),
        ops.linear(
            judge[:, :22].astype(np.float32),
            random_weights(SPECS[name], 1)["layers.0.q.weight"],
            random_weights(SPECS[name], 1).get("layers.0.q.bias"),
            "bf16",
        ),
    )


def test_kv_dtype_rounds_what_is_stored() -> None:
    reference, cache = model("llama", kv_dtype="bf16"), KVCache()
    taps: dict[str, np.ndarray] = {}
    reference.forward(TOKENS, cache, taps)
    stored = cache.keys[1].reshape(29, -1)
    assert np.array_equal(stored, ops.round_to_bf16(taps["layers.1.k_rope"]))
    assert not np.array_equal(stored, taps["layers.1.k_rope"])
    assert np.array_equal(cache.values[2].reshape(29, -1), ops.round_to_bf16(taps["layers.2.v"]))


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "int8"])
def test_attention_is_that_of_the_cache(kv_dtype: str) -> None:
    """Over a bf16 cache queries and weights are rounded, whatever the weights' dtype is."""
    reference, cache = model("llama", kv_dtype=kv_dtype), KVCache()
    taps: dict[str, np.ndarray] = {}
    reference.forward(TOKENS, cache, taps)
    for index, window in enumerate((0, 5, 0)):
        q = taps[f"layers.{index}.q_rope"].reshape(29, 6, 8)
        k, v = cache.keys[index], cache.values[index]
        by_dtype = {
            dtype: ops.attention(q, k, v, 8**-0.5, window, dtype).reshape(29, -1)
            for dtype in ("f32", "bf16")
        }
        seen = taps[f"layers.{index}.attn"]
        own = ops.attention_dtype(kv_dtype)
        assert np.array_equal(seen, by_dtype[own])
        assert max_error(by_dtype["f32"], by_dtype["bf16"]) > 1e-3


def test_logit_rows() -> None:
    reference, taps = model("tied"), {}  # type: ignore[var-annotated]
    some = reference.forward(TOKENS, taps=taps, logit_rows=[3, 28])
    assert max_error(some, reference.forward(TOKENS)[[3, 28]]) < 1e-6
    assert taps["final_norm"].shape == (2, 22) and taps["layers.2.out"].shape == (29, 22)


def test_every_weight_matters() -> None:
    for name in ("llama", "gpt2_like", "biases", "gemma2_like", "gemma3_like", "olmo2_like"):
        spec, weights = SPECS[name], random_weights(SPECS[name], 1)
        base = ReferenceModel(spec, weights).forward(TOKENS)
        for changed in weight_shapes(spec):
            # A bias of k moves every score of a query alike, and the softmax not at all, unless
            # rope turns it; one number of it does then.
            if changed.endswith(".k.bias") and spec.layers[0].rope is None:
                continue
            values = weights[changed].copy()
            values[(3,) * values.ndim] += 1
            other = ReferenceModel(spec, {**weights, changed: values}).forward(TOKENS)
            assert np.abs(other - base).max() > 1e-4, changed


@pytest.mark.parametrize("tokens", [[], [[1, 2]], [61], [-1], [1.5]])
def test_bad_tokens_are_refused(tokens: list[object]) -> None:
    with pytest.raises(ValueError, match="token_ids"):
        model("llama").forward(tokens)  # type: ignore[arg-type]


def test_bad_weights_are_refused_all_at_once() -> None:
    spec, weights = SPECS["llama"], random_weights(SPECS["llama"], 1)
    del weights["layers.1.q.weight"]
    weights["final_norm.weight"] = weights["final_norm.weight"][:-1]
    with pytest.raises(ValueError, match=r"layers\.1\.q\.weight is missing") as caught:
        ReferenceModel(spec, weights)
    assert "final_norm.weight has shape (21,), expected (22,)" in str(caught.value)
    with pytest.raises(ValueError, match="f16"):
        model("llama", dtype="f16")
