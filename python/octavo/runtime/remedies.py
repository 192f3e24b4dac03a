"""The size of the KV cache, and options with which a model would fit in memory.

Each of them is computed before it is advised.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from octavo.config import EngineConfig, RuntimeOptions
from octavo.errors import InsufficientMemoryError, InvalidArgumentError
from octavo.machine import format_bytes
from octavo.models.layer import linear_nodes
from octavo.models.spec import ModelSpec, WeightFormat
from octavo.quantization.plan import resolved_formats, weight_bytes

Changes = dict[str, Any]
"""Fields of EngineConfig with other values, to be set together."""

# Memory that the machine may need meanwhile: advice with no reserve may fail at the next try.
_MARGIN = 0.98
_LARGEST_FRACTION = 0.95
_MOST = 4  # remedies to be named
_ITEM_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "int8": 1}  # int8 also has a float32 scale a head


@dataclass(frozen=True)
class Needs:
    """The memory that a model needs, and the memory that there is.

    stored: the formats of matrices that are quantized in the model's files. room: bytes for
    weights and KV cache together. block_bytes: of a cache block with these `options`.
    """

    spec: ModelSpec
    config: EngineConfig
    options: RuntimeOptions
    stored: Mapping[str, WeightFormat]
    room: int
    block_bytes: int

    def remedies(self) -> list[Changes]:
        """Changes after which weights and cache fit; those with the fewest options are taken.

        Where the cache would hold less than max_model_len, a shorter max_model_len is added.
        """
        ways = [
            {**weights, **cache}
            for weights in [{}, *self._smaller_weights()]
            for cache in [{}, *self._other_caches()]
        ]
        found = [way for way in map(self._made_to_fit, ways) if way]
        fewest = min(map(len, found), default=0)
        return [way for way in found if len(way) == fewest][:_MOST]

    def bytes_of_block(self, kv_dtype: str) -> int:
        """The bytes of a block in another kv_dtype; for an odd head_dim up to padding."""
        heads = Counter[int]()
        for layer in self.spec.layers:
            heads[layer.kv_group] += 2 * layer.num_kv_heads
        scales = 4 * self.options.block_size * max(heads.values())
        own = self.options.kv_dtype
        items = (self.block_bytes - scales * (own == "int8")) // _ITEM_BYTES[own]
        return items * _ITEM_BYTES[kv_dtype] + scales * (kv_dtype == "int8")

    def _smaller_weights(self) -> list[Changes]:
        ways: list[Changes] = [{"dtype": "bf16"}, {"quantize": "int8"}, {"quantize": "int4"}]
        has_floats = not linear_nodes(self.spec).keys() <= self.stored.keys()
        if not has_floats or self.config.quantize == "int4":
            ways = ways[:1]
        if self.config.keep_embedding:
            ways += [{**way, "keep_embedding": False} for way in [{}, *ways]]
        now = self._weights(self.config)
        return [way for way in ways if self._weights(replace(self.config, **way)) < now]

    def _other_caches(self) -> list[Changes]:
        config, left = self.config, int(self._left(self.config) * _MARGIN)
        ways: list[Changes] = [
            {"kv_dtype": kv}
            for kv in ("bf16", "int8")
            if self.bytes_of_block(kv) < self.block_bytes
        ]
        if config.num_kv_blocks is None:
            blocks = self.options.kv_groups(self.spec).blocks_in_all(self.options.max_model_len)
            needed = blocks * self.block_bytes
            fraction = math.ceil(100 * needed / left) / 100 if left > 0 else 1.0
            if config.kv_memory_fraction < fraction <= _LARGEST_FRACTION:
                ways.insert(0, {"kv_memory_fraction": fraction})
            return ways
        sizes: list[Changes] = [
            {"num_kv_blocks": max(1, left // self.block_bytes)},
            {"num_kv_blocks": None},
        ]
        return [*sizes, *ways, *({**way, "num_kv_blocks": None} for way in ways)]

    def _made_to_fit(self, way: Changes) -> Changes | None:
        """The changes, with a shorter max_model_len if needed; None where that does not help."""
        held = self._held(replace(self.config, **way))
        if held >= self.options.max_model_len:
            return way
        return {**way, "max_model_len": held} if held else None

    def _held(self, config: EngineConfig) -> int:
        """How many tokens the KV cache would hold; 0 where it could not be made."""
        size, left = self.bytes_of_block(self._kv_dtype(config)), int(self._left(config) * _MARGIN)
        if left <= 0:
            return 0
        num_blocks = int(left * config.kv_memory_fraction) // size
        if config.num_kv_blocks is not None:
            num_blocks = config.num_kv_blocks if config.num_kv_blocks * size <= left else 0
        return self.options.kv_groups(self.spec).longest(num_blocks)

    def _left(self, config: EngineConfig) -> int:
        return self.room - self._weights(config)

    def _dtype(self, config: EngineConfig) -> str:
        return self.options.dtype if config.dtype == "auto" else config.dtype

    def _kv_dtype(self, config: EngineConfig) -> str:
        return self._dtype(config) if config.kv_dtype == "auto" else config.kv_dtype

    def _weights(self, config: EngineConfig) -> int:
        quantize, kept = config.quantize, config.keep_embedding
        formats = resolved_formats(self.spec, self.stored, quantize, kept)
        return weight_bytes(self.spec, formats, self._dtype(config))


def plan_kv_blocks(needs: Needs, available: int) -> int:
    """How many blocks the KV cache gets of so many bytes.

    As many as kv_memory_fraction of them holds, but no more than all sequences at their longest
    could use; or exactly num_kv_blocks where that is given. Raises InsufficientMemoryError, with
    advice, where there is too little memory, and InvalidArgumentError where num_kv_blocks is too
    few for one sequence of max_model_len.
    """
    config, options, block_bytes = needs.config, needs.options, needs.block_bytes
    groups = options.kv_groups(needs.spec)
    blocks_per_sequence = groups.blocks_in_all(options.max_model_len)
    if config.num_kv_blocks is not None:
        num_blocks = config.num_kv_blocks
        if num_blocks < blocks_per_sequence:
            held = groups.longest(num_blocks)
            fits = blocks_per_sequence * block_bytes <= available
            raise InvalidArgumentError(
                f"num_kv_blocks is {num_blocks}, which holds {held} tokens; expected at least "
                f"{blocks_per_sequence}, enough for one sequence of max_model_len = "
                f"{options.max_model_len}: {'raise it, or ' if fits else ''}lower max_model_len to "
                f"{held}"
            )
        if num_blocks * block_bytes > available:
            raise InsufficientMemoryError(
                f"num_kv_blocks is {num_blocks}, which takes "
                f"{format_bytes(num_blocks * block_bytes)} as {options.kv_dtype}; "
                f"{format_bytes(available)} are available",
                needs.remedies(),
            )
        return num_blocks
    budget = int(available * config.kv_memory_fraction)
    num_blocks = min(budget // block_bytes, blocks_per_sequence * options.max_num_seqs)
    if num_blocks < blocks_per_sequence:
        raise InsufficientMemoryError(
            f"one sequence of max_model_len = {options.max_model_len} tokens needs a KV cache of "
            f"{format_bytes(blocks_per_sequence * block_bytes)} as {options.kv_dtype}; it may "
            f"take {format_bytes(budget)} (kv_memory_fraction = {config.kv_memory_fraction:g} of "
            f"the {format_bytes(available)} available)",
            needs.remedies(),
        )
    return num_blocks
