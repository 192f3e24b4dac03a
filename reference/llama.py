"""The forward pass of a decoder-only transformer of the Llama family.

    x = embed(tokens)
    for each layer:
        x = x + o(attention(rope(q), rope(k), v))     where q, k, v = linear(norm(x))
        x = x + down(activation(gate(n)) * up(n))     where n = norm(x)
    logits = head(norm(x))

The model of Touvron et al. 2023 (arXiv 2302.13971). Every intermediate result has a name, the same
here, in the native core and in `octavo diff`: see `octavo.models.layer.tap_names`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from octavo.models.adapter import Adapter
from octavo.models.layer import weight_shapes
from octavo.models.spec import LayerSpec, ModelSpec, NormSpec, WeightFormat
from octavo.reference import ops
from octavo.reference.ops import Array, Float32, Integers
from octavo.reference.quantization import check_int4_activations, rounded_product

Taps = dict[str, Float32]
_DTYPES = ("f32", "bf16")
_KV_DTYPES = (*_DTYPES, "int8")


@dataclass
class KVCache:
    """The keys and values of every token so far, for every layer.

    keys, values: one array a layer, (length, num_kv_heads, head_dim); keys are rotated already.
    """

    keys: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)
    length: int = 0  # tokens in the cache, hence the position of the next one

    def extend(self, layer: int, keys: Array, values: Array) -> tuple[Array, Array]:
        """Append new tokens' keys and values to a layer; returns all of the layer's."""
        if layer == len(self.keys):
            self.keys.append(keys)
            self.values.append(values)
        else:
            self.keys[layer] = np.concatenate([self.keys[layer], keys])
            self.values[layer] = np.concatenate([self.values[layer], values])
        return self.keys[layer], self.values[layer]


class ReferenceModel:
    """A model to call with token ids.

    spec: what the model is. weights: float32 arrays with the names and shapes of
    `octavo.models.layer.weight_shapes`. dtype: "bf16" rounds the matrices and what is multiplied
    by them to bfloat16. kv_dtype: "bf16" and "int8" round keys and values when they are stored in
    the cache (`ops.to_cache`); with "bf16" attention too multiplies bfloat16 numbers.
    formats: the quantized matrices, by name without ".weight"; their weights are the numbers that
    the codes stand for (`octavo.reference.quantization.dequantize`), which are not rounded again,
    and what is multiplied by them is rounded to whole numbers (`rounded_product` there).
    int4_activations: "bf16" rounds what is multiplied by int4 to bfloat16 instead, as the CPU's
    instruction set amx does; all others, and int8 everywhere, are "whole".
    adapter: a LoRA adapter, which adds `ops.low_rank` to the products of its matrices, and to the
    rows of the embedding; its matrices are rounded as dtype says, however the model is quantized.
    compute: np.float32, or np.float64 to judge the rounding of other implementations.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, npt.NDArray[np.float32]],
        *,
        dtype: str = "f32",
        kv_dtype: str = "f32",
        formats: Mapping[str, WeightFormat] | None = None,
        int4_activations: str = "whole",
        adapter: Adapter | None = None,
        compute: type[np.float32] | type[np.float64] = np.float32,
    ) -> None:
        if dtype not in _DTYPES or kv_dtype not in _KV_DTYPES:
            raise ValueError(
                f"dtype is {dtype!r} and kv_dtype {kv_dtype!r}; "
                f"expected one of {_DTYPES} and one of {_KV_DTYPES}"
            )
        check_int4_activations(int4_activations)
        self.spec = spec
        self.int4_activations = int4_activations
        self.dtype = dtype
        self.kv_dtype = kv_dtype
        self.compute = compute
        self.formats: Mapping[str, WeightFormat] = dict(formats or {})
        self.adapter = {} if adapter is None else adapter.matrices
        self.weights = _checked_weights(spec, weights, dtype, self.formats)
        self.frequencies = [
            None if layer.rope is None else ops.rope_frequencies(layer.rope, layer.head_dim)
            for layer in spec.layers
        ]

    def forward(
        self,
        token_ids: Sequence[int] | Integers,
        cache: KVCache | None = None,
        taps: Taps | None = None,
        logit_rows: Sequence[int] | Integers | None = None,
    ) -> Float32:
        """Run the model over the next tokens of one sequence.

        token_ids: (rows,). cache: the tokens before these; it is extended. Without one, the
        tokens are a sequence's first. taps: filled with every intermediate result in order of
        execution, name -> float32 (rows, width). logit_rows: which rows' logits are wanted (the
        taps "final_norm" and "logits" have those rows too); None: all.
        Returns the logits, float32 (rows, vocab_size), or float64 if computing in that.
        """
        spec = self.spec
        tokens = self._checked_tokens(token_ids)
        cache = KVCache() if cache is None else cache
        taps = {} if taps is None else taps
        positions = np.arange(cache.length, cache.length + len(tokens))

        x = self._embed(tokens, positions)
        _tap(taps, "embed", x)
        for index, layer in enumerate(spec.layers):
            attn_out = self._attention(index, layer, x, positions, cache, taps)
            x = x + attn_out
            mlp_out = self._mlp(index, layer, x, taps)
            x = x + mlp_out
            _tap(taps, f"layers.{index}.out", x)
        cache.length += len(tokens)

        if logit_rows is not None:
            x = ops.take_rows(x, np.asarray(logit_rows))
        x = self._norm("final_norm", spec.final_norm, x)
        _tap(taps, "final_norm", x)
        logits = self._linear("lm_head", x)
        _tap(taps, "logits", logits)
        return logits

    def _embed(self, tokens: Integers, positions: Integers) -> Array:
        table = self.weights.get("positions.weight")
        x = ops.embed(self.weights["embed.weight"], tokens, table, positions)
        x = x.astype(self.compute)
        if part := self.adapter.get("embed"):
            x = x + ops.low_rank_rows(tokens, part, self.dtype)
        return x

    def _attention(
        self,
        index: int,
        layer: LayerSpec,
        x: Array,
        positions: Integers,
        cache: KVCache,
        taps: Taps,
    ) -> Array:
        """What layer `index`'s attention adds to the residual stream x; both (rows, width)."""
        name = f"layers.{index}."
        rows = len(x)
        normed = self._norm(name + "attn_norm", layer.norm, x)
        _tap(taps, name + "attn_norm", normed)

        q = self._linear(name + "q", normed).reshape(rows, layer.num_heads, layer.head_dim)
        k = self._linear(name + "k", normed).reshape(rows, layer.num_kv_heads, layer.head_dim)
        v = self._linear(name + "v", normed).reshape(rows, layer.num_kv_heads, layer.head_dim)
        for part, value in (("q", q), ("k", k), ("v", v)):
            _tap(taps, name + part, value)

        frequencies = self.frequencies[index]
        if frequencies is not None:
            q = ops.rope(q, positions, frequencies)
            k = ops.rope(k, positions, frequencies)
            _tap(taps, name + "q_rope", q)
            _tap(taps, name + "k_rope", k)

        # Attention reads keys and values in the cache's format, those of these tokens too: so a
        # prompt gives the same numbers whole, in chunks, or token by token.
        k, v = ops.to_cache(k, self.kv_dtype), ops.to_cache(v, self.kv_dtype)
        keys, values = cache.extend(index, k, v)
        scale, rounds = layer.score_scale, ops.attention_dtype(self.kv_dtype)
        out = ops.attention(q, keys, values, scale, layer.window, rounds)
        out = out.reshape(rows, layer.q_size)
        _tap(taps, name + "attn", out)
        attn_out = self._linear(name + "o", out)
        _tap(taps, name + "attn_out", attn_out)
        return attn_out

    def _mlp(self, index: int, layer: LayerSpec, x: Array, taps: Taps) -> Array:
        """What layer `index`'s MLP adds to the residual stream x; both (rows, width)."""
        name = f"layers.{index}."
        normed = self._norm(name + "mlp_norm", layer.norm, x)
        _tap(taps, name + "mlp_norm", normed)
        gate = None
        if layer.gated:
            gate = self._linear(name + "gate", normed)
            _tap(taps, name + "gate", gate)
        up = self._linear(name + "up", normed)
        _tap(taps, name + "up", up)
        activated = ops.gated_activation(gate, up, layer.activation)
        _tap(taps, name + "act", activated)
        mlp_out = self._linear(name + "down", activated)
        _tap(taps, name + "mlp_out", mlp_out)
        return mlp_out

    def _norm(self, name: str, norm: NormSpec, x: Array) -> Array:
        bias = self.weights[name + ".bias"] if norm.bias else None
        return ops.norm(x, self.weights[name + ".weight"], bias, norm.eps, norm.kind)

    def _linear(self, name: str, x: Array) -> Array:
        own = "embed" if name == "lm_head" and self.spec.tie_word_embeddings else name
        weight, bias = self.weights[own + ".weight"], self.weights.get(own + ".bias")
        out = self.multiply(own, x, weight, bias)
        if part := self.adapter.get(name):
            out = out + ops.low_rank(x, part, self.dtype)
        return out

    def multiply(self, name: str, x: Array, weight: Array, bias: Array | None) -> Array:
        """x times a weight; x is rounded as the format of the matrix `name` requires.

        As ops.linear(x, weight, bias, self.dtype), but for a weight that has been rounded already.
        """
        if name in self.formats:
            format, rounds = self.formats[name], self.int4_activations
            return rounded_product(x, weight, bias, format, int4_activations=rounds)
        return ops.linear(ops.round_to_bf16(x) if self.dtype == "bf16" else x, weight, bias)

    def _checked_tokens(self, token_ids: Sequence[int] | Integers) -> Integers:
        tokens = np.asarray(token_ids)
        if tokens.ndim != 1 or not len(tokens) or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"token_ids have shape {tokens.shape} and type {tokens.dtype}; "
                "expected at least one integer, in one dimension"
            )
        if tokens.min() < 0 or tokens.max() >= self.spec.vocab_size:
            raise ValueError(
                f"token_ids run from {tokens.min()} to {tokens.max()}; "
                f"expected 0 to {self.spec.vocab_size - 1}"
            )
        return tokens


def _tap(taps: Taps, name: str, value: Array) -> None:
    taps[name] = value.reshape(len(value), -1).astype(np.float32)


def _checked_weights(
    spec: ModelSpec,
    weights: Mapping[str, npt.NDArray[np.float32]],
    dtype: str,
    formats: Mapping[str, WeightFormat],
) -> dict[str, Float32]:
    """All the weights the spec needs, plain matrices (but not norm weights or biases) rounded."""
    problems = []
    checked: dict[str, Float32] = {}
    for name, shape in weight_shapes(spec).items():
        if name not in weights:
            problems.append(f"{name} is missing")
            continue
        weight = weights[name]
        if weight.shape != shape:
            problems.append(f"{name} has shape {weight.shape}, expected {shape}")
        is_plain_matrix = len(shape) == 2 and name.removesuffix(".weight") not in formats
        rounds = is_plain_matrix and dtype == "bf16"
        checked[name] = ops.round_to_bf16(weight) if rounds else weight
    if problems:
        raise ValueError("weights do not fit the model:\n  - " + "\n  - ".join(problems))
    return checked
