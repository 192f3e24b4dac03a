"""The bytes that a model, its cache and its steps take on a device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from math import prod

from octavo.config import RuntimeOptions
from octavo.models.layer import weight_shapes
from octavo.models.spec import LayerSpec, ModelSpec
from octavo.quantization.plan import weight_bytes
from octavo.reference.sampling import SAMPLING_ROW

_NUM_STEPS = 2  # in flight
_MOST_TOP = 20  # log-probabilities of a row
_ITEM = {"f32": 4, "bf16": 2, "f16": 2, "int8": 1}
_LANES = 16  # of the CPU's cache, to which a head's elements are rounded up


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. kv_cache: of all sequences at their longest."""

    weights: int
    kv_cache: int
    activations: int
    reserved: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations + self.reserved


def split_weight_bytes(spec: ModelSpec, options: RuntimeOptions, ranks: int) -> int:
    """Bytes of the weights on each of so many devices: matrices are divided, vectors repeated."""
    total = weight_bytes(spec, options.formats, options.dtype)
    vectors = sum(4 * prod(shape) for shape in weight_shapes(spec).values() if len(shape) == 1)
    return vectors + -(-(total - vectors) // ranks)


def block_bytes(spec: ModelSpec, options: RuntimeOptions, *, is_gpu: bool, ranks: int = 1) -> int:
    """Bytes of a block of the KV cache: its layers of the largest group, keys and values.

    As `Runtime.kv_bytes_per_block`: layers of several groups share a place where their blocks have
    the same size.
    """
    of_group: Counter[tuple[int, int]] = Counter()
    for layer in spec.layers:
        of_group[layer.kv_group, _layer_block_bytes(layer, options, is_gpu, ranks)] += 1
    most: Counter[int] = Counter()
    for (_, size), count in of_group.items():
        most[size] = max(most[size], count)
    return sum(size * count for size, count in most.items())


def _layer_block_bytes(layer: LayerSpec, options: RuntimeOptions, is_gpu: bool, ranks: int) -> int:
    heads = Fraction(layer.num_kv_heads, ranks)
    item = _ITEM[options.kv_dtype]
    keys = values = layer.head_dim
    if not is_gpu:
        values = -(-values // _LANES) * _LANES
        keys += keys % 2 if options.kv_dtype == "bf16" else 0
    scales = 2 * 4 if options.kv_dtype == "int8" else 0
    return int(heads * options.block_size * ((keys + values) * item + scales))


def activation_bytes(spec: ModelSpec, options: RuntimeOptions, *, is_gpu: bool) -> int:
    """Bytes of a step's activations, logits and results, as `Runtime.memory` counts them."""
    item = _ITEM[options.dtype] if is_gpu else 4
    tokens, rows, vocab = options.max_num_batched_tokens, options.max_num_seqs, spec.vocab_size
    dense = [layer for layer in spec.layers if layer.moe is None]
    widths = [
        spec.hidden_size,
        max(layer.q_size + 2 * layer.kv_size for layer in spec.layers),
        max(layer.q_size for layer in spec.layers),
        max((layer.intermediate_size * (1 + layer.gated) for layer in dense), default=0),
        max((layer.intermediate_size for layer in dense), default=0),
    ]
    routers = max((layer.moe.num_experts for layer in spec.layers if layer.moe), default=0)
    forward = tokens * (4 * (spec.hidden_size + routers) + item * sum(widths))
    words = -(-vocab // 32)
    results = rows * (4 + 4 + 8 * _MOST_TOP + 1)
    tables = len(spec.kv_windows) * -(-options.max_model_len // options.block_size)
    step = rows * 4 * (vocab + spec.hidden_size + words + tables) + results
    # The batch itself: ids, positions and slots of tokens, and how each is sampled.
    batch = tokens * (4 * (6 + len(spec.kv_windows)) + SAMPLING_ROW.itemsize)
    return forward + _NUM_STEPS * (step + batch) + rows * vocab * 4


def kv_blocks(spec: ModelSpec, options: RuntimeOptions, context: int) -> int:
    """Blocks that a sequence of `context` tokens holds at most, in all groups."""
    return options.kv_groups(spec).blocks_of(context)


def memory_of(
    spec: ModelSpec,
    options: RuntimeOptions,
    sequences: int,
    reserved: int,
    *,
    is_gpu: bool,
    ranks: int = 1,
) -> Memory:
    """What `sequences` of options.max_model_len tokens need on each device."""
    size = block_bytes(spec, options, is_gpu=is_gpu, ranks=ranks)
    blocks = kv_blocks(spec, options, options.max_model_len)
    return Memory(
        split_weight_bytes(spec, options, ranks),
        sequences * blocks * size,
        activation_bytes(spec, options, is_gpu=is_gpu),
        reserved,
    )
