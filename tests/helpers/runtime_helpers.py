"""A tiny random model in the native runtime, and batches for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from octavo import _native
from octavo.config import RuntimeOptions
from octavo.models.layer import weight_shapes
from octavo.models.rope import default_rope
from octavo.models.spec import LayerSpec, ModelSpec, NormSpec
from octavo.reference.sampling import sampling_rows

VOCAB = 83


def tiny_spec(hidden: int = 36, num_layers: int = 2, **layer_fields: Any) -> ModelSpec:
    """Layers with odd sizes: 6 query heads over 2 KV heads of 10 dimensions."""
    fields: dict[str, Any] = {
        "num_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 10,
        "intermediate_size": 44,
        "norm": NormSpec(eps=1e-5),
        **layer_fields,
    }
    fields.setdefault("rope", default_rope(1000.0, fields["head_dim"]))
    layer = LayerSpec(**fields)
    return ModelSpec("Tiny", VOCAB, hidden, 512, (layer,) * num_layers, layer.norm, True)


def random_weights(spec: ModelSpec, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 weights of a size that keeps activations near one."""
    generator = np.random.default_rng(seed)
    return {
        name: (
            generator.standard_normal(shape) / np.sqrt(shape[-1] if len(shape) > 1 else 4)
        ).astype(np.float32)
        for name, shape in weight_shapes(spec).items()
    }


def tiny_runtime(
    spec: ModelSpec | None = None,
    *,
    num_blocks: int = 32,
    dtype: str = "f32",
    num_threads: int = 2,
    isa: str = "auto",
    seed: int = 0,
    device: str = "cpu",
    **fields: Any,
) -> _native.Runtime:
    """fields: more of RuntimeOptions."""
    spec = spec or tiny_spec()
    options = RuntimeOptions(
        dtype=dtype,
        kv_dtype=fields.pop("kv_dtype", dtype),
        block_size=16,
        max_model_len=256,
        max_num_seqs=fields.pop("max_num_seqs", 8),
        max_num_batched_tokens=fields.pop("max_num_batched_tokens", 128),
        num_threads=num_threads,
        isa=isa,
        **fields,
    )
    runtime = _native.Runtime(device, spec, options)
    for name, values in random_weights(spec, seed).items():
        runtime.load(name, values, "f32")
    runtime.alloc_kv(num_blocks)
    return runtime


def make_batch(
    sequences: Sequence[tuple[Sequence[int], int, Sequence[int]]],
    logit_rows: Sequence[int] | None = None,
    **sampling: Any,
) -> _native.Batch:
    """A batch of (new tokens, tokens already in the cache, blocks); logits of each last token.

    sampling: as `sampling_rows` takes it.
    """
    lengths = [len(tokens) for tokens, _, _ in sequences]
    row_starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    most = max(len(blocks) for _, _, blocks in sequences)
    tables = np.full((1, len(sequences), most), -1, np.int32)
    for index, (_, _, blocks) in enumerate(sequences):
        tables[0, index, : len(blocks)] = blocks
    rows = row_starts[1:] - 1 if logit_rows is None else logit_rows
    return _native.Batch(
        np.array([token for tokens, _, _ in sequences for token in tokens], np.int32),
        row_starts,
        np.array([len(tokens) + cached for tokens, cached, _ in sequences], np.int32),
        tables,
        np.array(rows, np.int32),
        sampling_rows(len(rows), **sampling),
    )


def logits_of(runtime: _native.Runtime, batch: _native.Batch) -> np.ndarray:
    """The step's logits, (rows, vocab); the ticket is closed."""
    ticket = runtime.submit(batch)
    logits = runtime.logits(ticket)
    runtime.wait(ticket)
    return logits
