"""The forward pass of a decoder-only transformer of the Llama family.

    x = embed(tokens)
    for each layer:
        x = x + o(attention(rope(q), rope(k), v))     where q, k, v = linear(norm(x))
        x = x + down(activation(gate(n)) * up(n))     where n = norm(x)
    logits = head(norm(x))

The model of Touvron et al. 2023 (arXiv 2302.13971). A `LayerSpec` or `ModelSpec` may ask for more:
q and k normalized before rope, what a sublayer adds normalized or multiplied, capped scores and
logits. Every intermediate result has a name, the same here, in the native core and in
`octavo diff`: see `octavo.models.layer.tap_names`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from octavo.models.adapter import Adapter, LowRank
from octavo.models.layer import Node, weight_shapes
from octavo.models.spec import LayerSpec, ModelSpec, MoeSpec, NormSpec, WeightFormat
from octavo.reference import ops
from octavo.reference.nodes import expert_output
from octavo.reference.ops import Array, Float32, Integers
from octavo.reference.quantization import check_grouped_activations, rounded_product

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
    is_long: bool = False  # whether the keys are those of a sequence beyond `rope_switch`

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
    grouped_activations: "bf16" rounds what meets weights in groups to bfloat16 instead, as the
    CPU's instruction set amx does; all others are "whole".
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
        grouped_activations: str = "whole",
        adapter: Adapter | None = None,
        compute: type[np.float32] | type[np.float64] = np.float32,
    ) -> None:
        if dtype not in _DTYPES or kv_dtype not in _KV_DTYPES:
            raise ValueError(
                f"dtype is {dtype!r} and kv_dtype {kv_dtype!r}; "
                f"expected one of {_DTYPES} and one of {_KV_DTYPES}"
            )
        check_grouped_activations(grouped_activations)
        self.spec = spec
        self.grouped_activations = grouped_activations
        self.dtype = dtype
        self.kv_dtype = kv_dtype
        self.compute = compute
        self.formats: Mapping[str, WeightFormat] = dict(formats or {})
        self.adapter: Mapping[str, LowRank] = {} if adapter is None else adapter.matrices
        self.weights = _checked_weights(spec, weights, dtype, self.formats)
        self.frequencies = [
            None if layer.rope is None else np.array(layer.rope.frequencies, np.float32)
            for layer in spec.layers
        ]
        self.long_frequencies = [
            np.array(layer.rope.long_frequencies, np.float32)
            if layer.rope is not None and layer.rope.long_frequencies
            else short
            for layer, short in zip(spec.layers, self.frequencies, strict=True)
        ]

    def forward(
        self,
        token_ids: Sequence[int] | Integers,
        cache: KVCache | None = None,
        taps: Taps | None = None,
        logit_rows: Sequence[int] | Integers | None = None,
        sequence_length: int = 0,
    ) -> Float32:
        """Run the model over the next tokens of one sequence.

        token_ids: (rows,). cache: the tokens before these; it is extended. Without one, the
        tokens are a sequence's first. taps: filled with every intermediate result in order of
        execution, name -> float32 (rows, width). logit_rows: which rows' logits are wanted (the
        taps "final_norm" and "logits" have those rows too); None: all. sequence_length: of the
        whole sequence, where more tokens follow; it decides on LongRoPE's frequencies. A sequence
        that outgrows `rope_switch` with a cache is a ValueError: all of its keys would change.
        Returns the logits, float32 (rows, vocab_size), or float64 if computing in that.
        """
        spec = self.spec
        tokens = self._checked_tokens(token_ids)
        cache = KVCache() if cache is None else cache
        taps = {} if taps is None else taps
        positions = np.arange(cache.length, cache.length + len(tokens))
        is_long = 0 < spec.rope_switch < max(cache.length + len(tokens), sequence_length)
        if cache.length and is_long != cache.is_long:
            raise ValueError(
                f"the cache holds keys of a sequence of at most {spec.rope_switch} tokens, and "
                f"this one has more: compute it anew, with an empty cache"
            )
        cache.is_long = is_long

        x = self._embed(tokens, positions)
        _tap(taps, "embed", x)
        for index, layer in enumerate(spec.layers):
            attn_out = self._attention(index, layer, x, positions, cache, taps)
            x = x + ops.scale(attn_out, layer.residual_multiplier)
            mlp_out = self._mlp(index, layer, x, taps)
            x = x + ops.scale(mlp_out, layer.residual_multiplier)
            _tap(taps, f"layers.{index}.out", x)
        cache.length += len(tokens)

        if logit_rows is not None:
            x = ops.take_rows(x, np.asarray(logit_rows))
        x = self._norm("final_norm", spec.final_norm, x)
        _tap(taps, "final_norm", x)
        logits = self._linear("lm_head", x)
        logits = ops.scale(logits, spec.logits_multiplier, spec.logits_softcap)
        _tap(taps, "logits", logits)
        return logits

    def _embed(self, tokens: Integers, positions: Integers) -> Array:
        table = self.weights.get("positions.weight")
        x = ops.embed(self.weights["embed.weight"], tokens, table, positions)
        x = x.astype(self.compute)
        if part := self.adapter.get("embed"):
            x = x + ops.low_rank_rows(tokens, part, self.dtype)
        return ops.scale(x, self.spec.embed_multiplier)

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

        q, k, v = (self._linear(name + part, normed) for part in "qkv")
        for part, value in (("q", q), ("k", k), ("v", v)):
            _tap(taps, name + part, value)
        if layer.qk_norm != "none":
            q = self._norm_heads(name + "q_norm", layer.qk_norm_spec, q)
            k = self._norm_heads(name + "k_norm", layer.qk_norm_spec, k)
            _tap(taps, name + "q_norm", q)
            _tap(taps, name + "k_norm", k)
        q, k, v = (x.reshape(rows, -1, layer.head_dim) for x in (q, k, v))

        if layer.rope is not None:
            by_layer = self.long_frequencies if cache.is_long else self.frequencies
            frequencies, factor = by_layer[index], layer.rope.attention_factor
            q = ops.rope(q, positions, frequencies, factor)
            k = ops.rope(k, positions, frequencies, factor)
            _tap(taps, name + "q_rope", q)
            _tap(taps, name + "k_rope", k)

        # Attention reads keys and values in the cache's format, those of these tokens too: so a
        # prompt gives the same numbers whole, in chunks, or token by token.
        k, v = ops.to_cache(k, self.kv_dtype), ops.to_cache(v, self.kv_dtype)
        keys, values = cache.extend(index, k, v)
        scale, rounds = layer.score_scale, ops.attention_dtype(self.kv_dtype)
        cap = layer.attention_softcap
        out = ops.attention(q, keys, values, scale, layer.window, rounds, cap)
        out = out.reshape(rows, layer.q_size)
        _tap(taps, name + "attn", out)
        return self._sublayer_output(layer, name + "attn_out", self._linear(name + "o", out), taps)

    def _mlp(self, index: int, layer: LayerSpec, x: Array, taps: Taps) -> Array:
        """What layer `index`'s MLP adds to the residual stream x; both (rows, width)."""
        name = f"layers.{index}."
        normed = self._norm(name + "mlp_norm", layer.norm, x)
        _tap(taps, name + "mlp_norm", normed)
        if layer.moe is not None:
            mlp_out = self._experts(name, layer, layer.moe, normed, taps)
            return self._sublayer_output(layer, name + "mlp_out", mlp_out, taps)
        gate = None
        if layer.gated:
            gate = self._linear(name + "gate", normed)
            _tap(taps, name + "gate", gate)
        up = self._linear(name + "up", normed)
        _tap(taps, name + "up", up)
        activated = ops.gated_activation(gate, up, layer.activation)
        _tap(taps, name + "act", activated)
        mlp_out = self._linear(name + "down", activated)
        return self._sublayer_output(layer, name + "mlp_out", mlp_out, taps)

    def _sublayer_output(self, layer: LayerSpec, name: str, x: Array, taps: Taps) -> Array:
        """What a sublayer adds, before `residual_multiplier`: x, or x normalized."""
        _tap(taps, name, x)
        if layer.output_norm is None:
            return x
        normed = self._norm(f"{name}_norm", layer.output_norm, x)
        _tap(taps, f"{name}_norm", normed)
        return normed

    def _experts(
        self, name: str, layer: LayerSpec, moe: MoeSpec, normed: Array, taps: Taps
    ) -> Array:
        """What the experts make of `normed`; the router's product is never rounded."""
        logits = ops.linear(normed, self.weights[name + "router.weight"])
        _tap(taps, name + "router", logits)
        expert = partial(expert_output, name, self.weights, layer.activation, self.multiply)
        k, outputs = moe.experts_per_token, self.spec.hidden_size
        return ops.mix_experts(normed, logits, k, moe.normalize, outputs, expert)

    def _norm(self, name: str, norm: NormSpec, x: Array) -> Array:
        weight, bias = self.weights.get(name + ".weight"), self.weights.get(name + ".bias")
        return ops.norm(x, weight, bias, norm.eps, norm.kind)

    def _norm_heads(self, name: str, norm: NormSpec, x: Array) -> Array:
        return ops.norm_heads(x, self.weights[name + ".weight"], None, norm.eps, norm.kind)

    def _linear(self, name: str, x: Array) -> Array:
        own = "embed" if name == "lm_head" and self.spec.tie_word_embeddings else name
        weight, bias = self.weights[own + ".weight"], self.weights.get(own + ".bias")
        out = self.multiply(own, x, weight, bias)
        if part := self.adapter.get(name):
            out = out + ops.low_rank(x, part, self.dtype)
        return out

    def adapter_of(self, node: Node) -> LowRank | None:
        """What the adapter adds to a node's product, or to the rows of its table."""
        if not node.matrices:
            return None
        return self.adapter.get("lm_head" if node.tap == "logits" else node.matrices[0].name)

    def multiply(self, name: str, x: Array, weight: Array, bias: Array | None) -> Array:
        """x times a weight; x is rounded as the format of the matrix `name` requires.

        As ops.linear(x, weight, bias, self.dtype), but for a weight that has been rounded already.
        """
        if name in self.formats:
            format, rounds = self.formats[name], self.grouped_activations
            return rounded_product(x, weight, bias, format, grouped_activations=rounds)
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
        base = name.removesuffix(".weight")
        is_plain_matrix = len(shape) == 2 and base not in formats and not base.endswith(".router")
        rounds = is_plain_matrix and dtype == "bf16"
        checked[name] = ops.round_to_bf16(weight) if rounds else weight
    if problems:
        raise ValueError("weights do not fit the model:\n  - " + "\n  - ".join(problems))
    return checked
