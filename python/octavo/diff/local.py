"""Every op once more, by its definition, on the inputs that a side itself had.

An early mistake spoils everything after it, so that comparing two runs tap by tap finds only the
first. Here each tap of one run is compared with what the reference's op makes of the taps that
the same run fed into it: an op that is right passes however wrong its inputs are, and each of
several broken ops is found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from octavo.diff.graph import residual_before, split_tap, tap_inputs
from octavo.diff.measure import Float32, RowErrors, row_errors
from octavo.diff.ties import rounding_room
from octavo.models.spec import LayerSpec, NormSpec
from octavo.reference import ops
from octavo.reference.llama import KVCache, ReferenceModel
from octavo.reference.ops import Array, Integers

Taps = Mapping[str, Float32]


@dataclass(frozen=True)
class Scene:
    """What one op of a run had before it: the run's own taps, the weights, the cache.

    taps: name -> (rows, width) of the tokens at `positions`. keys, values: (context,
    num_kv_heads, head_dim) as the layer's cache holds them, for the parts that come after rope.
    """

    model: ReferenceModel
    taps: Taps
    token_ids: Integers
    positions: Integers
    layer_index: int
    keys: Array | None = None
    values: Array | None = None

    @property
    def layer(self) -> LayerSpec:
        return self.model.spec.layers[self.layer_index]

    def own(self, part: str) -> Float32:
        """A tap of this layer, (rows, width)."""
        return self.taps[f"layers.{self.layer_index}.{part}"]

    def heads(self, part: str) -> Float32:
        """A tap of this layer split into heads, (rows, heads, head_dim)."""
        value = self.own(part)
        return value.reshape(len(value), -1, self.layer.head_dim)

    @property
    def residual(self) -> Float32:
        """The residual stream before the layer; for "final_norm" that after the last one."""
        return self.taps[residual_before(self.layer_index)]

    @property
    def rotated(self) -> str:
        """Ending of the taps that attention reads: "_rope" where there is rope."""
        return "_rope" if self.layer.rope is not None else ""

    def weight(self, name: str) -> Float32:
        return self.model.weights[f"layers.{self.layer_index}.{name}.weight"]

    def linear(self, name: str, x: Array, bias: bool = True) -> Array:
        """The layer's matrix `name` times x (rows, inputs), rounded as the model's dtype asks."""
        full = f"layers.{self.layer_index}.{name}"
        offset = self.model.weights.get(full + ".bias") if bias else None
        return self.model.multiply(full, x, self.model.weights[full + ".weight"], offset)

    def norm(self, name: str, spec: NormSpec, x: Array) -> Array:
        full = name if name == "final_norm" else f"layers.{self.layer_index}.{name}"
        bias = self.model.weights[full + ".bias"] if spec.bias else None
        return ops.norm(x, self.model.weights[full + ".weight"], bias, spec.eps, spec.kind)


# The linear ops of a layer: tap -> (weight name, the tap that goes in).
LINEAR_PARTS = {
    "q": ("q", "attn_norm"),
    "k": ("k", "attn_norm"),
    "v": ("v", "attn_norm"),
    "attn_out": ("o", "attn"),
    "gate": ("gate", "mlp_norm"),
    "up": ("up", "mlp_norm"),
    "mlp_out": ("down", "act"),
}


def define(scene: Scene, part: str) -> Array:
    """What the op behind tap `part` gives by definition on the scene's inputs; (rows, width)."""
    model = scene.model
    if part == "embed":
        positions = model.weights.get("positions.weight")
        return ops.embed(model.weights["embed.weight"], scene.token_ids, positions, scene.positions)
    if part == "final_norm":
        return scene.norm("final_norm", model.spec.final_norm, scene.residual)
    if part == "logits":
        head = "embed" if model.spec.tie_word_embeddings else "lm_head"
        return model.multiply(head, scene.taps["final_norm"], model.weights[f"{head}.weight"], None)
    return _define_in_layer(scene, part)


