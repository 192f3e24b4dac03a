"""Blocks: taken, given back, never twice."""

from __future__ import annotations

import pytest

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
    assert [blocks.groups.blocks_in_group(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]
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
    assert blocks.find_prefix(names_of(tokens), 8) == Prefix(([0],), 4)  # what others hold stays
    blocks.check_integrity()


def test_a_window_lets_blocks_go_in_its_own_group() -> None:
    blocks = BlockManager(12, BLOCK, windows=(0, 6), num_in_flight=8)
    tokens = list(range(14))
    assert blocks.num_blocks_needed(14) == 8
    blocks.start("a", 14)
    publish_all(blocks, "a", tokens)
    blocks.advance("a", 9)  # token 9 sees 4 to 9, but token 8 sees token 3
    assert blocks.block_table("a", 1).tolist() == [4, 5, 6, 7]
    blocks.advance("a", 10)
    assert blocks.block_table("a", 0).tolist() == [0, 1, 2, 3]
    assert blocks.block_table("a", 1).tolist() == [NO_BLOCK, 5, 6, 7]
    assert blocks.num_free_blocks == 5 and blocks.num_blocks_freed("a") == 7
    blocks.check_sequence("a", 14)
    assert blocks.prefix_of("a", 8) is None  # another answer would need what is gone
    prefix = blocks.prefix_of("a", 9)
    assert prefix is not None and prefix.num_tokens == 9
    assert [blocks.tolist() for blocks in prefix.blocks] == [[0, 1, 2], [NO_BLOCK, 5, 6]]
    # By its name it can still be found.
    assert blocks.find_prefix(names_of(tokens), 8) == Prefix(([0, 1], [4, 5]), 8)
    blocks.advance("a", 14)
    blocks.advance("a", 11)  # a window never goes back
    assert blocks.block_table("a", 1).tolist() == [NO_BLOCK] * 2 + [6, 7]
    assert blocks.reserve("a", 17)
    assert blocks.block_table("a", 1).tolist() == [NO_BLOCK] * 2 + [6, 7, 9]
    blocks.free("a")
    blocks.check_integrity()
    assert blocks.num_free_blocks == 12


def test_a_window_that_was_passed_too_early_is_found() -> None:
    blocks = BlockManager(6, BLOCK, windows=(6,), num_in_flight=8)
    blocks.start("a", 14)
    blocks.advance("a", 14)
    blocks.check_sequence("a", 13)
    with pytest.raises(IntegrityError, match="lacks blocks"):
        blocks.check_sequence("a", 12)


def test_a_beginning_is_found_where_the_window_before_its_end_is() -> None:
    """All of it in the group that sees everything; of the other one what the next token sees."""
    blocks = BlockManager(16, BLOCK, windows=(0, 6), num_in_flight=99)
    tokens = list(range(24))
    names = names_of(tokens)
    blocks.start("a", 24)
    publish_all(blocks, "a", tokens)
    own = [blocks.block_table("a", group).tolist() for group in range(2)]
    blocks.free("a")

    def found(without: list[tuple[int, int]], max_tokens: int = 24) -> int:
        """The length found while some blocks (group, index) have no name."""
        lost = [(own[group][index], names[index], group) for group, index in without]
        for block, _, _ in lost:
            blocks.pool._forget(block)
        prefix = blocks.find_prefix(names, max_tokens)
        for block, name, group in lost:
            blocks.pool._by_name[group][name] = block
            blocks.pool._name[block] = group, name
        first = max(prefix.num_tokens - 5, 0) // 4
        count = -(-prefix.num_tokens // 4)
        assert prefix.blocks[0] == own[0][:count]
        assert prefix.blocks[1] == [NO_BLOCK] * first + own[1][first:count]
        return prefix.num_tokens

    assert found([]) == 24 and found([], 23) == 23 and found([], 3) == 3
    assert found([(0, 5)]) == 20 and found([(0, 2), (0, 5)]) == 8 and found([(0, 0)]) == 0
    # Token 24 sees 19 to 24: the blocks before 16 are not needed.
    assert found([(1, index) for index in range(4)]) == 24
    assert found([(1, 4)]) == 16  # token 16 sees from 11 on
    assert found([(1, 4)], 19) == 16
    assert found([(1, 1), (1, 4)]) == 16 and found([(1, 2), (1, 4)]) == 8
    assert found([(1, 0), (1, 3)]) == 24 and found([(1, 0), (1, 2), (1, 4)]) == 0
    assert found([(0, 4), (1, 0)]) == 16 and found([(0, 3), (1, 1)]) == 4
    assert found([(1, 3)], 17) == 12


def test_blocks_of_a_long_prompt_come_with_the_window() -> None:
    """However long it is: the window, the tokens in flight, and a block at most."""
    blocks = BlockManager(100, BLOCK, windows=(0, 7), num_in_flight=5)
    blocks.start("a", 83)
    assert [len(blocks.block_table("a", group)) for group in range(2)] == [21, 4]
    for end in range(5, 84, 3):
        assert blocks.reserve("a", end)
        table = blocks.block_table("a", 1)
        assert len(table) - table.count(NO_BLOCK) <= 4
        blocks.check_sequence("a", end)
        blocks.advance("a", end)
    groups = blocks.groups
    assert [groups.blocks_in_all(length) for length in (83, 3, 12)] == [25, 2, 6]
    assert groups.longest(25) == 84 and groups.longest(24) == 80 and groups.longest(6) == 12
    assert BlockManager(4, BLOCK, windows=(7,), num_in_flight=5).num_tokens_capacity > 10**9
    assert BlockManager(3, BLOCK, windows=(7,), num_in_flight=5).num_tokens_capacity == 12


def test_what_is_shared_is_held_before_any_block_is_taken() -> None:
    """A free block that a group takes could be one that the other group is to share."""
    blocks = BlockManager(6, BLOCK, windows=(0, 0))
    tokens = list(range(12))
    blocks.start("a", 8)
    publish_all(blocks, "a", tokens[:8])
    blocks.free("a")
    blocks.start("b", 4)  # the two blank ones
    prefix = blocks.find_prefix(names_of(tokens), 7)
    assert blocks.num_blocks_needed(8, prefix) == blocks.num_free_blocks == 4
    blocks.start("c", 8, prefix)
    assert [blocks.block_table("c", g).tolist() for g in range(2)] == list(prefix.blocks)
    blocks.check_integrity()


@pytest.mark.parametrize(
    "damage", ["twice", "lost", "range", "holders", "free", "name", "blank", "freed", "groups"]
)
def test_integrity_check_finds_damage(damage: str) -> None:
    blocks = BlockManager(num_blocks=16, block_size=2, windows=(0, 3))
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
        table[0] = 16
    elif damage == "holders":
        pool._num_holders[table[0]] = 2
    elif damage == "free":
        pool._blank.append(pool._blank[0])
    elif damage == "name":
        pool._by_name[0][b"x"] = table[1]
    elif damage == "blank":
        pool._name[pool._blank[0]] = 0, b"z"
    elif damage == "freed":
        pool.release(table[0])
    else:
        table[0] = blocks.block_table("a", 1)[0]
    with pytest.raises(IntegrityError):
        blocks.check_integrity()
