"""Small random models, and reference models with one planted mistake each."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from octavo.diff.comparison import Comparison, DiffOptions
from octavo.diff.implementations import ReferenceImplementation
from octavo.models.layer import weight_shapes
from octavo.models.rope import default_rope
from octavo.models.spec import LayerSpec, ModelSpec, NormSpec
from octavo.reference import llama, ops
from octavo.weights.model_files import read_model

Weights = dict[str, np.ndarray]


def small_spec(
    num_layers: int = 3,
    num_heads: int = 6,
    num_kv_heads: int = 3,
    head_dim: int = 8,
    intermediate_size: int = 44,
    vocab_size: int = 101,
    tied: bool = False,
    **layer: Any,
) -> ModelSpec:
    """An odd-sized Llama; hidden size 36 differs from num_heads * head_dim."""
    norm = layer.pop("norm", NormSpec(eps=1e-5))
    return ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=36,
        max_position_embeddings=256,
        layers=tuple(
            LayerSpec(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                intermediate_size=intermediate_size,
                norm=norm,
                rope=layer.get("rope", default_rope(500.0, head_dim)),
                **{key: value for key, value in layer.items() if key != "rope"},
            )
            for _ in range(num_layers)
        ),
        final_norm=norm,
        tie_word_embeddings=tied,
    )


def random_weights(spec: ModelSpec, seed: int = 0) -> Weights:
    """float32 weights that keep activations of a size where every op matters."""
    generator = np.random.default_rng(seed)
    weights: Weights = {}
    for name, shape in weight_shapes(spec).items():
        values = generator.standard_normal(shape)
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * values
        elif name.endswith(".bias"):
            values = 0.1 * values
        elif name == "embed.weight":
            values = 0.3 * values
        else:
            values = values / np.sqrt(shape[1])
        weights[name] = values.astype(np.float32)
    return weights


def tokens_for(spec: ModelSpec, count: int, seed: int = 1) -> np.ndarray:
    """Random ids, int32 (count,)."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, spec.vocab_size, count).astype(np.int32)


def reference_with(**changed: Callable[..., Any]) -> ModuleType:
    """A second copy of octavo.reference.llama whose `ops` has some functions replaced."""
    loader = importlib.util.spec_from_file_location("broken_llama", llama.__file__)
    assert loader is not None and loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    sys.modules["broken_llama"] = module  # dataclasses look their module up
    try:
        loader.loader.exec_module(module)
    finally:
        del sys.modules["broken_llama"]
    module.ops = SimpleNamespace(**{**vars(ops), **changed})  # type: ignore[attr-defined]
    return module


def rope_halves_swapped(x: Any, positions: Any, frequencies: Any, factor: float = 1.0) -> Any:
    return ops.rope(x, positions, -frequencies, factor)


def _rope_neighbours(x: Any, positions: Any, frequencies: Any, factor: float = 1.0) -> Any:
    half = x.shape[-1] // 2
    halves = np.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)
    turned = ops.rope(halves, positions, frequencies, factor)
    return np.stack([turned[..., :half], turned[..., half:]], axis=-1).reshape(x.shape)


def _eps_outside(x: Any, weight: Any, bias: Any, eps: float, kind: str = "rms") -> Any:
    return x / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + x.dtype.type(eps)) * weight


def _no_scale(q: Any, k: Any, v: Any, scale: float, *rest: Any) -> Any:
    return ops.attention(q, k, v, 1.0, *rest)


def _wrong_groups(q: Any, k: Any, v: Any, scale: float, *rest: Any) -> Any:
    order = np.arange(q.shape[1]) % k.shape[1]
    return ops.attention(q, k[:, order], v[:, order], scale, *rest)


def _mask_off_by_one(q: Any, k: Any, v: Any, scale: float, *rest: Any) -> Any:
    """Each token is blind to itself (the first sees itself, or it would see nothing)."""
    out = ops.attention(q, k, v, scale, *rest)
    context, rows = len(k), len(q)
    for row in range(rows):
        last = context - rows + row
        if last:
            out[row] = ops.attention(q[row : row + 1], k[:last], v[:last], scale, *rest)[0]
    return out


