"""Small models with LoRA adapters in the native runtime, and batches for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from adapter_helpers import random_low_ranks
from runtime_helpers import VOCAB, tiny_runtime, tiny_spec

from octavo import _native
from octavo.models.adapter import Adapter
from octavo.models.rope import default_rope
from octavo.models.spec import ModelSpec
from octavo.reference.sampling import sampling_rows

ALL = ("*.q", "*.k", "*.v", "*.o", "*.gate", "*.up", "*.down")
SPECS = {
    "tied": tiny_spec(),
    "untied": replace(tiny_spec(), tie_word_embeddings=False),
    "biases": tiny_spec(44, qkv_bias=True, o_bias=True, mlp_bias=True, gated=False),
    "aligned": tiny_spec(
        64,
        **{"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 96},
        rope=default_rope(1000.0, 16),
    ),
}
# Ranks around the sizes of the kernels; adapters of everything, of some matrices, of the ends.
KINDS: tuple[tuple[tuple[str, ...], int], ...] = (
    ((*ALL, "embed", "lm_head"), 5),
    (ALL, 16),
    (("layers.0.q", "layers.1.v", "layers.1.down"), 1),
    (("embed",), 17),
    (("lm_head", "*.up"), 33),
)


def adapters_of(spec: ModelSpec) -> list[Adapter]:
    return [random_low_ranks(spec, names, rank, rank) for names, rank in KINDS]


def runtime_with(spec: ModelSpec, adapters: Sequence[Adapter], **options: Any) -> _native.Runtime:
    runtime = tiny_runtime(spec, **options)
    for slot, adapter in enumerate(adapters):
        runtime.load_adapter(slot, adapter.native())
    return runtime


def prompt(index: int, length: int) -> list[int]:
    return ((np.arange(length) * (7 + index) + 3 * index) % VOCAB).tolist()


def logits(
    runtime: _native.Runtime,
    sequences: Sequence[tuple[list[int], int, int]],
    every_row: bool = True,
    cached: int = 0,
) -> list[np.ndarray]:
    """(tokens, adapter, first of its 2 blocks) in one step: the logits of each sequence.

    As the engine, it names no adapters where no sequence has one.
    """
    adapters = np.array([adapter for _, adapter, _ in sequences], np.int32)
    lengths = [len(tokens) for tokens, _, _ in sequences]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    rows = np.arange(starts[-1], dtype=np.int32) if every_row else starts[1:] - 1
    batch = _native.Batch(
        np.array([token for tokens, _, _ in sequences for token in tokens], np.int32),
        starts,
        np.array(lengths, np.int32) + cached,
        np.array([[[block, block + 1] for _, _, block in sequences]], np.int32),
        rows.astype(np.int32),
        sampling_rows(len(rows)),
        None if max(adapters) < 0 else adapters,
    )
    ticket = runtime.submit(batch)
    found = runtime.logits(ticket)
    runtime.wait(ticket)
    ends = starts[1:] if every_row else np.arange(1, len(sequences) + 1)
    return np.split(found, ends[:-1])
