"""Every operation of a decoder-only transformer, by definition.

Conventions, here and in the native core:

* A row is a token. x has shape (rows, width); q (rows, num_heads, head_dim);
  k and v (rows, num_kv_heads, head_dim). Matrices are (outputs, inputs), as in PyTorch.
* Query head h reads key/value head h // (num_heads // num_kv_heads): grouped-query attention
  (Ainslie et al. 2023, arXiv 2305.13245). Its two extremes are multi-query (one key/value head)
  and plain multi-head attention (as many as query heads).
* Arithmetic is float32 when the activations are float32 and float64 when they are float64: to
  judge another implementation's rounding, pass float64. Weights are cast to match. Only the angles
  of the rotary embedding are always float32, because models are trained with those.
* dtype "bf16" means: the matrix and the activations entering a product are rounded to bfloat16
  (ties to even), the products and their sum are not. Norm weights and biases are never rounded.
* Nothing is modified in place.

Each function of `OPS` is a method of the same name of `octavo._native_ops.Ops`, which takes options
of storage in addition (blocks, slots). `rope` and the others are parts of those functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.models.adapter import LowRank

Array = npt.NDArray[Any]  # float32, or float64 when judging
Float32 = npt.NDArray[np.float32]
Integers = npt.NDArray[np.integer[Any]]

OPS = (
    "embed",
    "norm",
    "add_norm",
    "norm_heads",
    "scale",
    "linear",
    "rope_and_store",
    "attention",
    "gated_activation",
    "moe",
    "take_rows",
)


def round_to_bf16(x: Array) -> Array:
    """Round every element to the nearest bfloat16, ties to even; the dtype stays as it was.

    A bfloat16 is the upper half of a float32. Adding just under half of the lower half's range
    (and one more when the upper half is odd) carries into the upper half exactly when it has to
    be rounded up. float64 goes through float32 first.
    """
    values = np.ascontiguousarray(x, dtype=np.float32)
    bits = values.view(np.uint32)
    carried = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = (carried & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(values), values, rounded).astype(x.dtype, copy=False)


def embed(
    table: Array,
    token_ids: Integers,
    position_table: Array | None = None,
    positions: Integers | None = None,
    dtype: str = "f32",
) -> Array:
    """Look up each token's row, and add its position's row where positions are learned.

    table: (vocab_size, width); token_ids: (rows,); position_table: (max positions, width), with
    positions: (rows,). dtype "bf16": both tables are rounded to bfloat16. Returns (rows, width).
    """
    x = table[token_ids]
    x = round_to_bf16(x) if dtype == "bf16" else x
    if position_table is not None:
        if positions is None:
            raise ValueError("embed got a position_table and no positions; give both or neither")
        added = position_table[positions]
        x = x + (round_to_bf16(added) if dtype == "bf16" else added)
    return x


def norm(
    x: Array, weight: Array | None, bias: Array | None, eps: float, kind: str = "rms"
) -> Array:
    """Normalize each row to a standard size, then scale (and shift) each column.

    kind "rms" (Zhang & Sennrich 2019, arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight.
    kind "layer" (Ba et al. 2016, arXiv 1607.06450): the same of x - mean(x).
    kind "none": x itself; there is no weight.
    x: (rows, width); weight, bias: (width,). Returns (rows, width).
    """
    if kind not in ("rms", "layer", "none"):
        raise ValueError(f"norm kind is {kind!r}; expected 'rms', 'layer' or 'none'")
    if (weight is None) != (kind == "none"):
        raise ValueError(f"norm kind is {kind!r} and the weight is {weight!r}; 'none' has none")
    if weight is None:
        return x
    if kind == "layer":
        x = x - np.mean(x, axis=-1, keepdims=True)
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    normed = x * (1 / np.sqrt(mean_square + x.dtype.type(eps)))
    y: Array = normed * weight.astype(x.dtype, copy=False)
    return y if bias is None else y + bias.astype(x.dtype, copy=False)


def add_norm(
    residual: Array,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    kind: str = "rms",
) -> tuple[Array, Array]:
    """End one sublayer and begin the next: the new residual stream, and that normalized.

    residual, x: (rows, width); the rest as in `norm`. Returns two of (rows, width).
    """
    total = residual + x
    return total, norm(total, weight, bias, eps, kind)


def norm_heads(x: Array, weight: Array, bias: Array | None, eps: float, kind: str = "rms") -> Array:
    """Normalize each group of columns of a row by itself: each head, or all heads together.

    x: (rows, groups * width); weight, bias: (width,), the same for every group; the rest as in
    `norm`. Returns (rows, groups * width).
    """
    return norm(x.reshape(-1, len(weight)), weight, bias, eps, kind).reshape(x.shape)


def scale(x: Array, factor: float, cap: float = 0.0) -> Array:
    """factor * x; with a cap that is not 0, cap * tanh(factor * x / cap), which stays within it.

    The cap: Gemma 2 (arXiv 2408.00118, section 2). Any shape.
    """
    y: Array = x if factor == 1 else x * x.dtype.type(factor)
    return y if cap == 0 else np.tanh(y / x.dtype.type(cap)) * x.dtype.type(cap)


def linear(x: Array, weight: Array, bias: Array | None = None, dtype: str = "f32") -> Array:
    """x @ weight^T + bias. x: (rows, inputs); weight: (outputs, inputs); bias: (outputs,).

    dtype "bf16": weight and x are rounded to bfloat16 before the product; the products, their
    sum, the bias and the result are not. Returns (rows, outputs).
    """
    if dtype == "bf16":
        x, weight = round_to_bf16(x), round_to_bf16(weight)
    y: Array = x @ weight.astype(x.dtype, copy=False).T
    return y if bias is None else y + bias.astype(x.dtype, copy=False)


def low_rank(x: Array, part: LowRank, dtype: str = "f32") -> Array:
    """What an adapter adds to the product of a matrix: (scale B) (A x) (Hu et al. 2021).

    x: (rows, inputs), as the matrix itself takes it. Both products are `linear` with this dtype, so
    "bf16" rounds x, A, A x and scale B to bfloat16, and no sum. Returns (rows, outputs).
    """
    return linear(linear(x, part.a, dtype=dtype), part.scaled_b, dtype=dtype)


def low_rank_rows(token_ids: Integers, part: LowRank, dtype: str = "f32") -> Array:
    """What an adapter adds to rows of the embedding: (scale B) A[:, token]; (rows, hidden)."""
    rows = np.ascontiguousarray(part.a.T[token_ids])
    rows = round_to_bf16(rows) if dtype == "bf16" else rows
    return linear(rows, part.scaled_b, dtype=dtype)


def rope(
    x: Array, positions: Integers, frequencies: Float32 | None, attention_factor: float = 1.0
) -> Array:
    """Rotary position embedding: turn each pair of elements by position * frequency.

    Of n frequencies, elements i and i + n of a head are a pair ("rotate half", as in GPT-NeoX and
    Hugging Face; GGUF files and Meta's own code pair neighbours instead, with the rows of q and k
    reordered); elements from 2 n on stay. The product of a turned q and a turned k depends on the
    distance of their positions alone.

    x: (rows, heads, head_dim); positions: (rows,); frequencies: float32 (at most head_dim / 2,), or
    None for no rotation; attention_factor: of cosines and sines. Returns the shape of x.
    """
    if frequencies is None:
        return x
    angles = positions.astype(np.float32)[:, None] * frequencies  # float32 on purpose
    cos, sin = _cos_and_sin(angles, np.float32(attention_factor), x.dtype)
    half = len(frequencies)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return np.concatenate([*turned, rest], axis=-1)


def _cos_and_sin(angles: Float32, factor: np.float32, dtype: npt.DTypeLike) -> tuple[Array, Array]:
    """(rows, pairs) -> two of (rows, 1, pairs): evaluated in float64, kept as float32."""
    exact = angles.astype(np.float64)[:, None, :]
    cos, sin = np.cos(exact).astype(np.float32) * factor, np.sin(exact).astype(np.float32) * factor
    return cos.astype(dtype, copy=False), sin.astype(dtype, copy=False)


def rope_and_store(
    q: Array,
    k: Array,
    v: Array,
    positions: Integers,
    slots: Integers,
    frequencies: Float32 | None,
    num_slots: int,
    kv_dtype: str = "f32",
    attention_factor: float = 1.0,
) -> tuple[Array, Array, Array]:
    """Rotate q and k, and put k and v into the slots of an (empty) cache.

    q: (rows, num_heads, head_dim); k, v: (rows, num_kv_heads, head_dim); positions: (rows,);
    slots: (rows,), where each row's key and value are stored; negative: not at all; frequencies and
    attention_factor as in `rope`. kv_dtype: see `to_cache`. Returns the rotated q, and the cache's
    keys and values, each (num_slots, num_kv_heads, head_dim), zero where nothing was stored.
    """
    k_cache = np.zeros((num_slots, *k.shape[1:]), dtype=k.dtype)
    v_cache = np.zeros((num_slots, *v.shape[1:]), dtype=v.dtype)
    stored = slots >= 0
    q, k = (rope(x, positions, frequencies, attention_factor) for x in (q, k))
    k_cache[slots[stored]] = to_cache(k[stored], kv_dtype)
    v_cache[slots[stored]] = to_cache(v[stored], kv_dtype)
    return q, k_cache, v_cache


def to_cache(x: Array, kv_dtype: str) -> Array:
    """What a KV cache of this dtype keeps of rotated keys or of values, (..., head_dim).

    "int8": each head of each token is rounded to 127 steps of its largest magnitude.
    """
    if kv_dtype == "int8":
        values = x.astype(np.float32)
        largest = np.max(np.abs(values), axis=-1, keepdims=True)
        scales = np.where(largest == 0, np.float32(1), largest / np.float32(127))
        rounded: Array = (np.rint(values / scales) * scales).astype(x.dtype, copy=False)
        return rounded
    return round_to_bf16(x) if kv_dtype == "bf16" else x


def attention_dtype(kv_dtype: str) -> str:
    """The `dtype` of `attention` over a cache of this kind: "bf16" or "f32"."""
    return "bf16" if kv_dtype == "bf16" else "f32"


def attention(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    window: int = 0,
    dtype: str = "f32",
    softcap: float = 0.0,
) -> Array:
    """Causal attention (Vaswani et al. 2017, arXiv 1706.03762) over one sequence.

    The queries are of the last `rows` tokens of the sequence: of one token when decoding, of all
    of them for a whole prompt. The token at position p sees those at j <= p; with a window (as in
    Mistral 7B, arXiv 2310.06825) only those with p - j < window. With a softcap (Gemma 2) a score
    s = scale * q.k becomes softcap * tanh(s / softcap).

    dtype "bf16", where the cache is bf16: q and the weights of the tokens are rounded to bfloat16
    as well, so that both products are of bfloat16 numbers; their sums are not rounded, nor is the
    sum of the weights that the result is divided by. A weight is then 2^(s - N), where s is the
    score in powers of two and N the greatest score rounded up to a whole number. With a whole N, a
    kernel that goes through the context piece by piece, and knows only the greatest score so far,
    rounds to the same bits and corrects them by exact powers of two.

    q: (rows, num_heads, head_dim); k, v: (context, num_kv_heads, head_dim), rotated and as the
    cache holds them. Returns (rows, num_heads, head_dim).
    """
    rows, num_heads, _ = q.shape
    context, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    distance = np.arange(context - rows, context)[:, None] - np.arange(context)  # p - j
    visible = distance >= 0
    if window:
        visible &= distance < window
    nothing = q.dtype.type(-np.inf)
    out = np.empty_like(q)
    for kv_head in range(num_kv_heads):
        heads = slice(kv_head * group, (kv_head + 1) * group)
        queries = q[:, heads].transpose(1, 0, 2)  # (group, rows, head_dim)
        if dtype == "bf16":
            products = round_to_bf16(queries) @ k[:, kv_head].T  # (group, rows, context)
            powers = np.where(visible, score(products, scale, softcap, math.log2(math.e)), nothing)
            weights = np.exp2(powers - np.ceil(np.max(powers, axis=-1, keepdims=True)))
            total = np.sum(weights, axis=-1, keepdims=True)
            attended = (round_to_bf16(weights) @ v[:, kv_head]) / total
        else:
            scores = score(queries @ k[:, kv_head].T, scale, softcap)
            np.copyto(scores, nothing, where=~visible)
            attended = softmax(scores) @ v[:, kv_head]
        out[:, heads] = attended.transpose(1, 0, 2)
    return out


def score(products: Array, scale: float, softcap: float = 0.0, unit: float = 1.0) -> Array:
    """unit * scale * q.k from q.k; with a softcap, unit * softcap * tanh(scale * q.k / softcap)."""
    number = products.dtype.type
    y: Array = products * number(scale / softcap if softcap else scale * unit)
    return np.tanh(y) * number(softcap * unit) if softcap else y


def softmax(x: Array) -> Array:
    """exp(x) / sum(exp(x)) over the last axis; the maximum is subtracted so nothing overflows."""
    result: Array = x - np.max(x, axis=-1, keepdims=True)
    np.exp(result, out=result)
    result /= np.sum(result, axis=-1, keepdims=True)
    return result


def gated_activation(gate: Array | None, up: Array, activation: str) -> Array:
    """activation(gate) * up (Shazeer 2020, arXiv 2002.05202), or activation(up) with no gate.

    gate, up: (rows, width); activation: "silu", "gelu", "gelu_tanh" or "relu".
    Returns (rows, width).
    """
    return activate(up, activation) if gate is None else activate(gate, activation) * up


def activate(x: Array, activation: str) -> Array:
    """An activation function, element by element. Any shape.

    silu: x * sigmoid(x). gelu (Hendrycks & Gimpel 2016, arXiv 1606.08415): x times the normal
    distribution's cumulative function. gelu_tanh: the same paper's approximation. relu: max(x, 0).
    """
    y: Array
    if activation == "silu":
        with np.errstate(over="ignore"):  # exp(-x) = inf is fine: x / inf is 0
            y = x / (1 + np.exp(-x))
    elif activation == "gelu":
        y = x * (0.5 * (1 + _erf(x * math.sqrt(0.5)).astype(x.dtype)))
    elif activation == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))
        y = 0.5 * x * (1 + np.tanh(inner))
    elif activation == "relu":
        y = np.maximum(x, 0)
    else:
        raise ValueError(f"activation is {activation!r}; expected silu, gelu, gelu_tanh or relu")
    return y


# NumPy has no error function; the standard library's is exact to float64, one number at a time.
_erf = np.vectorize(math.erf, otypes=[np.float64])


def moe(
    x: Array,
    router_logits: Array,
    gate: Array,
    up: Array,
    down: Array,
    experts_per_token: int,
    normalize: bool = True,
    activation: str = "silu",
    dtype: str = "f32",
) -> Array:
    """The MLP of each row's experts: down(activation(gate x) * (up x)), weighted and added.

    x: (rows, inputs); router_logits: (rows, num_experts); gate, up: (num_experts, width, inputs);
    down: (num_experts, outputs, width); dtype as in `linear`. Returns (rows, outputs).
    """

    def expert(index: int, some: Array) -> Array:
        opened, raised = (linear(some, half[index], None, dtype) for half in (gate, up))
        return linear(gated_activation(opened, raised, activation), down[index], None, dtype)

    return mix_experts(x, router_logits, experts_per_token, normalize, down.shape[1], expert)


def mix_experts(
    x: Array,
    router_logits: Array,
    experts_per_token: int,
    normalize: bool,
    outputs: int,
    expert: Callable[[int, Array], Array],
) -> Array:
    """The experts' outputs, each times its weight, added in the order of the experts' numbers.

    x: (rows, inputs). expert(index, some rows of x) -> (rows, outputs): called for those that a row
    has chosen, with all such rows. The rest as in `route`. Returns (rows, outputs).
    """
    chosen, weights = route(router_logits, experts_per_token, normalize)
    out = np.zeros((len(x), outputs), x.dtype)
    for index in np.unique(chosen).tolist():
        rows, places = np.nonzero(chosen == index)
        out[rows] += weights[rows, places, None] * expert(index, x[rows])
    return out


def route(router_logits: Array, experts_per_token: int, normalize: bool) -> tuple[Integers, Array]:
    """Each row's experts, those of the largest logits, and their weights.

    Of equal logits, the expert of the lower number is taken. A weight is exp(logit) divided by the
    sum of exp over all experts, or with `normalize` over the chosen ones (Mixtral: Jiang et al.
    2024, arXiv 2401.04088). router_logits: (rows, num_experts). Returns two of
    (rows, experts_per_token), in the order of the experts' numbers.
    """
    order = np.argsort(-router_logits, axis=1, kind="stable")
    chosen = np.sort(order[:, :experts_per_token], axis=1)
    powers = np.exp(router_logits - np.max(router_logits, axis=1, keepdims=True))
    mine = np.take_along_axis(powers, chosen, axis=1)
    total = np.sum(mine if normalize else powers, axis=1, keepdims=True)
    return chosen, mine / total


def take_rows(x: Array, rows: Integers) -> Array:
    """Select the rows of the tokens whose logits are wanted.

    x: (rows, width); rows: (n,). Returns (n, width).
    """
    return x[rows]
