"""Blocks of the KV cache: who holds which, and which are free.

The cache is cut into blocks of `block_size` tokens, as in PagedAttention (Kwon et al. 2023). A
sequence holds a *block table*: its tokens 0 .. block_size - 1 lie in the first block it names, the
next block_size tokens in the second, and so on. Blocks need not be neighbours, so nothing is ever
moved and nothing is lost but the rest of each sequence's last block.

A model whose layers differ in what they keep (say, windowed and full attention) has several *KV
groups*; each has its own blocks, numbered from 0, and a sequence has one table in each.

Pure Python: no NumPy, no native code, so that every policy can be tested in microseconds.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable

from octavo.errors import InvalidArgumentError


class IntegrityError(RuntimeError):
    """The engine's own books disagree: a bug in octavo, never a user's mistake."""


class BlockPool:
    """The free blocks of one KV group, as a stack: a block given back is the next one taken."""

    def __init__(self, num_blocks: int) -> None:
        # Reversed, so that a fresh pool hands out 0, 1, 2, ...
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """How many blocks nobody holds."""
        return len(self._free)

    @property
    def free_blocks(self) -> tuple[int, ...]:
        """The blocks nobody holds, in no particular order."""
        return tuple(self._free)

    def take(self) -> int:
        """Remove one free block and return its number; IntegrityError when there is none."""
        if not self._free:
            raise IntegrityError("a block was taken from an empty pool")
        return self._free.pop()

    def give_back(self, blocks: Iterable[int]) -> None:
        """Make these blocks free again."""
        self._free.extend(blocks)


class BlockManager:
    """Hands blocks to sequences, which are known by any hashable key.

    num_blocks: blocks in each KV group. block_size: tokens in a block.
    num_kv_groups: how many block tables every sequence has.
    """

    def __init__(self, num_blocks: int, block_size: int, num_kv_groups: int = 1) -> None:
        for name, value in (
            ("num_blocks", num_blocks),
            ("block_size", block_size),
            ("num_kv_groups", num_kv_groups),
        ):
            if value < 1:
                raise InvalidArgumentError(f"{name} is {value}; expected 1 or more")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_groups = num_kv_groups
        self._pools = tuple(BlockPool(num_blocks) for _ in range(num_kv_groups))
        # array("i") rather than list: the batch builder copies tables by the buffer protocol.
        self._tables: dict[Hashable, tuple[array[int], ...]] = {}

    @property
    def num_free_blocks(self) -> int:
        """Free blocks of the KV group that has fewest."""
        return min(pool.num_free for pool in self._pools)

    @property
    def num_tokens_capacity(self) -> int:
        """The longest single sequence that the whole cache can hold, in tokens."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold num_tokens tokens."""
        return -(-num_tokens // self.block_size)

    def reserve(self, key: Hashable, num_tokens: int) -> bool:
        """Let the sequence hold at least num_tokens tokens.

        Takes what is missing in every KV group and returns True; or, when too few blocks are
        free, changes nothing and returns False.
        """
        tables = self._tables.get(key)
        num_held = len(tables[0]) if tables is not None else 0
        if num_tokens <= num_held * self.block_size:  # the commonest case: decoding within a block
            return True
        num_missing = self.blocks_for(num_tokens) - num_held
        if num_missing > self.num_free_blocks:
            return False
        if tables is None:
            tables = tuple(array("i") for _ in self._pools)
            self._tables[key] = tables
        for _ in range(num_missing):
            for table, pool in zip(tables, self._pools, strict=True):
                table.append(pool.take())
        return True

    def block_tables(self, key: Hashable) -> tuple[array[int], ...]:
        """The sequence's block tables, one a KV group; not to be changed by the caller."""
        return self._tables[key]

    def holders(self) -> set[Hashable]:
        """The keys of all sequences that hold a table."""
        return set(self._tables)

    def free(self, key: Hashable) -> None:
        """Take all blocks of the sequence back; IntegrityError when it holds no table."""
        tables = self._tables.pop(key, None)
        if tables is None:
            raise IntegrityError(f"sequence {key!r} was freed, but it holds no blocks")
        for table, pool in zip(tables, self._pools, strict=True):
            # The last block first, so that the next sequence gets the same ones in order.
            pool.give_back(reversed(table))

    def check_integrity(self) -> None:
        """Every block is either free or in exactly one table; IntegrityError if not."""
        for group, pool in enumerate(self._pools):
            owners: dict[int, object] = {}
            claims = [(block, "the free list") for block in pool.free_blocks]
            claims += [
                (block, f"sequence {key!r}")
                for key, tables in self._tables.items()
                for block in tables[group]
            ]
            for block, owner in claims:
                if not 0 <= block < self.num_blocks:
                    raise IntegrityError(f"{owner} names block {block} of {self.num_blocks}")
                if block in owners:
                    raise IntegrityError(
                        f"block {block} of KV group {group} is held twice: "
                        f"by {owners[block]} and by {owner}"
                    )
                owners[block] = owner
            if len(owners) != self.num_blocks:
                lost = sorted(set(range(self.num_blocks)) - owners.keys())
                raise IntegrityError(f"blocks {lost} of KV group {group} are lost")
        for key, tables in self._tables.items():
            if len({len(table) for table in tables}) != 1:
                lengths = [len(table) for table in tables]
                raise IntegrityError(f"sequence {key!r} has tables of lengths {lengths}")
