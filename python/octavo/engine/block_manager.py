"""Which sequence holds which blocks of the KV cache.

The cache is cut into blocks of `block_size` tokens, as in PagedAttention (Kwon et al. 2023). A
sequence holds a *block table*: its tokens 0 .. block_size - 1 lie in the first block it names, the
next block_size tokens in the second, and so on. Blocks need not be neighbours, so nothing is ever
moved, and only the rest of each sequence's last block is wasted.

Sequences that begin alike share the blocks of their common beginning. **A shared block is never
written to**: only full blocks are shared, and a sequence writes only after its full blocks. Where
a sequence starts in the middle of a block that others hold, it gets a copy (copy-on-write).

Layers that keep different tokens form *KV groups*: those that attend to everything are one, those
with a window another. Each group has its own blocks, in all of its layers, and a sequence has a
table for each group. All tables grow together. A group with a window frees the blocks that the
window has passed (`release_before`); their places in the table then hold NO_BLOCK.

Pure Python: no NumPy, no native code, so that every policy can be tested in microseconds.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Hashable
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from octavo.engine.block_pool import BlockPool, IntegrityError
from octavo.errors import InvalidArgumentError

NO_BLOCK = -1


class Prefix(NamedTuple):
    """Tokens whose keys and values are in the cache already, in every KV group.

    num_tokens tokens lie in the blocks of each group; the last block may be filled only in part.
    """

    blocks: tuple[SequenceOf[int], ...]
    num_tokens: int


class BlockCopy(NamedTuple):
    """A block of a KV group whose content a step must copy before it computes anything."""

    group: int
    source: int
    destination: int


NO_PREFIX = Prefix((), 0)


class BlockManager:
    """Gives blocks to sequences, which are named by any hashable key.

    num_blocks: blocks in each KV group. block_size: tokens in a block. num_groups: KV groups.
    """

    def __init__(self, num_blocks: int, block_size: int, num_groups: int = 1) -> None:
        sizes = {"num_blocks": num_blocks, "block_size": block_size, "num_groups": num_groups}
        for name, value in sizes.items():
            if value < 1:
                raise InvalidArgumentError(f"{name} is {value}; expected 1 or more")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.pools = tuple(BlockPool(num_blocks) for _ in range(num_groups))
        # array("i") rather than list: the batch builder copies tables by the buffer protocol.
        self._tables: dict[Hashable, tuple[array[int], ...]] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds, cached ones included, in the group with the fewest."""
        return min([pool.num_free for pool in self.pools])

    @property
    def num_tokens_capacity(self) -> int:
        """The longest single sequence that the whole cache can hold, in tokens."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks of a group hold num_tokens tokens."""
        return -(-num_tokens // self.block_size)

    def is_cached(self, name: bytes) -> bool:
        """Whether a block of this name is in every group, held or free."""
        return None not in [pool.find(name) for pool in self.pools]

    def find_prefix(self, names: SequenceOf[bytes], max_tokens: int) -> Prefix:
        """The longest beginning, of at most max_tokens tokens, that every group still holds.

        names: those of the sequence's full blocks, in order; see prefix_cache.py.
        """
        names = names[: self.blocks_for(max_tokens)]
        blocks = [pool.find_leading(names) for pool in self.pools]
        num_blocks = min(map(len, blocks))
        num_tokens = min(num_blocks * self.block_size, max_tokens)
        return Prefix(tuple([found[:num_blocks] for found in blocks]), num_tokens)

    def prefix_of(self, key: Hashable, num_tokens: int) -> Prefix | None:
        """The first num_tokens tokens of a sequence, for another one.

        None if a group has freed some: whether the other one needs them is not known here.
        """
        num_blocks = self.blocks_for(num_tokens)
        blocks = tuple([table[:num_blocks] for table in self._tables[key]])
        return None if any(NO_BLOCK in found for found in blocks) else Prefix(blocks, num_tokens)

    def num_blocks_needed(self, num_tokens: int, prefix: Prefix = NO_PREFIX) -> int:
        """How many of the free blocks `start` would take, in the group where it takes most."""
        num_shared = prefix.num_tokens // self.block_size
        held = [
            sum([pool.num_holders(block) > 0 for block in blocks[:num_shared]])
            for pool, blocks in zip(self.pools, prefix.blocks, strict=False)
        ]
        return self.blocks_for(num_tokens) - min(held, default=0)

    def num_blocks_freed(self, key: Hashable, prefix: Prefix = NO_PREFIX) -> int:
        """How many blocks `free` would add to the free ones, in the group where it adds fewest.

        Blocks that others hold too stay held; those of the prefix count as not free.
        """
        kept = prefix.blocks if prefix.num_tokens else ((),) * len(self.pools)
        return min(
            sum(b != NO_BLOCK and pool.num_holders(b) == 1 and b not in blocks for b in table)
            for pool, table, blocks in zip(self.pools, self._tables[key], kept, strict=True)
        )

    def start(self, key: Hashable, num_tokens: int, prefix: Prefix = NO_PREFIX) -> list[BlockCopy]:
        """Give a sequence blocks for num_tokens tokens, the first of them those of the prefix.

        Returns the blocks to copy. IntegrityError when the key holds blocks already, or too few
        are free: ask `num_blocks_needed` first.
        """
        if key in self._tables:
            raise IntegrityError(f"sequence {key!r} holds blocks already")
        num_shared, num_more = divmod(prefix.num_tokens, self.block_size)
        copies: list[BlockCopy] = []
        tables = []
        for group, pool in enumerate(self.pools):
            known = prefix.blocks[group] if prefix.num_tokens else ()
            table = array("i", known[:num_shared])
            for block in table:
                pool.hold(block)
            if num_more:  # it begins in the middle of a block, and will write there
                source = known[num_shared]
                if pool.num_holders(source):
                    copies.append(BlockCopy(group, source, pool.take()))
                    table.append(copies[-1].destination)
                else:  # no other sequence reads it: no copy is needed
                    pool.hold(source)
                    pool.withdraw(source)
                    table.append(source)
            while len(table) * self.block_size < num_tokens:
                table.append(pool.take())
            tables.append(table)
        self._tables[key] = tuple(tables)
        return copies

    def reserve(self, key: Hashable, num_tokens: int, num_spare: int = 0) -> bool:
        """Give a sequence that holds blocks enough of them for at least num_tokens tokens.

        Takes the missing blocks and returns True. If then fewer than num_spare blocks would be
        free, changes nothing and returns False.
        """
        tables = self._tables[key]
        if num_tokens <= len(tables[0]) * self.block_size:  # the most frequent case: within a block
            return True
        num_missing = self.blocks_for(num_tokens) - len(tables[0])
        if num_missing > self.num_free_blocks - num_spare:
            return False
        for pool, table in zip(self.pools, tables, strict=True):
            table.extend([pool.take() for _ in range(num_missing)])
        return True

    def release_before(self, key: Hashable, group: int, position: int) -> None:
        """Free a group's blocks that lie wholly before a position, since no token reads them again.

        Other blocks keep their places in the table. Published blocks can still be found.
        """
        table = self._tables[key][group]
        for index in range(min(position // self.block_size, len(table)) - 1, -1, -1):
            if table[index] == NO_BLOCK:  # so are all before it
                break
            self.pools[group].release(table[index])
            table[index] = NO_BLOCK

    def publish(self, key: Hashable, index: int, name: bytes) -> None:
        """The sequence's blocks `index` are full and computed: let others find them by name."""
        for pool, table in zip(self.pools, self._tables[key], strict=True):
            if table[index] != NO_BLOCK:
                pool.publish(table[index], name)

    def block_table(self, key: Hashable, group: int = 0) -> array[int]:
        """The sequence's block table in a KV group; not to be changed by the caller.

        Tables of all groups have the same length. NO_BLOCK stands where a group has freed a block.
        """
        return self._tables[key][group]

    def holders(self) -> set[Hashable]:
        """The keys of all sequences that hold tables."""
        return set(self._tables)

    def free(self, key: Hashable, *, keep_cached: bool = True) -> None:
        """Take all blocks of the sequence back; IntegrityError when it holds none.

        keep_cached: published blocks can still be found by others, until they are evicted.
        """
        if key not in self._tables:
            raise IntegrityError(f"sequence {key!r} was freed, but it holds no blocks")
        # The last block first: free blocks form a stack, so the next sequence gets the same ones in
        # order; and it is evicted before the blocks before it, without which it is worthless.
        for pool, table in zip(self.pools, self._tables.pop(key), strict=True):
            for block in reversed(table):
                if block == NO_BLOCK:
                    continue
                if not keep_cached and pool.num_holders(block) == 1:
                    pool.withdraw(block)
                pool.release(block)

    def check_integrity(self) -> None:
        """Every block is free or held by the tables that name it; IntegrityError if not."""
        for key, tables in self._tables.items():
            for table in tables:
                held = [block for block in table if block != NO_BLOCK]
                if len(set(held)) != len(held) or len(table) != len(tables[0]):
                    raise IntegrityError(
                        f"sequence {key!r} holds a block twice, or tables of several lengths: "
                        f"{[table.tolist() for table in tables]}"
                    )
        for group, pool in enumerate(self.pools):
            tables_here = [tables[group] for tables in self._tables.values()]
            held = [block for table in tables_here for block in table if block != NO_BLOCK]
            pool.check_integrity(Counter(held))

    def check_sequence(self, key: Hashable, num_computed_tokens: int) -> None:
        """It holds what it computed and shares no block it will write to; else IntegrityError."""
        for pool, table in zip(self.pools, self._tables[key], strict=True):
            if len(table) < self.blocks_for(num_computed_tokens):
                raise IntegrityError(f"sequence {key!r} holds only {len(table)} blocks")
            for block in table[num_computed_tokens // self.block_size :]:
                if pool.num_holders(block) != 1 or pool.is_published(block) or block == NO_BLOCK:
                    raise IntegrityError(f"sequence {key!r} will write to block {block}, shared")
