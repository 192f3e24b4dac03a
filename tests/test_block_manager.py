"""Blocks: taken, given back, never twice."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.engine.block_manager import BlockManager, IntegrityError
from octavo.errors import InvalidArgumentError


def test_tables_cover_the_tokens_asked_for() -> None:
    blocks = BlockManager(num_blocks=10, block_size=4)
    assert [blocks.blocks_for(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]
    assert blocks.reserve("a", 5)
    assert blocks.block_tables("a")[0].tolist() == [0, 1]
    assert blocks.reserve("a", 8)  # still within the second block
    assert blocks.num_free_blocks == 8
    assert blocks.reserve("b", 9)
    assert blocks.reserve("a", 9)
    assert blocks.block_tables("a")[0].tolist() == [0, 1, 5]
    blocks.check_integrity()
    blocks.free("a")
    assert blocks.num_free_blocks == 7
    assert blocks.reserve("c", 12)
    assert blocks.block_tables("c")[0].tolist() == [0, 1, 5]  # as they were, in order


def test_too_few_blocks_change_nothing() -> None:
    blocks = BlockManager(num_blocks=3, block_size=4)
    assert blocks.reserve("a", 6)
    assert not blocks.reserve("a", 17)
    assert not blocks.reserve("b", 5)
    assert blocks.block_tables("a")[0].tolist() == [0, 1]
    assert blocks.holders() == {"a"}
    assert blocks.num_free_blocks == 1
    blocks.check_integrity()


def test_every_kv_group_has_its_own_blocks() -> None:
    blocks = BlockManager(num_blocks=4, block_size=2, num_kv_groups=3)
    assert blocks.reserve("a", 3)
    assert blocks.reserve("b", 1)
    assert [table.tolist() for table in blocks.block_tables("a")] == [[0, 1]] * 3
    assert [table.tolist() for table in blocks.block_tables("b")] == [[2]] * 3
    blocks.free("a")
    blocks.check_integrity()
    assert blocks.num_free_blocks == 3


@pytest.mark.parametrize("values", [(0, 4, 1), (4, 0, 1), (4, 4, 0)])
def test_sizes_must_be_positive(values: tuple[int, int, int]) -> None:
    with pytest.raises(InvalidArgumentError, match="is 0; expected 1 or more"):
        BlockManager(*values)


def test_freeing_twice_is_found() -> None:
    blocks = BlockManager(num_blocks=4, block_size=2)
    blocks.reserve("a", 3)
    blocks.free("a")
    with pytest.raises(IntegrityError, match="'a' was freed"):
        blocks.free("a")


@pytest.mark.parametrize("damage", ["twice", "lost", "range", "uneven"])
def test_integrity_check_finds_damage(damage: str) -> None:
    blocks = BlockManager(num_blocks=6, block_size=2, num_kv_groups=2)
    blocks.reserve("a", 4)
    blocks.reserve("b", 2)
    blocks.check_integrity()
    table = blocks.block_tables("a")[1]
    if damage == "twice":
        table[0] = blocks.block_tables("b")[1][0]
    elif damage == "lost":
        table.pop()
    elif damage == "range":
        table[0] = 6
    else:
        blocks.block_tables("a")[0].append(blocks._pools[0].take())
    with pytest.raises(IntegrityError):
        blocks.check_integrity()


class BlockManagerMachine(RuleBasedStateMachine):
    """Random calls beside a model that only counts."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(num_blocks=9, block_size=3, num_kv_groups=2)
        self.num_tokens: dict[int, int] = {}

    def num_used(self) -> int:
        return sum(-(-tokens // 3) for tokens in self.num_tokens.values())

    @rule(key=st.integers(0, 4), num_tokens=st.integers(1, 30))
    def reserve(self, key: int, num_tokens: int) -> None:
        target = max(num_tokens, self.num_tokens.get(key, 0))
        grown = self.num_used() + -(-target // 3) - -(-self.num_tokens.get(key, 0) // 3)
        assert self.blocks.reserve(key, num_tokens) == (grown <= 9)
        if grown <= 9:
            self.num_tokens[key] = target

    @precondition(lambda self: self.num_tokens)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.num_tokens)))
        self.blocks.free(key)
        del self.num_tokens[key]

    @invariant()
    def books_agree(self) -> None:
        self.blocks.check_integrity()
        assert self.blocks.num_free_blocks == 9 - self.num_used()
        assert self.blocks.holders() == self.num_tokens.keys()
        for key, tokens in self.num_tokens.items():
            assert {len(t) for t in self.blocks.block_tables(key)} == {-(-tokens // 3)}


TestBlockManagerMachine = BlockManagerMachine.TestCase


def test_scheduling_is_pure_python() -> None:
    program = (
        "import sys, octavo.engine.scheduler, octavo.engine.block_manager\n"
        "print([m for m in ('numpy', 'octavo._native') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
