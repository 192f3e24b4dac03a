"""Blocks: taken, given back, never twice."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.engine.block_hash import extend_block_hashes
from octavo.engine.block_manager import BlockCopy, BlockManager, Prefix
from octavo.engine.block_pool import BlockPool, IntegrityError
from octavo.errors import InvalidArgumentError

BLOCK = 4


def names_of(tokens: list[int], salt: str | None = None) -> list[bytes]:
    names: list[bytes] = []
    extend_block_hashes(names, tokens, len(tokens), BLOCK, salt)
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
    with pytest.raises(IntegrityError, match="block 1 was released, but nobody holds it"):
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
        extend_block_hashes(grown, tokens, length, BLOCK, None)
    assert grown == names


def test_a_published_beginning_is_found_and_shared() -> None:
    blocks = BlockManager(num_blocks=8, block_size=BLOCK)
    tokens = list(range(11))
    blocks.start("a", 11)
    assert blocks.find_prefix(names_of(tokens), 10) == Prefix([], 0)  # not computed yet
    publish_all(blocks, "a", tokens)
    prefix = blocks.find_prefix(names_of([*tokens[:8], 77, 78, 79, 80]), 11)
    assert prefix == Prefix([0, 1], 8)
    assert blocks.num_blocks_needed(12, prefix) == 1
    assert blocks.start("b", 12, prefix) == []
    assert blocks.block_table("b").tolist() == [0, 1, 3]
    blocks.check_integrity()
    blocks.free("a")
    assert blocks.num_free_blocks == 5  # b still holds the first two
    assert blocks.find_prefix(names_of(tokens), 10) == Prefix([0, 1], 8)
    blocks.free("b")
    assert blocks.num_free_blocks == 8
    assert blocks.pool.num_cached == 2
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
    assert prefix == Prefix([0, 1], 7)
    assert blocks.num_blocks_needed(8, prefix) == (1 if is_held else 2)
    copies = blocks.start("b", 8, prefix)
    if is_held:  # a reads its block: b gets a copy
        assert copies == [BlockCopy(1, 2)]
        assert blocks.block_table("b").tolist() == [0, 2]
    else:  # nobody reads it: b takes it, and nobody else may find it while b writes there
        assert copies == []
        assert blocks.block_table("b").tolist() == [0, 1]
        assert blocks.find_prefix(names_of(tokens), 7) == Prefix([0], 4)
    blocks.check_integrity()


def test_a_fork_shares_full_blocks_and_copies_the_rest() -> None:
    blocks = BlockManager(num_blocks=8, block_size=BLOCK)
    blocks.start("a", 10)
    table = blocks.block_table("a")
    assert blocks.start("b", 10, Prefix(table[:3], 9)) == [BlockCopy(2, 3)]
    assert blocks.start("c", 9, Prefix(table[:2], 8)) == []
    assert blocks.block_table("b").tolist() == [0, 1, 3]
    assert blocks.block_table("c").tolist() == [0, 1, 4]
    blocks.check_integrity()
    for key in "abc":
        blocks.free(key)
        blocks.check_integrity()
    assert blocks.num_free_blocks == 8 and blocks.pool.num_cached == 0


def test_eviction_takes_the_least_recently_used_and_tails_first() -> None:
    blocks = BlockManager(num_blocks=6, block_size=BLOCK)
    old, new = list(range(12)), list(range(50, 62))
    for key, tokens in (("old", old), ("new", new)):
        blocks.start(key, 12)
        publish_all(blocks, key, tokens)
    blocks.free("old")
    blocks.free("new")
    blocks.start("a", 4)  # evicts one: the tail of the one that was freed first
    assert blocks.pool.num_evictions == 1
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
    assert blocks.find_prefix(names_of(tokens), 8) == Prefix([0], 4)  # what others hold stays
    blocks.check_integrity()


def test_clearing_the_cache_leaves_holders_alone() -> None:
    blocks = BlockManager(num_blocks=6, block_size=BLOCK)
    for key, tokens in (("a", list(range(8))), ("b", list(range(20, 28)))):
        blocks.start(key, 8)
        publish_all(blocks, key, tokens)
    blocks.free("b")
    blocks.pool.clear_cache()
    blocks.check_integrity()
    assert blocks.pool.num_cached == 0 and blocks.num_free_blocks == 4
    assert blocks.find_prefix(names_of(list(range(8))), 8) == Prefix([], 0)
    assert blocks.block_table("a").tolist() == [0, 1]


@pytest.mark.parametrize(
    "damage", ["twice", "lost", "range", "holders", "free", "name", "blank", "freed"]
)
def test_integrity_check_finds_damage(damage: str) -> None:
    blocks = BlockManager(num_blocks=8, block_size=2)
    blocks.start("a", 4)
    blocks.start("b", 2)
    blocks.start("c", 2)
    blocks.publish("a", 0, b"x")
    blocks.publish("c", 0, b"y")
    blocks.free("c")
    blocks.check_integrity()
    table, pool = blocks.block_table("a"), blocks.pool
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
    else:
        pool.release(table[0])
    with pytest.raises(IntegrityError):
        blocks.check_integrity()


class BlockManagerMachine(RuleBasedStateMachine):
    """Random calls beside a model that keeps what every block holds, token by token.

    A sequence's tokens are drawn from two letters, so that beginnings often agree.
    """

    NUM_BLOCKS = 9

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(self.NUM_BLOCKS, BLOCK)
        self.tokens: dict[int, list[int]] = {}  # of each sequence, all computed
        self.content: dict[int, list[int]] = {}  # of each block, as it was last written

    def store(self, key: int, start: int) -> None:
        """Compute the tokens from `start` on, and publish the full blocks."""
        tokens, table = self.tokens[key], self.blocks.block_table(key)
        for index in range(start // BLOCK, len(table)):
            assert self.blocks.pool.num_holders(table[index]) == 1
            assert not self.blocks.pool.is_published(table[index])
            kept = self.content.get(table[index], [])[: max(0, start - index * BLOCK)]
            new = tokens[index * BLOCK + len(kept) : (index + 1) * BLOCK]
            self.content[table[index]] = kept + new
        for index, name in enumerate(names_of(tokens)):
            self.blocks.publish(key, index, name)

    def begin(self, key: int, tokens: list[int], prefix: Prefix) -> None:
        if self.blocks.num_blocks_needed(len(tokens), prefix) > self.blocks.num_free_blocks:
            return
        free = self.blocks.num_free_blocks
        needed = self.blocks.num_blocks_needed(len(tokens), prefix)
        for copy in self.blocks.start(key, len(tokens), prefix):
            self.content[copy.destination] = list(self.content[copy.source])
        assert self.blocks.num_free_blocks == free - needed
        self.tokens[key] = tokens
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
        blocks = self.blocks.block_table(parent)[: self.blocks.blocks_for(num_alike)]
        self.begin(key, tokens[: num_alike + 1], Prefix(blocks, num_alike))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def grow(self, data: st.DataObject, more: list[int]) -> None:
        key = data.draw(st.sampled_from(sorted(self.tokens)))
        length = len(self.tokens[key])
        missing = self.blocks.blocks_for(length + len(more)) - self.blocks.blocks_for(length)
        fits = missing <= self.blocks.num_free_blocks
        assert self.blocks.reserve(key, length + len(more)) == fits
        if fits:
            self.tokens[key] = [*self.tokens[key], *more]
            self.store(key, length)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), keep_cached=st.booleans())
    def free(self, data: st.DataObject, keep_cached: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.tokens)))
        self.blocks.free(key, keep_cached=keep_cached)
        del self.tokens[key]

    @invariant()
    def books_agree(self) -> None:
        self.blocks.check_integrity()
        used = {block for key in self.tokens for block in self.blocks.block_table(key)}
        assert self.blocks.num_free_blocks == self.NUM_BLOCKS - len(used)
        assert self.blocks.holders() == self.tokens.keys()

    @invariant()
    def every_sequence_reads_what_it_wrote(self) -> None:
        for key, tokens in self.tokens.items():
            found: list[int] = []
            for block in self.blocks.block_table(key):
                found += self.content[block]
            assert found[: len(tokens)] == tokens


TestBlockManagerMachine = BlockManagerMachine.TestCase


def test_scheduling_is_pure_python() -> None:
    program = (
        "import sys, octavo.engine.scheduler, octavo.engine.events\n"
        "print([m for m in ('numpy', 'octavo._native') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
