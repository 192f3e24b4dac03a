"""Blocks: taken, given back, never twice."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.engine.block_manager import NO_BLOCK, BlockCopy, BlockManager, Prefix
from octavo.engine.block_pool import BlockPool, IntegrityError
from octavo.engine.prefix_cache import extend_block_hashes
from octavo.errors import InvalidArgumentError

BLOCK = 4


def names_of(tokens: list[int], salt: str | None = None) -> list[bytes]:
    names: list[bytes] = []
    extend_block_hashes(names, tokens, BLOCK, salt)
    return names


def publish_all(blocks: BlockManager, key: str, tokens: list[int], salt: str | None = None) -> None:
    for index, name in enumerate(names_of(tokens, salt)):
        blocks.publish(key, index, name)


def test_tables_cover_the_tokens_asked_for() -> None:
    blocks = BlockManager(num_blocks=10, block_size=4)
    assert [blocks.blocks_for(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]
    assert blocks.start("a", 5) == []
    assert blocks.block_table("a").tolist() == [0, 1]
    assert blocks.reserve("a", 8)  # still within the second block
    assert blocks.num_free_blocks == 8
    blocks.start("b", 9)
    assert blocks.reserve("a", 9)
    assert blocks.block_table("a").tolist() == [0, 1, 5]
    blocks.check_integrity()
    blocks.free("a")
    assert blocks.num_free_blocks == 7
    blocks.start("c", 12)
    assert blocks.block_table("c").tolist() == [0, 1, 5]  # as they were, in order


def test_too_few_blocks_change_nothing() -> None:
    blocks = BlockManager(num_blocks=3, block_size=4)
    blocks.start("a", 6)
    assert not blocks.reserve("a", 17)
    assert blocks.num_blocks_needed(5) == 2
    assert blocks.block_table("a").tolist() == [0, 1]
    assert blocks.holders() == {"a"}
    assert blocks.num_free_blocks == 1
    blocks.check_integrity()


@pytest.mark.parametrize("values", [(0, 4), (4, 0)])
def test_sizes_must_be_positive(values: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgumentError, match="is 0; expected 1 or more"):
        BlockManager(*values)


def test_misuse_is_found() -> None:
    blocks = BlockManager(num_blocks=4, block_size=2)
    blocks.start("a", 3)
    with pytest.raises(IntegrityError, match="'a' holds blocks already"):
        blocks.start("a", 3)
    blocks.free("a")
    with pytest.raises(IntegrityError, match="'a' was freed"):
        blocks.free("a")
    with pytest.raises(IntegrityError, match="empty pool"):
        blocks.start("b", 9)
    pool = BlockPool(2)
    with pytest.raises(IntegrityError, match="block 1 was released, but no sequence holds it"):
        pool.release(1)
    with pytest.raises(IntegrityError, match="block 1 was held, but it is blank"):
        pool.hold(1)


def test_names_depend_on_all_that_came_before_and_on_the_salt() -> None:
    tokens = [5, 1, 4, 4, 9, 2, 6, 5, 3]
    names = names_of(tokens)
    assert len(names) == 2  # the ninth token fills no block
    assert names_of(tokens[:8]) == names
    assert names_of([6, *tokens[1:]])[1] != names[1]
    assert names_of(tokens, "tenant") != names
    assert names_of(tokens, "tenant")[1] != names_of(tokens, "other")[1]
    assert names_of(tokens, "") != names  # an empty salt is one too
    assert names_of(tokens[4:])[0] != names[1]
    grown: list[bytes] = []
    for length in (3, 4, 7, 9):
        extend_block_hashes(grown, tokens[:length], BLOCK, None)
    assert grown == names


def test_a_published_beginning_is_found_and_shared() -> None:
    blocks = BlockManager(num_blocks=8, block_size=BLOCK)
    tokens = list(range(11))
    blocks.start("a", 11)
    assert blocks.find_prefix(names_of(tokens), 10) == Prefix(([],), 0)  # not computed yet
    publish_all(blocks, "a", tokens)
    prefix = blocks.find_prefix(names_of([*tokens[:8], 77, 78, 79, 80]), 11)
    assert prefix == Prefix(([0, 1],), 8)
    assert blocks.num_blocks_needed(12, prefix) == 1
    assert blocks.start("b", 12, prefix) == []
    assert blocks.block_table("b").tolist() == [0, 1, 3]
    blocks.check_integrity()
    blocks.free("a")
    assert blocks.num_free_blocks == 5  # b still holds the first two
    assert blocks.find_prefix(names_of(tokens), 10) == Prefix(([0, 1],), 8)
    blocks.free("b")
    assert blocks.num_free_blocks == 8
    assert blocks.pools[0].num_cached == 2
    assert blocks.find_prefix(names_of(tokens, "salt"), 10).num_tokens == 0


@pytest.mark.parametrize("is_held", [True, False])
def test_the_last_token_of_a_known_prompt_is_computed_in_a_block_of_its_own(is_held: bool) -> None:
    blocks = BlockManager(num_blocks=5, block_size=BLOCK)
    tokens = list(range(8))
    blocks.start("a", 8)
    publish_all(blocks, "a", tokens)
    if not is_held:
        blocks.free("a")
    prefix = blocks.find_prefix(names_of(tokens), 7)
    assert prefix == Prefix(([0, 1],), 7)
    assert blocks.num_blocks_needed(8, prefix) == (1 if is_held else 2)
    copies = blocks.start("b", 8, prefix)
    if is_held:  # a reads its block: b gets a copy
        assert copies == [BlockCopy(0, 1, 2)]
        assert blocks.block_table("b").tolist() == [0, 2]
    else:  # nobody reads it: b takes it, and nobody else may find it while b writes there
        assert copies == []
        assert blocks.block_table("b").tolist() == [0, 1]
        assert blocks.find_prefix(names_of(tokens), 7) == Prefix(([0],), 4)
    blocks.check_integrity()


def test_a_fork_shares_full_blocks_and_copies_the_rest() -> None:
    blocks = BlockManager(num_blocks=8, block_size=BLOCK)
    blocks.start("a", 10)
    table = blocks.block_table("a")
    assert blocks.start("b", 10, Prefix((table[:3],), 9)) == [BlockCopy(0, 2, 3)]
    assert blocks.start("c", 9, Prefix((table[:2],), 8)) == []
    assert blocks.block_table("b").tolist() == [0, 1, 3]
    assert blocks.block_table("c").tolist() == [0, 1, 4]
    blocks.check_integrity()
    for key in "abc":
        blocks.free(key)
        blocks.check_integrity()
    assert blocks.num_free_blocks == 8 and blocks.pools[0].num_cached == 0


def test_eviction_takes_the_least_recently_used_and_tails_first() -> None:
    blocks = BlockManager(num_blocks=6, block_size=BLOCK)
    old, new = list(range(12)), list(range(50, 62))
    for key, tokens in (("old", old), ("new", new)):
        blocks.start(key, 12)
        publish_all(blocks, key, tokens)
    blocks.free("old")
    blocks.free("new")
    blocks.start("a", 4)  # evicts one: the tail of the one that was freed first
    assert blocks.pools[0].num_evictions == 1
    assert blocks.find_prefix(names_of(old), 12).num_tokens == 8
    # Using the old one makes it the more recent.
    blocks.start("again", 8, blocks.find_prefix(names_of(old), 12))
    blocks.free("again")
    blocks.start("b", 12)
    assert blocks.find_prefix(names_of(new), 12).num_tokens == 0
    assert blocks.find_prefix(names_of(old), 12).num_tokens == 8
    blocks.check_integrity()


def test_what_a_failed_sequence_computed_is_not_found_again() -> None:
    blocks = BlockManager(num_blocks=6, block_size=BLOCK)
    tokens = list(range(8))
    blocks.start("bad", 8)
    publish_all(blocks, "bad", tokens)
    blocks.start("other", 6, blocks.find_prefix(names_of(tokens), 4))
    blocks.free("bad", keep_cached=False)
    assert blocks.find_prefix(names_of(tokens), 8) == Prefix(([0],), 4)  # what others hold stays
    blocks.check_integrity()


def test_a_window_lets_blocks_go_in_its_own_group() -> None:
    blocks = BlockManager(num_blocks=6, block_size=BLOCK, num_groups=2)
    tokens = list(range(14))
    blocks.start("a", 14)
    publish_all(blocks, "a", tokens)
    blocks.release_before("a", 1, 7)  # its first block alone lies wholly before token 7
    assert blocks.block_table("a", 0).tolist() == [0, 1, 2, 3]
    assert blocks.block_table("a", 1).tolist() == [NO_BLOCK, 1, 2, 3]
    assert [pool.num_free for pool in blocks.pools] == [2, 3] and blocks.num_free_blocks == 2
    assert blocks.num_blocks_freed("a") == 3
    assert blocks.prefix_of("a", 9) is None  # another answer may need what is gone
    assert blocks.find_prefix(names_of(tokens), 9) == Prefix(([0, 1, 2], [0, 1, 2]), 9)
    blocks.check_integrity()
    blocks.release_before("a", 1, 12)
    blocks.release_before("a", 1, 5)  # a window never goes back
    assert blocks.block_table("a", 1).tolist() == [NO_BLOCK] * 3 + [3]
    assert blocks.reserve("a", 17)
    assert blocks.block_table("a", 1).tolist() == [NO_BLOCK] * 3 + [3, 4]
    # What the one group has evicted is not found, though the other one still has it.
    blocks.reserve("a", 24)
    assert blocks.find_prefix(names_of(tokens), 12).num_tokens == 12
    blocks.pools[1].release(blocks.pools[1].take())
    assert blocks.find_prefix(names_of(tokens), 12) == Prefix(([], []), 0)
    blocks.free("a")
    blocks.check_integrity()
    assert blocks.num_free_blocks == 6


@pytest.mark.parametrize(
    "damage", ["twice", "lost", "range", "holders", "free", "name", "blank", "freed", "lengths"]
)
def test_integrity_check_finds_damage(damage: str) -> None:
    blocks = BlockManager(num_blocks=8, block_size=2, num_groups=2)
    blocks.start("a", 4)
    blocks.start("b", 2)
    blocks.start("c", 2)
    blocks.publish("a", 0, b"x")
    blocks.publish("c", 0, b"y")
    blocks.free("c")
    blocks.check_integrity()
    table, pool = blocks.block_table("a"), blocks.pools[0]
    if damage == "twice":
        table[0] = table[1]
    elif damage == "lost":
        table.pop()
    elif damage == "range":
        table[0] = 8
    elif damage == "holders":
        pool._num_holders[table[0]] = 2
    elif damage == "free":
        pool._blank.append(pool._blank[0])
    elif damage == "name":
        pool._by_name[b"x"] = table[1]
    elif damage == "blank":
        pool._name[pool._blank[0]] = b"z"
    elif damage == "freed":
        pool.release(table[0])
    else:
        pool.release(table.pop())
    with pytest.raises(IntegrityError):
        blocks.check_integrity()


class BlockManagerMachine(RuleBasedStateMachine):
    """Random calls beside a model that keeps what every block holds, token by token.

    A sequence's tokens are drawn from two letters, so that beginnings often agree. There are two
    KV groups, which hand out their blocks in different orders.
    """

    NUM_BLOCKS = 9
    GROUPS = range(2)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(self.NUM_BLOCKS, BLOCK, len(self.GROUPS))
        self.blocks.pools[1]._blank.reverse()
        self.tokens: dict[int, list[int]] = {}  # of each sequence, all computed
        self.released: dict[int, list[int]] = {}  # of each sequence: blocks let go of, by group
        # Of each group and block, as it was last written.
        self.content: dict[tuple[int, int], list[int]] = {}

    def store(self, key: int, start: int) -> None:
        """Compute the tokens from `start` on, and publish the full blocks."""
        tokens = self.tokens[key]
        for group in self.GROUPS:
            table, pool = self.blocks.block_table(key, group), self.blocks.pools[group]
            for index in range(start // BLOCK, len(table)):
                assert pool.num_holders(table[index]) == 1
                assert not pool.is_published(table[index])
                old = self.content.get((group, table[index]), [])
                kept = old[: max(0, start - index * BLOCK)]
                new = tokens[index * BLOCK + len(kept) : (index + 1) * BLOCK]
                self.content[group, table[index]] = kept + new
        for index, name in enumerate(names_of(tokens)):
            self.blocks.publish(key, index, name)

    def begin(self, key: int, tokens: list[int], prefix: Prefix) -> None:
        if self.blocks.num_blocks_needed(len(tokens), prefix) > self.blocks.num_free_blocks:
            return
        free = [pool.num_free for pool in self.blocks.pools]
        needed = self.blocks.num_blocks_needed(len(tokens), prefix)
        for group, source, destination in self.blocks.start(key, len(tokens), prefix):
            self.content[group, destination] = list(self.content[group, source])
        taken = [a - pool.num_free for a, pool in zip(free, self.blocks.pools, strict=True)]
        assert max(taken) == needed
        self.tokens[key] = tokens
        self.released[key] = [0, 0]
        self.store(key, prefix.num_tokens)

    @rule(key=st.integers(0, 4), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def start(self, key: int, tokens: list[int]) -> None:
        if key not in self.tokens:
            prefix = self.blocks.find_prefix(names_of(tokens), len(tokens) - 1)
            self.begin(key, tokens, prefix)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), key=st.integers(5, 7))
    def fork(self, data: st.DataObject, key: int) -> None:
        parent = data.draw(st.sampled_from(sorted(self.tokens)))
        if key in self.tokens:
            return
        tokens = self.tokens[parent]
        num_alike = data.draw(st.integers(0, len(tokens) - 1))
        prefix = self.blocks.prefix_of(parent, num_alike)
        assert (prefix is None) == (num_alike > 0 and any(self.released[parent]))
        self.begin(key, tokens[: num_alike + 1], prefix or Prefix((), 0))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def grow(self, data: st.DataObject, more: list[int]) -> None:
        key = data.draw(st.sampled_from(sorted(self.tokens)))
        num_spare = data.draw(st.sampled_from([0, 0, 1]))
        length = len(self.tokens[key])
        missing = self.blocks.blocks_for(length + len(more)) - self.blocks.blocks_for(length)
        fits = not missing or missing <= self.blocks.num_free_blocks - num_spare
        assert self.blocks.reserve(key, length + len(more), num_spare) == fits
        if fits:
            self.tokens[key] = [*self.tokens[key], *more]
            self.store(key, length)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), group=st.sampled_from([0, 1, 1]))
    def move_window(self, data: st.DataObject, group: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.tokens)))
        position = data.draw(st.integers(0, len(self.tokens[key])))
        self.blocks.release_before(key, group, position)
        self.released[key][group] = max(self.released[key][group], position // BLOCK)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), keep_cached=st.booleans())
    def free(self, data: st.DataObject, keep_cached: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.tokens)))
        free = [pool.num_free for pool in self.blocks.pools]
        expected = self.blocks.num_blocks_freed(key)
        self.blocks.free(key, keep_cached=keep_cached)
        freed = [pool.num_free - a for a, pool in zip(free, self.blocks.pools, strict=True)]
        assert min(freed) == expected
        del self.tokens[key], self.released[key]

    @invariant()
    def books_agree(self) -> None:
        self.blocks.check_integrity()
        for group in self.GROUPS:
            tables = [self.blocks.block_table(key, group) for key in self.tokens]
            used = {block for table in tables for block in table} - {NO_BLOCK}
            assert self.blocks.pools[group].num_free == self.NUM_BLOCKS - len(used)
        assert self.blocks.num_free_blocks == min(pool.num_free for pool in self.blocks.pools)
        assert self.blocks.holders() == self.tokens.keys()
        for key, tokens in self.tokens.items():
            self.blocks.check_sequence(key, len(tokens))

    @invariant()
    def every_sequence_reads_what_it_wrote(self) -> None:
        for key, tokens in self.tokens.items():
            for group in self.GROUPS:
                num_released = self.released[key][group]
                table = self.blocks.block_table(key, group)
                assert table[:num_released].tolist() == [NO_BLOCK] * num_released
                found: list[int] = []
                for block in table[num_released:]:
                    found += self.content[group, block]
                own = tokens[num_released * BLOCK :]
                assert found[: len(own)] == own


TestBlockManagerMachine = BlockManagerMachine.TestCase


def test_scheduling_is_pure_python() -> None:
    program = (
        "import sys, octavo.engine.scheduler, octavo.engine.events\n"
        "print([m for m in ('numpy', 'octavo._native') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
