"""Which blocks of the KV cache are whose.

The cache is cut into blocks of `block_size` tokens, as in PagedAttention (Kwon et al. 2023). A
sequence holds a *block table*: its tokens 0 .. block_size - 1 lie in the first block it names, the
next block_size tokens in the second, and so on. Blocks need not be neighbours, so nothing is ever
moved and nothing is lost but the rest of each sequence's last block.

Sequences that begin alike share the blocks of their common beginning. **A shared block is never
written to**: only full blocks are shared, and a sequence writes behind its full blocks alone. Where
a sequence starts in the midst of a block that others hold, it gets a copy (copy-on-write).

A model whose layers differ in what they keep has several *KV groups*, each with blocks of its own.
All of them grow by the same tokens, so one table serves them all: block 7 means block 7 of every
group.

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


class Prefix(NamedTuple):
    """Tokens whose keys and values are in the cache already.

    num_tokens tokens lie in `blocks`, the last of which they may fill in part.
    """

    blocks: SequenceOf[int]
    num_tokens: int


class BlockCopy(NamedTuple):
    """A block whose content a step must copy, in every KV group, before it computes anything."""

    source: int
    destination: int


NO_PREFIX = Prefix((), 0)


class BlockManager:
    """Hands blocks to sequences, which are known by any hashable key.

    num_blocks: blocks in each KV group. block_size: tokens in a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                raise InvalidArgumentError(f"{name} is {value}; expected 1 or more")
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        # array("i") rather than list: the batch builder copies tables by the buffer protocol.
        self._tables: dict[Hashable, array[int]] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks in each KV group, free or not."""
        return self.pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds; those with cached content count."""
        return self.pool.num_free

    @property
    def num_tokens_capacity(self) -> int:
        """The longest single sequence that the whole cache can hold, in tokens."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold num_tokens tokens."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, names: SequenceOf[bytes], max_tokens: int) -> Prefix:
        """The longest beginning, of at most max_tokens tokens, that the cache still holds.

        names: those of the sequence's full blocks, in order; see block_hash.py.
        """
        blocks: list[int] = []
        for name in names:
            block = self.pool.find(name)
            if block is None or len(blocks) * self.block_size >= max_tokens:
                break
            blocks.append(block)
        return Prefix(blocks, min(len(blocks) * self.block_size, max_tokens))

    def num_blocks_needed(self, num_tokens: int, prefix: Prefix = NO_PREFIX) -> int:
        """How many of the free blocks `start` would take."""
        shared = prefix.blocks[: prefix.num_tokens // self.block_size]
        num_held = sum(1 for block in shared if self.pool.num_holders(block))
        return self.blocks_for(num_tokens) - num_held

    def start(self, key: Hashable, num_tokens: int, prefix: Prefix = NO_PREFIX) -> list[BlockCopy]:
        """Give a sequence blocks for num_tokens tokens, the first of them those of the prefix.

        Returns what must be copied. IntegrityError when the key holds blocks already, or too few
        are free: ask `num_blocks_needed` first.
        """
        if key in self._tables:
            raise IntegrityError(f"sequence {key!r} holds blocks already")
        num_shared, num_more = divmod(prefix.num_tokens, self.block_size)
        table = array("i", prefix.blocks[:num_shared])
        for block in table:
            self.pool.hold(block)
        copies: list[BlockCopy] = []
        if num_more:  # it begins in the midst of a block, and is going to write there
            source = prefix.blocks[num_shared]
            if self.pool.num_holders(source):
                copies.append(BlockCopy(source, self.pool.take()))
                table.append(copies[0].destination)
            else:  # nobody reads it: it need not be kept apart
                self.pool.hold(source)
                self.pool.withdraw(source)
                table.append(source)
        while len(table) * self.block_size < num_tokens:
            table.append(self.pool.take())
        self._tables[key] = table
        return copies

    def reserve(self, key: Hashable, num_tokens: int, num_spare: int = 0) -> bool:
        """Let a sequence that holds blocks hold at least num_tokens tokens.

        Takes what is missing and returns True; or, when then fewer than num_spare blocks would be
        free, changes nothing and returns False.
        """
        table = self._tables[key]
        if num_tokens <= len(table) * self.block_size:  # the commonest case: within a block
            return True
        num_missing = self.blocks_for(num_tokens) - len(table)
        if num_missing > self.num_free_blocks - num_spare:
            return False
        for _ in range(num_missing):
            table.append(self.pool.take())
        return True

    def publish(self, key: Hashable, index: int, name: bytes) -> None:
        """The sequence's block `index` is full and computed: let others find it by its name."""
        self.pool.publish(self._tables[key][index], name)

    def block_table(self, key: Hashable) -> array[int]:
        """The sequence's block table, for all KV groups; not to be changed by the caller."""
        return self._tables[key]

    def holders(self) -> set[Hashable]:
        """The keys of all sequences that hold a table."""
        return set(self._tables)

    def free(self, key: Hashable, *, keep_cached: bool = True) -> None:
        """Take all blocks of the sequence back; IntegrityError when it holds no table.

        keep_cached: what was published can still be found by others, until it is evicted.
        """
        table = self._tables.pop(key, None)
        if table is None:
            raise IntegrityError(f"sequence {key!r} was freed, but it holds no blocks")
        # The last block first: it goes back on top of its predecessors, so that the next sequence
        # gets the same ones in order; and it is evicted before them, without whom it is worthless.
        for block in reversed(table):
            if not keep_cached and self.pool.num_holders(block) == 1:
                self.pool.withdraw(block)
            self.pool.release(block)

    def check_integrity(self) -> None:
        """Every block is free or held by those whose tables name it; IntegrityError if not."""
        for key, table in self._tables.items():
            if len(set(table)) != len(table):
                raise IntegrityError(f"sequence {key!r} holds a block twice: {table.tolist()}")
        self.pool.check_integrity(Counter(b for table in self._tables.values() for b in table))
