"""Which sequence holds which blocks of the KV cache.

The cache is cut into blocks of `block_size` tokens, as in PagedAttention (Kwon et al. 2023). A
sequence holds a *block table*: its tokens 0 .. block_size - 1 lie in the first block it names, the
next block_size tokens in the second, and so on. Blocks need not be neighbours, so nothing is ever
moved, and only the rest of each sequence's last block is wasted.

Sequences that begin alike share the blocks of their common beginning. **A shared block is never
written to**: only full blocks are shared, and a sequence writes only after its full blocks. Where
a sequence starts in the middle of a block that others hold, it gets a copy (copy-on-write); so do
the beams of a search, which fork (`fork`).

Layers that keep different tokens form *KV groups*: those that attend to everything are one, those
with a window others (models/kv_groups.py). A sequence has a table for each group, and all groups
take blocks from one pool. A group with a window lets go of the blocks that the window has passed
(`advance`); their places in the table then hold NO_BLOCK. For a long prompt it takes blocks as the
window comes to them. So what a sequence holds there is bounded, however long it is.

Pure Python: no NumPy, no native code, so that every policy can be tested in microseconds.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from octavo.engine.block_pool import BlockPool, IntegrityError
from octavo.errors import InvalidArgumentError
from octavo.models.kv_groups import KvGroups

NO_BLOCK = -1


class Prefix(NamedTuple):
    """Tokens whose keys and values are in the cache already, in every KV group.

    num_tokens tokens lie in the blocks of each group; the last block may be filled only in part.
    Blocks before the window of the next token are NO_BLOCK, or of no use.
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

    num_blocks: of the cache. block_size: tokens in a block. windows: of each KV group, how many
    positions a token sees; 0: all. num_in_flight: the most tokens of a sequence that are computed
    between two calls of `advance`.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        windows: SequenceOf[int] = (0,),
        num_in_flight: int = 1,
    ) -> None:
        sizes = {"num_blocks": num_blocks, "block_size": block_size, "num_groups": len(windows)}
        for name, value in sizes.items():
            if value < 1:
                raise InvalidArgumentError(f"{name} is {value}; expected 1 or more")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.groups = KvGroups(block_size, tuple(windows), num_in_flight)
        self.has_windows = any(windows)
        self.pool = BlockPool(num_blocks, len(windows))
        # array("i") rather than list: the batch builder copies tables by the buffer protocol.
        self._tables: dict[Hashable, tuple[array[int], ...]] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds, cached ones included."""
        return self.pool.num_free

    @property
    def num_tokens_capacity(self) -> int:
        """The longest single sequence that the whole cache can hold, in tokens."""
        return self.groups.longest(self.num_blocks)

    def num_tokens_together(self, length: int) -> int:
        """How many tokens the cache holds in sequences of this length."""
        return self.num_blocks * length // self.groups.blocks_in_all(length)

    def find_prefix(self, names: SequenceOf[bytes], max_tokens: int) -> Prefix:
        """The longest beginning, of at most max_tokens tokens, after which a sequence can go on.

        A group without a window must hold all of it, one with a window what the next token sees.
        names: those of the sequence's full blocks, in order; see prefix_cache.py.
        """
        windows = self.groups.windows
        names = names[: self.groups.blocks_in_group(max_tokens)]
        for group, window in enumerate(windows):
            if not window:
                names = names[: len(self.pool.find_leading(names, group))]
        while True:
            num_tokens = min(len(names) * self.block_size, max_tokens)
            firsts = [self.groups.first_seen(window, num_tokens) for window in windows]
            found = [
                self.pool.find_leading(names[first:], group) for group, first in enumerate(firsts)
            ]
            ends = [first + len(blocks) for first, blocks in zip(firsts, found, strict=True)]
            if min(ends) == len(names):
                break
            # Any shorter beginning that reaches beyond the missing block needs it, too.
            names = names[: min(ends)]
        blocks = [[NO_BLOCK] * first + found[group] for group, first in enumerate(firsts)]
        return Prefix(tuple(blocks), num_tokens)

    def prefix_of(self, key: Hashable, num_tokens: int) -> Prefix | None:
        """The first num_tokens tokens of a sequence, for another one.

        None if a group has let a block go that the other one needs.
        """
        num_blocks = self.groups.blocks_in_group(num_tokens)
        blocks = tuple([table[:num_blocks] for table in self._tables[key]])
        for window, found in zip(self.groups.windows, blocks, strict=True):
            if NO_BLOCK in found[self.groups.first_seen(window, num_tokens) :]:
                return None
        return Prefix(blocks, num_tokens)

    def num_blocks_needed(self, num_tokens: int, prefix: Prefix = NO_PREFIX) -> int:
        """How many of the free blocks `start` would take."""
        num_needed = 0
        for group, (first, end) in enumerate(self._places(num_tokens, prefix)):
            num_needed += end - first
            if prefix.num_tokens:
                shared = prefix.blocks[group][first : prefix.num_tokens // self.block_size]
                num_needed -= sum([self.pool.num_holders(block) > 0 for block in shared])
        return num_needed

    def num_blocks_freed(self, key: Hashable, prefix: Prefix = NO_PREFIX) -> int:
        """How many blocks `free` would add to the free ones.

        Blocks that others hold too stay held; those of the prefix count as not free.
        """
        kept: set[int] = set().union(*prefix.blocks)
        own = [block for block in self.blocks_of(key) if block not in kept]
        return sum([self.pool.num_holders(block) == 1 for block in own])

    def num_blocks_to_come(self, key: Hashable, num_tokens: int, most: int) -> int:
        """How many blocks a sequence still takes up to num_tokens tokens; at most so many a group.

        Those that it lets go meanwhile are not counted.
        """
        end = self.groups.blocks_in_group(num_tokens)
        return sum([min(most, end - len(table)) for table in self._tables[key]])

    def start(self, key: Hashable, num_tokens: int, prefix: Prefix = NO_PREFIX) -> list[BlockCopy]:
        """Give a sequence blocks for num_tokens tokens, the first of them those of the prefix.

        A group with a window gets as many as it holds at most, and later ones by `reserve`.
        Returns the blocks to copy. IntegrityError when the key holds blocks already, or too few
        are free: ask `num_blocks_needed` first.
        """
        if key in self._tables:
            raise IntegrityError(f"sequence {key!r} holds blocks already")
        pool, places = self.pool, self._places(num_tokens, prefix)
        num_shared, num_more = divmod(prefix.num_tokens, self.block_size)
        tables = tuple([array("i", [NO_BLOCK]) * first for first, _ in places])
        sources: dict[int, int] = {}
        # First of all what is known: a free block that is taken may be any cached one.
        for group, table in enumerate(tables):
            known = prefix.blocks[group] if prefix.num_tokens else ()
            table.extend(known[len(table) : num_shared])
            for block in table[places[group][0] :]:
                pool.hold(block)
            if num_more:  # it begins in the middle of a block, and will write there
                source = known[num_shared]
                if pool.num_holders(source):
                    sources[group] = source
                else:  # no other sequence reads it: no copy is needed
                    pool.hold(source)
                    pool.withdraw(source)
                    table.append(source)
        copies: list[BlockCopy] = []
        for group, (table, (_, end)) in enumerate(zip(tables, places, strict=True)):
            table.extend([pool.take() for _ in range(end - len(table))])
            if group in sources:
                copies.append(BlockCopy(group, sources[group], table[num_shared]))
        self._tables[key] = tables
        return copies

    def _places(self, num_tokens: int, prefix: Prefix) -> list[tuple[int, int]]:
        """Of each group, the first place of the table that `start` fills, and the one after all."""
        num_blocks, places = self.groups.blocks_in_group(num_tokens), []
        for window in self.groups.windows:
            first = self.groups.first_seen(window, prefix.num_tokens)
            end = first + self.groups.most_held(window, num_tokens)
            places.append((first, min(end, num_blocks)))
        return places

    def fork(
        self, parents: Mapping[Hashable, Hashable], others: Iterable[Hashable], num_tokens: int
    ) -> list[BlockCopy]:
        """Sequences go on from the first num_tokens tokens of others, all at once.

        parents: sequence -> the one that it goes on from, which holds blocks and may be itself.
        others: sequences that give their blocks up. Full blocks are shared. The last block, if it
        is full only in part, goes to one child of each parent; the others get copies, which are
        returned. A child for whose copy no block is free has an empty table afterwards, as all of
        the others.
        """
        keys = {*parents, *parents.values(), *others} & self._tables.keys()
        left = {key: self._tables.pop(key) for key in keys}
        heirs = {parent: child for child, parent in reversed(list(parents.items()))}
        heirs |= {key: key for key, parent in parents.items() if key == parent}
        for parent, child in heirs.items():
            self._tables[child] = left.pop(parent)
        for tables in left.values():
            self._release(tables)
        copies: list[BlockCopy] = []
        for child, parent in parents.items():
            if child in self._tables:
                continue
            made = self.branch(heirs[parent], child, num_tokens, num_tokens, 0)
            if made is None:
                others = {*others, child}
            else:
                copies += made
        for key in set(others) - self._tables.keys():
            self._tables[key] = tuple([array("i") for _ in self.groups.windows])
        return copies

    def branch(
        self, key: Hashable, branch: Hashable, num_computed: int, num_tokens: int, num_spare: int
    ) -> list[BlockCopy] | None:
        """A second table for a sequence, for other tokens after its first num_computed.

        It shares the full blocks and has new ones for num_tokens tokens. Returns the copies
        to make, of the block in which those tokens end. None, and no change, if then fewer than
        num_spare blocks a group would be free. `free` gives it back, or `adopt` makes it
        the sequence's own.
        """
        tables = self._tables[key]
        num_shared, num_more = divmod(num_computed, self.block_size)
        num_new = self.groups.blocks_in_group(num_tokens) - num_shared
        if (num_new + num_spare) * len(tables) > self.pool.num_free:
            return None
        copies: list[BlockCopy] = []
        branched = []
        for group, table in enumerate(tables):
            own = table[:num_shared]
            for block in own:
                if block != NO_BLOCK:
                    self.pool.hold(block)
            own.extend([self.pool.take() for _ in range(num_new)])
            if num_more:
                copies.append(BlockCopy(group, table[num_shared], own[num_shared]))
            branched.append(own)
        self._tables[branch] = tuple(branched)
        return copies

    def adopt(self, key: Hashable, branch: Hashable) -> None:
        """The branch's table is the sequence's from now on; its former one is given back."""
        former, self._tables[key] = self._tables[key], self._tables.pop(branch)
        self._release(former)

    def reserve(self, key: Hashable, num_tokens: int, num_spare: int = 0) -> bool:
        """Give a sequence that holds blocks enough of them for at least num_tokens tokens.

        Takes the missing blocks and returns True. If then fewer than num_spare blocks a group would
        be free, changes nothing and returns False.
        """
        tables = self._tables[key]
        if num_tokens <= min(map(len, tables)) * self.block_size:  # most often: within a block
            return True
        num_blocks = self.groups.blocks_in_group(num_tokens)
        missing = [max(num_blocks - len(table), 0) for table in tables]
        if sum(missing) > self.pool.num_free - num_spare * len(tables):
            return False
        for table, count in zip(tables, missing, strict=True):
            table.extend([self.pool.take() for _ in range(count)])
        return True

    def advance(self, key: Hashable, num_tokens: int) -> None:
        """The sequence's first num_tokens tokens are computed: free what no token sees any more.

        What the last of them sees is kept: others with the same prompt compute it again, for its
        logits. Blocks keep their places in the table; published ones can still be found.
        """
        for window, table in zip(self.groups.windows, self._tables[key], strict=True):
            begin = end = min(self.groups.first_seen(window, num_tokens - 1), len(table))
            while begin and table[begin - 1] != NO_BLOCK:
                begin -= 1
            for index in range(begin, end):  # the oldest first, which are then evicted first
                self.pool.release(table[index])
                table[index] = NO_BLOCK

    def publish(self, key: Hashable, index: int, name: bytes) -> None:
        """The sequence's blocks `index` are full and computed: let others find them by name."""
        for group, table in enumerate(self._tables[key]):
            if table[index] != NO_BLOCK:
                self.pool.publish(table[index], name, group)

    def block_table(self, key: Hashable, group: int = 0) -> array[int]:
        """The sequence's block table in a KV group; not to be changed by the caller.

        NO_BLOCK stands where a group has let a block go.
        """
        return self._tables[key][group]

    def blocks_of(self, key: Hashable) -> list[int]:
        """The blocks that the sequence holds, in all groups."""
        return [block for table in self._tables[key] for block in table if block != NO_BLOCK]

    def num_live_tokens(self, lengths: Mapping[Hashable, int]) -> int:
        """Tokens of sequences of these lengths in group 0; those in shared blocks count once."""
        full: set[int] = set()
        for key, length in lengths.items():
            full.update(self._tables[key][0][: length // self.block_size])
        rest = sum([length % self.block_size for length in lengths.values()])
        return len(full - {NO_BLOCK}) * self.block_size + rest

    def holders(self) -> set[Hashable]:
        """The keys of all sequences that hold tables."""
        return set(self._tables)

    def free(self, key: Hashable, *, keep_cached: bool = True) -> None:
        """Take all blocks of the sequence back; IntegrityError when it holds none.

        keep_cached: published blocks can still be found by others, until they are evicted.
        """
        if key not in self._tables:
            raise IntegrityError(f"sequence {key!r} was freed, but it holds no blocks")
        self._release(self._tables.pop(key), keep_cached=keep_cached)

    def _release(self, tables: tuple[array[int], ...], *, keep_cached: bool = True) -> None:
        # The last block first: free blocks form a stack, so the next sequence gets the same ones in
        # order; and it is evicted before the blocks before it, without which it is worthless.
        for table in tables:
            for block in reversed(table):
                if block == NO_BLOCK:
                    continue
                if not keep_cached and self.pool.num_holders(block) == 1:
                    self.pool.withdraw(block)
                self.pool.release(block)

    def check_integrity(self) -> None:
        """Every block is free or held by the tables that name it; IntegrityError if not."""
        num_holders: Counter[int] = Counter()
        for key in self._tables:
            held = self.blocks_of(key)
            if len(set(held)) != len(held):
                raise IntegrityError(f"sequence {key!r} holds a block twice: {held}")
            num_holders.update(held)
        self.pool.check_integrity(num_holders)

    def check_sequence(self, key: Hashable, num_computed_tokens: int) -> None:
        """It holds what it computed and sees, within its windows' bounds; else IntegrityError.

        And it shares no block that it will write to.
        """
        first_written = num_computed_tokens // self.block_size
        for window, table in zip(self.groups.windows, self._tables[key], strict=True):
            seen = table[self.groups.first_seen(window, num_computed_tokens) :]
            num_held = len(table) - table.count(NO_BLOCK)
            if len(table) < self.groups.blocks_in_group(num_computed_tokens) or NO_BLOCK in seen:
                raise IntegrityError(f"sequence {key!r} lacks blocks of {table.tolist()}")
            if num_held > self.groups.most_held(window, len(table) * self.block_size):
                raise IntegrityError(f"sequence {key!r} holds {num_held} blocks, window {window}")
            for block in table[first_written:]:
                if self.pool.num_holders(block) != 1 or self.pool.is_published(block):
                    raise IntegrityError(f"sequence {key!r} will write to block {block}, shared")