def attention_weighing(
    weigh: Callable[[Any], tuple[Any, Any]], round_queries: bool = True
) -> Callable[..., Any]:
    """Attention, loop by loop, whose weights and their sum are made by `weigh`.

    weigh: float32 (visible keys,) scores in powers of two -> (weights to multiply, their sum).
    """

    def attention(
        q: Any,
        k: Any,
        v: Any,
        scale: float,
        window: int = 0,
        dtype: str = "f32",
        softcap: float = 0,
    ) -> Any:
        out, group = np.empty_like(q), q.shape[1] // k.shape[1]
        queries = ops.round_to_bf16(q) if round_queries else q
        for row, head in np.ndindex(q.shape[:2]):
            last = len(k) - len(q) + row + 1
            seen = slice(max(0, last - window) if window else 0, last)
            keys, values = k[seen, head // group], v[seen, head // group]
            powers = keys @ queries[row, head] * np.float32(scale * np.log2(np.e))
            weights, total = weigh(powers)
            out[row, head] = weights @ values / total
        return out

    return attention


def whole_weights(powers: Any) -> Any:
    """2^(s - N), N the greatest score made whole."""
    return np.exp2(powers - np.ceil(powers.max()))


def rounded_weights(powers: Any) -> Any:
    """(weights, sum) as the definition has them over a bf16 cache."""
    weights = whole_weights(powers)
    return ops.round_to_bf16(weights), weights.sum()


def gate_up_swapped(gate: Any, up: Any, activation: str) -> Any:
    return ops.gated_activation(up, gate, activation)


def _k_and_v_swapped(layer: LayerSpec, weights: Weights, name: str) -> Any:
    return ("k", weights[name + "v.weight"]), ("v", weights[name + "k.weight"])


def _rows_of_heads(layer: LayerSpec, weights: Weights, name: str, order: Any) -> Any:
    """q and k with the rows of each head in another order."""
    for part in ("q", "k"):
        weight = weights[f"{name}{part}.weight"]
        heads = weight.reshape(-1, layer.head_dim, weight.shape[1])
        yield part, heads[:, order].reshape(weight.shape)


def _rows_in_pairs(layer: LayerSpec, weights: Weights, name: str) -> Any:
    """Rows i and i + head_dim/2 of each head side by side, as in GGUF files."""
    order = np.arange(layer.head_dim).reshape(2, -1).T.ravel()
    return _rows_of_heads(layer, weights, name, order)


def _pairs_undone_twice(layer: LayerSpec, weights: Weights, name: str) -> Any:
    order = np.arange(layer.head_dim).reshape(-1, 2).T.ravel()
    return _rows_of_heads(layer, weights, name, order)


_WEIGHT_MISTAKES: dict[str, Callable[[LayerSpec, Weights, str], Any]] = {
    "k and v swapped": _k_and_v_swapped,
    "rows in pairs": _rows_in_pairs,
    "pairs undone twice": _pairs_undone_twice,
}


def broken_model(mistake: str, spec: ModelSpec, weights: Weights, **options: Any) -> Any:
    """A ReferenceModel with the named mistake (see MISTAKES)."""
    if mistake in _OP_MISTAKES:
        return reference_with(**_OP_MISTAKES[mistake]).ReferenceModel(spec, weights, **options)
    if mistake in _WEIGHT_MISTAKES:
        changed = dict(weights)
        for index, layer in enumerate(spec.layers):
            for part, weight in _WEIGHT_MISTAKES[mistake](layer, weights, f"layers.{index}."):
                changed[f"layers.{index}.{part}.weight"] = weight
        return llama.ReferenceModel(spec, changed, **options)
    return _ResidualDropped(spec, weights, **options)


class _ResidualDropped(llama.ReferenceModel):
    """From layer 1 on, a layer's output is the MLP's alone."""

    def forward(
        self, token_ids: Any, cache: Any = None, taps: Any = None, logit_rows: Any = None
    ) -> Any:
        taps = {} if taps is None else taps
        cache = llama.KVCache() if cache is None else cache
        positions = np.arange(cache.length, cache.length + len(token_ids))
        x = self._embed(np.asarray(token_ids), positions)
        llama._tap(taps, "embed", x)
        for index, layer in enumerate(self.spec.layers):
            middle = x + self._attention(index, layer, x, positions, cache, taps)
            mlp_out = self._mlp(index, layer, middle, taps)
            x = mlp_out if index == 1 else middle + mlp_out
            llama._tap(taps, f"layers.{index}.out", x)
        cache.length += len(token_ids)
        if logit_rows is not None:
            x = x[np.asarray(logit_rows)]
        x = self._norm("final_norm", self.spec.final_norm, x)
        llama._tap(taps, "final_norm", x)
        logits = self._linear("embed" if self.spec.tie_word_embeddings else "lm_head", x)
        llama._tap(taps, "logits", logits)
        return logits


_OP_MISTAKES: dict[str, dict[str, Callable[..., Any]]] = {
    "rope halves swapped": {"rope": rope_halves_swapped},
    "rope of neighbours": {"rope": _rope_neighbours},
    "epsilon outside": {"norm": _eps_outside},
    "no scale": {"attention": _no_scale},
    "wrong groups": {"attention": _wrong_groups},
    "blind to itself": {"attention": _mask_off_by_one},
    "gate and up swapped": {"gated_activation": gate_up_swapped},
}

# mistake -> (the tap diff must name, the op, words that its recognized mistake must hold or None)
MISTAKES: dict[str, tuple[str, str, str | None]] = {
    "rope halves swapped": ("layers.0.q_rope", "rope_and_store", "halves swapped"),
    "rope of neighbours": ("layers.0.q_rope", "rope_and_store", "neighbours paired"),
    "epsilon outside": ("layers.0.attn_norm", "norm", "outside the square root"),
    "no scale": ("layers.0.attn", "attention", "no scale"),
    "wrong groups": ("layers.0.attn", "attention", "h % num_kv_heads"),
    "blind to itself": ("layers.0.attn", "attention", None),
    "gate and up swapped": ("layers.0.act", "gated_activation", "gate and up swapped"),
    "k and v swapped": ("layers.0.k", "linear", "the weight of v"),
    "rows in pairs": ("layers.0.q", "linear", "not undone"),
    "pairs undone twice": ("layers.0.q", "linear", "undone where there was none"),
    "residual dropped": ("layers.1.out", "add_norm", "without the residual and attn_out"),
}


def good_reference(spec: ModelSpec, weights: Weights, **options: Any) -> ReferenceImplementation:
    return ReferenceImplementation(llama.ReferenceModel(spec, weights, **options))


def broken_reference(
    mistake: str, spec: ModelSpec, weights: Weights, **options: Any
) -> ReferenceImplementation:
    model = broken_model(mistake, spec, weights, **options)
    return ReferenceImplementation(model, name="broken", is_definition=False)


def compare(left: Any, right: Any, spec: ModelSpec, weights: Weights, **options: Any) -> Any:
    """Run a comparison; keyword arguments: count, dtype, truth, and those of DiffOptions."""
    count = options.pop("count", 23)
    dtype = options.pop("dtype", "f32")
    truth = options.pop("truth", None)
    definition = llama.ReferenceModel(spec, weights, dtype=dtype, kv_dtype=dtype)
    settings = DiffOptions(**{"steps": 5, "decode_rows": 6, **options})
    run = Comparison(left, right, definition, tokens_for(spec, count), settings, truth)
    return run.run("a small model", judged=truth is not None)


# ---- models on disk, for the native core, the command and Hugging Face ----

SMALL_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_model(path: Path, seed: int = 0, **changed: Any) -> Path:
    """A Hugging Face directory with a small random model, float32; no tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**SMALL_CONFIG, **changed}))
    files = read_model(path)
    weights = random_weights(files.spec, seed)
    save_file(
        {files.weight_map[name].tensor: value for name, value in weights.items()},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    return path
