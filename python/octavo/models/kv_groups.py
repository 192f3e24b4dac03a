"""KV groups: which layers share a block table, and how many blocks a sequence holds in all of them.

All groups take blocks from the same memory: a block is `block_size` tokens in the layers of one
group, whichever it is. So memory goes where it is needed: to the layers that see everything when
sequences are long, to those with a window when they are many. (vLLM's hybrid KV cache manager has
this scheme; its documentation of the same name describes it.)
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from dataclasses import dataclass, replace

from octavo.models.spec import LayerSpec, ModelSpec

MOST_GROUPS, LITTLE_MORE = 8, 1.05
_LONGEST = 2**31 - 1  # tokens; longer than any sequence


def with_kv_groups(spec: ModelSpec, max_model_len: int | None = None) -> ModelSpec:
    """The same model, its layers divided into KV groups by their windows.

    Groups have the same number of layers, but for the last of a window, which wastes the rest of
    its blocks. Taken is the largest number with which a sequence of max_model_len tokens (None: of
    all positions) takes little more memory than with the best one, in at most MOST_GROUPS groups.
    Layers that see everything come first: group 0, where there are some.
    """
    longest = max_model_len or spec.max_position_embeddings

    def kind(layer: LayerSpec) -> tuple[int, int, int]:
        return min(layer.window or longest, longest), layer.num_kv_heads, layer.head_dim

    kinds: dict[tuple[int, int, int], list[int]] = {}
    for index, layer in enumerate(spec.layers):
        kinds.setdefault(kind(layer), []).append(index)

    memory: dict[int, int] = {}  # by the number of layers
    for size in range(1, len(spec.layers) + 1):
        counts = {kind: -(-len(layers) // size) for kind, layers in kinds.items()}
        if sum(counts.values()) <= max(MOST_GROUPS, len(kinds)):
            memory[size] = sum(kind[0] * count * size for kind, count in counts.items())
    size = max(size for size in memory if memory[size] <= LITTLE_MORE * min(memory.values()))
    group_of: dict[int, int] = {}
    groups = itertools.count()
    for _, indices in sorted(kinds.items(), reverse=True):
        for first in range(0, len(indices), size):
            group_of.update(dict.fromkeys(indices[first : first + size], next(groups)))
    layers = [replace(layer, kv_group=group_of[i]) for i, layer in enumerate(spec.layers)]
    return replace(spec, layers=tuple(layers))


@dataclass(frozen=True)
class KvGroups:
    """How many blocks sequences take.

    windows: of each KV group, how many positions a token sees there; 0: all. num_in_flight: the
    most tokens of one sequence that are computed before the group lets blocks go.
    """

    block_size: int
    windows: tuple[int, ...]
    num_in_flight: int

    def blocks_in_group(self, num_tokens: int) -> int:
        """Blocks that hold num_tokens tokens in one group."""
        return -(-num_tokens // self.block_size)

    def first_seen(self, window: int, position: int) -> int:
        """The first block of a group that the token at a position sees."""
        return max(position - window + 1, 0) // self.block_size if window else 0

    def most_held(self, window: int, num_tokens: int) -> int:
        """Blocks that a group holds at most while num_tokens tokens are computed."""
        needed = self.blocks_in_group(num_tokens)
        # So many tokens in a row, wherever the first lies in its block.
        most = self.blocks_in_group(window + self.num_in_flight - 1) + 1
        return min(needed, most) if window else needed

    def blocks_in_all(self, num_tokens: int) -> int:
        """Blocks that a sequence holds at most, in all groups, while num_tokens are computed."""
        return sum([self.most_held(window, num_tokens) for window in self.windows])

    def longest(self, num_blocks: int) -> int:
        """The longest sequence that so many blocks hold, in tokens."""
        lengths = range(_LONGEST // self.block_size)
        blocks = bisect_right(
            lengths, num_blocks, key=lambda n: self.blocks_in_all(n * self.block_size)
        )
        return (blocks - 1) * self.block_size
