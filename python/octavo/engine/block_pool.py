"""The blocks of the KV cache: how many sequences hold each, their names, and which are free.

A block is in one of three states:

    held       by one or more sequences, which all read it
    cached     held by no sequence, but named: the next prompt that begins alike may use it again
    blank      held by no sequence, and without a name

Cached and blank blocks are both free. `take` prefers a blank one; with none left it evicts the
cached block that has been free for longest (least recently used). A name is one of a KV group: the
same tokens lie in one block of each group.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as SequenceOf


class IntegrityError(RuntimeError):
    """The engine's own accounting is inconsistent: a bug in octavo, never a user's mistake."""


class BlockPool:
    """Counts the holders of each of num_blocks blocks, and finds the published ones by name."""

    def __init__(self, num_blocks: int, num_groups: int = 1) -> None:
        self.num_blocks = num_blocks
        self.num_evictions = 0
        self._num_holders = [0] * num_blocks
        self._name: list[tuple[int, bytes] | None] = [None] * num_blocks
        self._by_name: tuple[dict[bytes, int], ...] = tuple({} for _ in range(num_groups))
        # A stack, reversed so that a fresh pool hands out 0, 1, 2, ...
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # the one free for longest first

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Free blocks whose content could be used again."""
        return len(self._cached)

    def num_holders(self, block: int) -> int:
        """How many sequences hold the block."""
        return self._num_holders[block]

    def is_published(self, block: int) -> bool:
        """Whether the block can be found by its name."""
        return self._name[block] is not None

    def find(self, name: bytes, group: int = 0) -> int | None:
        """The group's block of this name, held or free."""
        return self._by_name[group].get(name)

    def find_leading(self, names: SequenceOf[bytes], group: int = 0) -> list[int]:
        """The group's blocks of these names, up to the first name that has none."""
        blocks: list[int] = []
        by_name = self._by_name[group]
        for name in names:
            block = by_name.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def take(self) -> int:
        """Hold a free block and forget its content; IntegrityError when none is free."""
        if self._blank:
            block = self._blank.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
            self.num_evictions += 1
        else:
            raise IntegrityError("a block was taken from an empty pool")
        self._num_holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """Hold a published block; others may hold it too."""
        if not self._num_holders[block]:
            if block not in self._cached:
                raise IntegrityError(f"block {block} was held, but it is blank")
            del self._cached[block]
        self._num_holders[block] += 1

    def release(self, block: int) -> None:
        """Stop holding the block; IntegrityError if it was not held."""
        if self._num_holders[block] < 1:
            raise IntegrityError(f"block {block} was released, but no sequence holds it")
        self._num_holders[block] -= 1
        if not self._num_holders[block]:
            if self._name[block] is None:
                self._blank.append(block)
            else:
                self._cached[block] = None

    def publish(self, block: int, name: bytes, group: int = 0) -> None:
        """Let a held block be found by its name; the first block of a name keeps it."""
        if name not in self._by_name[group] and self._name[block] is None:
            self._by_name[group][name] = block
            self._name[block] = group, name

    def withdraw(self, block: int) -> None:
        """Take the name from a held block that will be written to."""
        if self._name[block] is not None:
            self._forget(block)

    def _forget(self, block: int) -> None:
        named = self._name[block]
        if named is not None:
            group, name = named
            del self._by_name[group][name]
            self._name[block] = None

    def check_integrity(self, num_holders: dict[int, int]) -> None:
        """The accounting is consistent, and agrees with the holders; IntegrityError if not.

        num_holders: of every block that some sequence holds, how many do.
        """
        free = [*self._blank, *self._cached]
        for block in {*free, *num_holders}:
            if not 0 <= block < self.num_blocks:
                raise IntegrityError(f"there is no block {block}, only {self.num_blocks}")
        if len(free) != len(set(free)):
            raise IntegrityError(f"a block is free twice: {sorted(free)}")
        is_free = set(free)
        for block, counted in enumerate(self._num_holders):
            if counted != num_holders.get(block, 0):
                raise IntegrityError(
                    f"block {block} counts {counted} holders; {num_holders.get(block, 0)} hold it"
                )
            if (counted == 0) != (block in is_free):
                raise IntegrityError(f"block {block} has {counted} holders: lost, or wrongly free")
        for block, named in enumerate(self._name):
            if named is not None and self._by_name[named[0]].get(named[1]) != block:
                raise IntegrityError(f"block {block} cannot be found by its own name")
        if sum(map(len, self._by_name)) != sum(named is not None for named in self._name):
            raise IntegrityError("a name leads to a block that does not bear it")
        for block in self._blank:
            if self._name[block] is not None:
                raise IntegrityError(f"block {block} is blank, but has a name")
        for block in self._cached:
            if self._name[block] is None:
                raise IntegrityError(f"block {block} is cached, but has no name")
