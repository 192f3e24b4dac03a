"""The bytes that a model, its cache and its steps take on a device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from octavo.config import RuntimeOptions
from octavo.models.shards import shard_formats, shard_spec, shards
from octavo.models.spec import LayerSpec, ModelSpec
from octavo.quantization.plan import weight_bytes
from octavo.reference.sampling import SAMPLING_ROW

_NUM_STEPS = 2  # in flight
_MOST_TOP = 20  # log-probabilities of a row
_ITEM = {"f32": 4, "bf16": 2, "f16": 2, "int8": 1}
_MIB = 2**20
_CUBLAS, _DEQUANTIZED, _ATTENTION = 32 * _MIB, 64 * _MIB, 128 * _MIB
_SAMPLED_ROWS, _SAMPLED_ROW = 256, 64 * 1024
_RECORDED = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)  # then every 32
KERNELS_A_LAYER, KERNELS_OF_RANK = 5, 9  # those of ranks are not fused (docs/parallel.md)
_GRAPH_NODE = 8 * 1024
_LANES = 16  # of the CPU's cache, to which a head's elements are rounded up


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: on its device, or in its process on the CPU.

    kv_cache: of all sequences at their longest. activations: of a step, with logits and results.
    workspace: what kernels of a GPU work in, at most. graphs: recorded steps of a GPU (assumed).
    reserved: what no formula gives.
    """

    weights: int
    kv_cache: int
    activations: int
    workspace: int
    graphs: int
    reserved: int

    @property
    def of_runtime(self) -> int:
        """What `Runtime.memory` counts."""
        return self.weights + self.kv_cache + self.activations

    @property
    def total(self) -> int:
        return self.of_runtime + self.workspace + self.graphs + self.reserved


def part_of(
    spec: ModelSpec, options: RuntimeOptions, ranks: int
) -> tuple[ModelSpec, RuntimeOptions]:
    """What each of so many ranks runs, and the formats of its weights; all have parts of one size.

    Raises InvalidArgumentError for a model that the engine would not divide so.
    """
    part = shard_spec(spec, 0, ranks)
    formats = shard_formats(options.formats, shards(spec, part, 0, ranks))
    return part, replace(options, formats=formats, world_size=ranks)


def block_bytes(spec: ModelSpec, options: RuntimeOptions, *, is_gpu: bool) -> int:
    """Bytes of a block of the KV cache: its layers of the largest group, keys and values.

    As `Runtime.kv_bytes_per_block`: layers of several groups share a place where their blocks have
    the same size.
    """
    of_group: Counter[tuple[int, int]] = Counter()
    for layer in spec.layers:
        of_group[layer.kv_group, _layer_block_bytes(layer, options, is_gpu)] += 1
    most: Counter[int] = Counter()
    for (_, size), count in of_group.items():
        most[size] = max(most[size], count)
    return sum(size * count for size, count in most.items())


def _layer_block_bytes(layer: LayerSpec, options: RuntimeOptions, is_gpu: bool) -> int:
    item = _ITEM[options.kv_dtype]
    keys = values = layer.head_dim
    if not is_gpu:
        values = -(-values // _LANES) * _LANES
        keys += keys % 2 if options.kv_dtype == "bf16" else 0
    scales = 2 * 4 if options.kv_dtype == "int8" else 0
    return layer.num_kv_heads * options.block_size * ((keys + values) * item + scales)


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


def workspace_bytes(options: RuntimeOptions) -> int:
    """Bytes that a GPU's kernels work in, at most: the limits in csrc/cuda.

    cuBLASLt's, a matrix of codes as floats, partial results of attention, and the states of rows
    that are sampled.
    """
    dequantized = _DEQUANTIZED if options.formats else 0
    rows = min(max(options.max_num_batched_tokens, options.max_num_seqs), _SAMPLED_ROWS)
    return _CUBLAS + dequantized + _ATTENTION + rows * _SAMPLED_ROW


def graph_bytes(spec: ModelSpec, options: RuntimeOptions) -> int:
    """Bytes of the steps that a GPU records: one for each batch size and width of block table.

    As `CudaBackend::padded` has them; a kernel of one takes 8 KiB (assumed).
    """
    batches = sum(1 for size in _RECORDED if size < options.max_num_seqs) + 1
    batches += max(0, options.max_num_seqs - _RECORDED[-1] - 1) // 32
    blocks = -(-options.max_model_len // options.block_size)
    widths = max(0, (blocks - 1).bit_length() - 4) + 1  # 16, 32, 64 … blocks
    per_layer = KERNELS_A_LAYER if options.world_size == 1 else KERNELS_OF_RANK + 2  # exchanges
    kernels = per_layer * len(spec.layers) + 3
    return batches * widths * kernels * _GRAPH_NODE


def kv_blocks(spec: ModelSpec, options: RuntimeOptions, context: int) -> int:
    """Blocks that a sequence of `context` tokens holds at most, in all groups."""
    return options.kv_groups(spec).blocks_in_all(context)


def memory_of(
    spec: ModelSpec,
    options: RuntimeOptions,
    sequences: int,
    reserved: int,
    *,
    is_gpu: bool,
    embeds: bool = False,
) -> Memory:
    """What `sequences` of options.max_model_len tokens need; spec: the model, or a rank's part.

    embeds: an embedding model, whose steps keep the hidden states of all their tokens, float32.
    """
    tokens = min(options.max_num_batched_tokens, sequences * options.max_model_len)
    states = _NUM_STEPS * tokens * 4 * spec.hidden_size if embeds else 0
    size = block_bytes(spec, options, is_gpu=is_gpu)
    blocks = kv_blocks(spec, options, options.max_model_len)
    return Memory(
        weight_bytes(spec, options.formats, options.dtype),
        sequences * blocks * size,
        activation_bytes(spec, options, is_gpu=is_gpu) + states,
        workspace_bytes(options) if is_gpu else 0,
        graph_bytes(spec, options) if is_gpu and options.graphs else 0,
        reserved,
    )
