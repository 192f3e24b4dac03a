"""The text on its way through the layers, a layer at a time, for calibration.

Two streams run side by side: `exact` through the float weights, and `rough` through those that
are quantized already, which is what the next matrix will really meet. The layer is that of
`octavo.reference.llama`, with attention in blocks of queries: little is computed to be masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from octavo.models.spec import LayerSpec
from octavo.reference import ops
from octavo.weights.checkpoint import Checkpoint

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

_QUERIES = 128  # of a block of attention
_CHUNK = 2048  # tokens that go through a matrix together


@dataclass
class LayerWeights:
    """One layer, float32; matrices are turned, (inputs, outputs)."""

    matrices: dict[str, Float32] = field(default_factory=dict)
    vectors: dict[str, Float32] = field(default_factory=dict)  # norms, biases: "q.bias"

    @classmethod
    def read(cls, checkpoint: Checkpoint, index: int) -> LayerWeights:
        """Layer `index` of a checkpoint."""
        weights, prefix = cls(), f"layers.{index}."
        for name in checkpoint:
            if name.startswith(prefix):
                values, part = checkpoint[name].to_float32(), name.removeprefix(prefix)
                if values.ndim == 2:
                    matrix = np.ascontiguousarray(values.T)
                    weights.matrices[part.removesuffix(".weight")] = matrix
                else:
                    weights.vectors[part] = values
        return weights

    def copy(self) -> LayerWeights:
        """The same arrays under the same names; neither knows of what is put into the other."""
        return LayerWeights(dict(self.matrices), dict(self.vectors))

    def linear(self, part: str, x: Float32) -> Float32:
        """x through matrix and bias."""
        y = x @ self.matrices[part]
        bias = self.vectors.get(part + ".bias")
        if bias is not None:
            y += bias
        return y

    def normed(self, part: str, layer: LayerSpec, x: Float32) -> Float32:
        """x through "attn_norm" or "mlp_norm"."""
        weight, bias = self.vectors[part + ".weight"], self.vectors.get(part + ".bias")
        y: Float32 = ops.norm(x, weight, bias, layer.norm.eps, layer.norm.kind)
        return y


def chunks(windows: int, window: int) -> Iterator[slice]:
    """Slices of whole windows, of some two thousand tokens each."""
    step = max(1, _CHUNK // window)
    for begin in range(0, windows, step):
        yield slice(begin * window, min(begin + step, windows) * window)


def attend(layer: LayerSpec, weights: LayerWeights, x: Float32, window: int) -> Float32:
    """What the heads return for whole windows. x: (tokens, hidden) -> (tokens, q_size)."""
    normed = weights.normed("attn_norm", layer, x)
    parts = [weights.linear(part, normed) for part in "qkv"]
    out = np.empty((len(x), layer.q_size), np.float32)
    frequencies = None if layer.rope is None else ops.rope_frequencies(layer.rope, layer.head_dim)
    positions = np.arange(window)
    for begin in range(0, len(x), window):
        rows = slice(begin, begin + window)
        q, k, v = (part[rows].reshape(window, -1, layer.head_dim) for part in parts)
        if frequencies is not None:
            q, k = ops.rope(q, positions, frequencies), ops.rope(k, positions, frequencies)
        out[rows] = _attention(q, k, v, layer.score_scale, layer.window).reshape(window, -1)
    return out


def _attention(q: Float32, k: Float32, v: Float32, scale: float, sliding: int) -> Float32:
    """`ops.attention` of whole windows in float32, there being no cache; by blocks of queries."""
    tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    queries = q.reshape(tokens, num_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
    queries = queries * np.float32(scale)
    keys, values = k.transpose(1, 2, 0), v.transpose(1, 0, 2)
    out = np.empty((num_kv_heads, num_heads // num_kv_heads, tokens, head_dim), np.float32)
    for begin in range(0, tokens, _QUERIES):
        end = min(begin + _QUERIES, tokens)
        shape = (num_kv_heads, -1, head_dim)
        block = np.ascontiguousarray(queries[:, :, begin:end]).reshape(shape)
        scores = block @ keys[:, :, :end]
        distance = np.arange(begin, end)[:, None] - np.arange(end)
        hidden = (distance < 0) | (distance >= sliding if sliding else False)
        by_head = scores.reshape(num_kv_heads, -1, end - begin, end)
        np.copyto(by_head, np.float32(-np.inf), where=hidden)
        np.subtract(scores, scores.max(axis=-1, keepdims=True), out=scores)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        out[:, :, begin:end] = (scores @ values[:, :end]).reshape(out[:, :, begin:end].shape)
    return np.ascontiguousarray(out.transpose(2, 0, 1, 3))


def activate(layer: LayerSpec, weights: LayerWeights, normed: Float32) -> Float32:
    """The input of the down matrix. normed: (tokens, hidden) -> (tokens, intermediate)."""
    up = weights.linear("up", normed)
    gate = weights.linear("gate", normed) if layer.gated else None
    if gate is not None and layer.activation == "silu":  # the usual one, in place
        sigmoid = np.negative(gate)
        with np.errstate(over="ignore"):
            np.exp(sigmoid, out=sigmoid)
        sigmoid += 1
        up *= np.divide(gate, sigmoid, out=gate)
        return up
    result: Float32 = ops.gated_activation(gate, up, layer.activation)
    return result
