"""EAGLE's head (Li et al. 2024, arXiv 2401.15077): one layer that continues hidden states.

A feature is what the target's final norm gives for a token. The head takes the feature of a token
and the embedding of the token after it, and makes the feature of that one:

    x = [embedding, feature] W^T + b           (fc)
    x = x + attention(x)                       (no norm before it)
    x = x + mlp(norm(x))

The target's own output matrix gives its logits. The feature made and the token drawn from it are
the next input, so a chain costs as many passes as it has drafts, and a tree one for every draft
that has others behind it. Everything is computed in NumPy, in float32, with the keys and values of
this layer kept for every sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.draft_tree import Ranks
from octavo.engine.branches import Judged
from octavo.engine.request import Sequence
from octavo.engine.schedule import Schedule
from octavo.errors import UnsupportedModelError, WeightsError
from octavo.models.spec import LayerSpec, ModelSpec
from octavo.reference import ops
from octavo.speculation.medusa import choose, open_heads, read_tensor
from octavo.speculation.source import DraftSource
from octavo.weights.checkpoint import Checkpoint
from octavo.weights.model_files import ModelFiles, read_folder

Float32 = NDArray[np.float32]
_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class TargetEnds:
    """What the head shares with its target: both ends of it, as float32."""

    spec: ModelSpec
    embedding: Float32  # (vocab_size, hidden_size)
    head: Float32  # (vocab_size, hidden_size)

    @classmethod
    def read(cls, target: ModelFiles, checkpoint: Checkpoint) -> TargetEnds:
        """WeightsError where embedding or head are stored as codes."""
        head = "embed" if target.spec.tie_word_embeddings else "lm_head"
        if coded := [name for name in ("embed", head) if name in checkpoint.formats]:
            raise WeightsError(
                f"{target.path} holds {' and '.join(coded)} as codes; an EAGLE head needs them as "
                f"numbers: use it with a model that is not quantized, or quantize while loading"
            )
        embedding = checkpoint["embed.weight"].to_float32()
        own = embedding if head == "embed" else checkpoint["lm_head.weight"].to_float32()
        return cls(target.spec, embedding, own)

    def logits(self, feature: Float32) -> Float32:
        """(hidden_size,) -> (vocab_size,)."""
        logits = self.head @ feature
        return ops.scale(logits, self.spec.logits_multiplier, self.spec.logits_softcap)


class EagleHead:
    """fc and the layer. weights: by their names in the file, float32."""

    def __init__(self, layer: LayerSpec, weights: dict[str, Float32], ends: TargetEnds) -> None:
        self.layer, self.ends = layer, ends
        self._weights = weights
        rope = layer.rope
        self._frequencies = None if rope is None else np.array(rope.frequencies, np.float32)

    @classmethod
    def read(cls, folder: Path, ends: TargetEnds) -> EagleHead:
        """A folder as published: config.json of one Llama layer, and one safetensors file.

        Its own copy of the embedding is left unread. Raises WeightsError or UnsupportedModelError.
        """
        spec, target = read_folder(folder).spec, ends.spec
        layer, hidden = spec.layers[0], target.hidden_size
        if len(spec.layers) != 1 or spec.hidden_size != hidden or layer.moe is not None:
            raise UnsupportedModelError(
                f"{folder} is of {len(spec.layers)} layers and hidden_size {spec.hidden_size}; "
                f"expected an EAGLE head of one layer and hidden_size {hidden}, as its target"
            )
        source = open_heads(folder)
        inner, q, kv = layer.intermediate_size, layer.q_size, layer.kv_size
        shapes: dict[str, tuple[int, ...]] = {
            "fc.weight": (hidden, 2 * hidden),
            **dict(
                zip(_PARTS, [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)], strict=True)
            ),
            **dict(zip(_MLP, [(inner, hidden), (inner, hidden), (hidden, inner)], strict=True)),
            "post_attention_layernorm": (hidden,),
        }
        weights = {}
        for name, shape in shapes.items():
            full = name if name == "fc.weight" else f"layers.0.{name}.weight"
            weights[name] = read_tensor(source, full, shape)
        has_bias = "fc.bias" in source.infos
        zeros = np.zeros(hidden, np.float32)
        weights["fc.bias"] = read_tensor(source, "fc.bias", (hidden,)) if has_bias else zeros
        return cls(layer, weights, ends)

    def forward(self, features: Float32, token_ids: SequenceOf[int], cache: Cache) -> Float32:
        """New features, (rows, hidden); of those given and of the tokens that come after them.

        The rows' keys and values are added to the cache.
        """
        weights, layer = self._weights, self.layer
        embedded = self.ends.embedding[np.array(token_ids, np.int64)]
        embedded = embedded * np.float32(self.ends.spec.embed_multiplier)
        x = ops.linear(np.hstack([embedded, features]), weights["fc.weight"], weights["fc.bias"])
        x = x + ops.linear(self._attention(x, cache), weights["self_attn.o_proj"])
        normed = ops.norm(x, weights["post_attention_layernorm"], None, layer.norm.eps)
        gate, up = (ops.linear(normed, weights[f"mlp.{part}_proj"]) for part in ("gate", "up"))
        inner = ops.gated_activation(gate, up, layer.activation)
        made: Float32 = x + ops.linear(inner, weights["mlp.down_proj"])
        return made

    def _attention(self, x: Float32, cache: Cache) -> Float32:
        layer, count = self.layer, len(x)
        first = cache.first + len(cache.keys)
        positions = np.arange(first, first + count)
        q, k, v = (
            ops.linear(x, self._weights[f"self_attn.{part}_proj"]).reshape(
                count, -1, layer.head_dim
            )
            for part in "qkv"
        )
        q = ops.rope(q, positions, self._frequencies)
        k = ops.rope(k, positions, self._frequencies)
        cache.keys = np.concatenate([cache.keys, k])
        cache.values = np.concatenate([cache.values, v])
        group = layer.num_heads // layer.num_kv_heads
        keys, values = (np.repeat(kept, group, axis=1) for kept in (cache.keys, cache.values))
        scores = np.einsum("qhd,khd->hqk", q, keys) / np.float32(layer.head_dim**0.5)
        seen = np.arange(len(keys))[None, :] <= (positions - cache.first)[:, None]
        scores = np.where(seen[None], scores, np.float32(-np.inf))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed: Float32 = np.einsum("hqk,khd->qhd", weights, values).astype(np.float32)
        return mixed.reshape(count, -1)


@dataclass
class Cache:
    """Of a sequence: keys and values of positions from `first` on, and features behind them.

    keys, values: (tokens, num_kv_heads, head_dim). features: (rows, hidden_size), of the positions
    after those; the last feature made is `last`.
    """

    first: int
    keys: Float32
    values: Float32
    features: Float32
    last: Float32 | None = None

    @property
    def end(self) -> int:
        """The position after all features."""
        return self.first + len(self.keys) + len(self.features)


class EagleSource(DraftSource):
    """Chains and trees of an EAGLE head.

    Prompt tokens that were found in the prefix cache have no features: the head then sees a
    sequence from the first token on that was computed. Its drafts are those of a shorter text.
    """

    num_classes = num_places = 8
    states = "tokens"

    def __init__(self, head: EagleHead) -> None:
        self._head = head
        self._caches: dict[Sequence, Cache] = {}

    def begin_step(self, running: Iterable[Sequence]) -> None:
        """Forget sequences that do not run."""
        for sequence in self._caches.keys() - set(running):
            del self._caches[sequence]

    def look(self, sequence: Sequence, own: Any) -> int:
        """Nothing before the features of all tokens but the last are known."""
        cache = self._caches.get(sequence)
        return 0 if cache is not None and cache.end == sequence.num_tokens - 1 else -1

    def draft_trees(
        self, wanted: SequenceOf[tuple[Sequence, Any, SequenceOf[Ranks]]]
    ) -> SequenceOf[SequenceOf[SequenceOf[int]]]:
        """One pass for the features that came, and one for each draft that has others behind it."""
        return [self._draft(sequence, paths) for sequence, _, paths in wanted]

    def _draft(self, sequence: Sequence, paths: SequenceOf[Ranks]) -> list[list[int]]:
        cache, head = self._caches[sequence], self._head
        if len(cache.features):
            first = cache.first + len(cache.keys) + 1
            made = head.forward(cache.features, sequence.token_ids[first:], cache)
            cache.features, cache.last = cache.features[:0], made[-1]
        if cache.last is None:
            return [[] for _ in paths]
        nodes = {path[:length] for path in paths for length in range(1, len(path) + 1)}
        drafts: dict[Ranks, int] = {}

        def go_on(parent: Ranks, feature: Float32) -> None:
            """The drafts behind a node of which the head has made the feature."""
            children = sorted(node for node in nodes if node[:-1] == parent)
            if not children:
                return
            logits, num_kept = head.ends.logits(feature), len(cache.keys)
            guesses = choose(logits, sequence, len(parent), children[-1][-1] + 1)
            for node in children:
                drafts[node] = guesses[node[-1]]
                if any(other[:-1] == node for other in nodes):
                    go_on(node, head.forward(feature[None], [drafts[node]], cache)[0])
                    cache.keys, cache.values = cache.keys[:num_kept], cache.values[:num_kept]

        go_on((), cache.last)
        return [[drafts[path[:length]] for length in range(1, len(path) + 1)] for path in paths]

    def end_step(self, schedule: Schedule, output: Any, judged: SequenceOf[Judged]) -> None:
        """Take the features of the tokens that count, prompts included."""
        starts = list(accumulate([e.num_new_tokens for e in schedule.entries], initial=0))
        for found in judged:
            entry, row = schedule.entries[found.entry], starts[found.entry]
            count = entry.num_new_tokens - (len(entry.draft_token_ids) - found.num_accepted)
            rows = output.states[row : row + count]
            cache = self._caches.get(entry.sequence)
            if cache is None or not cache.first <= entry.start <= cache.end:
                cache = self._caches[entry.sequence] = self._empty(entry.start)
            cache.features = np.concatenate([cache.features, rows[cache.end - entry.start :]])

    def _empty(self, first: int) -> Cache:
        layer, hidden = self._head.layer, self._head.ends.spec.hidden_size
        none = np.empty((0, layer.num_kv_heads, layer.head_dim), np.float32)
        return Cache(first, none, none, np.empty((0, hidden), np.float32))