def _define_in_layer(scene: Scene, part: str) -> Array:
    layer = scene.layer
    if part in LINEAR_PARTS:
        name, source = LINEAR_PARTS[part]
        return scene.linear(name, scene.own(source))
    if part == "attn_norm":
        return scene.norm("attn_norm", layer.norm, scene.residual)
    if part in ("q_rope", "k_rope"):
        frequencies = scene.model.frequencies[scene.layer_index]
        turned = ops.rope(scene.heads(part[0]), scene.positions, frequencies)
        return turned.reshape(len(turned), -1)
    if part == "attn":
        if scene.keys is None or scene.values is None:
            raise ValueError("attention needs the scene's keys and values")
        q = scene.heads("q" + scene.rotated)
        scale, rounds = layer.score_scale, ops.attention_dtype(scene.model.kv_dtype)
        out = ops.attention(q, scene.keys, scene.values, scale, layer.window, rounds)
        return out.reshape(len(out), -1)
    if part == "mlp_norm":
        return scene.norm("mlp_norm", layer.norm, scene.residual + scene.own("attn_out"))
    if part == "act":
        gate = scene.own("gate") if layer.gated else None
        return ops.gated_activation(gate, scene.own("up"), layer.activation)
    if part == "out":
        # In the order of execution: the residual takes attention's part, then the MLP's.
        return (scene.residual + scene.own("attn_out")) + scene.own("mlp_out")
    raise ValueError(f"unknown tap {part!r}")


def own_errors(scene: Scene, part: str, seen: Float32) -> RowErrors:
    """How far `seen`, the run's tap (rows, width), lies from the op's definition.

    Attention over a bf16 cache rounds its weights, of which some lie where two right computations
    may round them differently: what these can do to a row is taken off its relative error.
    """
    right = define(scene, part).astype(np.float32)
    errors = row_errors(seen, right)
    if part != "attn" or scene.model.kv_dtype != "bf16":
        return errors
    if scene.keys is None or scene.values is None:
        raise ValueError("attention needs the scene's keys and values")
    layer, q = scene.layer, scene.heads("q" + scene.rotated)
    with np.errstate(invalid="ignore", over="ignore"):
        room = rounding_room(q, scene.keys, scene.values, layer.score_scale, layer.window)
        size = np.maximum(np.linalg.norm(right, axis=1), np.linalg.norm(seen, axis=1))
        allowed = np.linalg.norm(room.reshape(len(right), -1), axis=1) / np.where(size > 0, size, 1)
    # Where NaN or infinity is about, there is nothing to allow for.
    allowed = np.where(np.isfinite(allowed), allowed, 0.0)
    return replace(errors, relative=np.maximum(errors.relative - allowed, 0.0))


class LocalJudge:
    """Follows one run chunk by chunk and redoes every op of it.

    model: the definition, with the dtypes that the run is held against.
    """

    def __init__(self, model: ReferenceModel) -> None:
        self.model = model
        self.inputs = tap_inputs(model.spec)
        self.cache = KVCache()

    def scenes(self, taps: Taps, token_ids: Integers) -> Iterator[tuple[str, str, Scene]]:
        """For each tap that can be judged: (name, part, scene), in the order of execution.

        taps: the run's taps for the next tokens; token_ids: those tokens, (rows,). A tap is left
        out where the run does not have it or one of its inputs. Consume it to the end: it keeps
        the run's keys and values for the chunks to come.
        """
        start = self.cache.length
        positions = np.arange(start, start + len(token_ids))
        last = len(self.model.spec.layers)
        for name, sources in self.inputs.items():
            layer, part = split_tap(name)
            keys = values = None
            if part == "attn" and all(source in taps for source in sources):
                keys, values = self._extend(layer or 0, taps, sources)
            if name in taps and all(source in taps for source in sources):
                index = last if layer is None else layer
                yield name, part, Scene(self.model, taps, token_ids, positions, index, keys, values)
        self.cache.length += len(token_ids)

    def _extend(self, layer: int, taps: Taps, sources: tuple[str, ...]) -> tuple[Array, Array]:
        """Put the run's own keys and values of these tokens behind those before."""
        head_dim = self.model.spec.layers[layer].head_dim
        k, v = (
            ops.to_cache(taps[name], self.model.kv_dtype).reshape(len(taps[name]), -1, head_dim)
            for name in sources[1:]
        )
        return self.cache.extend(layer, k, v)
