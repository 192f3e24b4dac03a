"""Random calls to the block manager, beside a model of what every block holds."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.engine.block_manager import NO_BLOCK, BlockManager, Prefix
from octavo.engine.prefix_cache import extend_block_hashes

BLOCK = 4


def names_of(tokens: list[int], salt: str | None = None) -> list[bytes]:
    names: list[bytes] = []
    extend_block_hashes(names, tokens, BLOCK, salt)
    return names


class BlockManagerMachine(RuleBasedStateMachine):
    """Random calls beside a model that keeps what every block holds, token by token.

    A sequence's tokens are drawn from two letters, so that beginnings often agree. They are
    computed three at a time. Of the three KV groups two have windows.
    """

    NUM_BLOCKS = 20
    WINDOWS = (0, 6, 1)
    CHUNK = 3

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(self.NUM_BLOCKS, BLOCK, self.WINDOWS, self.CHUNK)
        self.tokens: dict[int, list[int]] = {}  # of each sequence, all computed
        # Of each block the group and the tokens, as they were last written.
        self.content: dict[int, tuple[int, list[int]]] = {}

    def compute(self, key: int, start: int) -> None:
        """Compute the tokens from `start` on in chunks; drops the sequence if blocks run out."""
        tokens = self.tokens[key]
        for first in range(start, len(tokens), self.CHUNK):
            end = min(first + self.CHUNK, len(tokens))
            if not self.blocks.reserve(key, end):
                self.blocks.free(key)
                del self.tokens[key]
                return
            for group, _ in enumerate(self.WINDOWS):
                table = self.blocks.block_table(key, group)
                for position in range(first, end):
                    block = table[position // BLOCK]
                    assert self.blocks.pool.num_holders(block) == 1
                    assert not self.blocks.pool.is_published(block)
                    kept = self.content[block][1][: position % BLOCK] if position % BLOCK else []
                    self.content[block] = group, [*kept, tokens[position]]
            self.blocks.check_sequence(key, end)
            for index, name in enumerate(names_of(tokens[:end])):
                self.blocks.publish(key, index, name)
            self.blocks.advance(key, end)

    def begin(self, key: int, tokens: list[int], prefix: Prefix) -> None:
        free = self.blocks.num_free_blocks
        needed = self.blocks.num_blocks_needed(len(tokens), prefix)
        if needed > free:
            return
        for group, source, destination in self.blocks.start(key, len(tokens), prefix):
            assert self.content[source][0] == group
            self.content[destination] = group, list(self.content[source][1])
        assert free - self.blocks.num_free_blocks == needed
        self.tokens[key] = tokens
        self.compute(key, prefix.num_tokens)

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
        assert prefix is not None or num_alike < len(tokens) - 1
        self.begin(key, tokens[: num_alike + 1], prefix or Prefix((), 0))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), chains=st.lists(st.integers(1, 5), min_size=1, max_size=3))
    def draft(self, data: st.DataObject, chains: list[int]) -> None:
        """A step with branches of drafts: the sequence keeps one of the tables, or its own."""
        key = data.draw(st.sampled_from(sorted(self.tokens)))
        num_spare = data.draw(st.sampled_from([0, 0, 1]))
        kept = data.draw(st.integers(0, len(chains)))
        tokens, length = self.tokens[key], len(self.tokens[key])
        branches: list[tuple[object, list[int]]] = []
        for number, count in enumerate(chains):
            own = [*tokens, *[(number + place) % 2 for place in range(count)]]
            needed = 3 * (-(-len(own) // BLOCK) - length // BLOCK)
            fits = needed + 3 * num_spare <= self.blocks.num_free_blocks
            branch = ("branch", number)
            copies = self.blocks.branch(key, branch, length, len(own), num_spare)
            assert (copies is not None) == fits
            if copies is None:
                continue
            for group, source, destination in copies:
                assert self.content[source][0] == group
                self.content[destination] = group, list(self.content[source][1])
            for group, _ in enumerate(self.WINDOWS):
                table = self.blocks.block_table(branch, group)
                for position in range(length, len(own)):
                    block = table[position // BLOCK]
                    assert self.blocks.pool.num_holders(block) == 1
                    before = self.content[block][1][: position % BLOCK] if position % BLOCK else []
                    self.content[block] = group, [*before, own[position]]
            branches.append((branch, own))
        self.blocks.check_integrity()
        self.every_sequence_reads_what_it_wrote()
        for number, (branch, own) in enumerate(branches):
            if number != kept:
                self.blocks.free(branch)
                continue
            self.blocks.adopt(key, branch)
            self.tokens[key] = own
            for index, name in enumerate(names_of(own)):
                self.blocks.publish(key, index, name)
            self.blocks.advance(key, len(own))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def grow(self, data: st.DataObject, more: list[int]) -> None:
        key = data.draw(st.sampled_from(sorted(self.tokens)))
        num_spare = data.draw(st.sampled_from([0, 0, 1]))
        length = len(self.tokens[key])
        num_blocks = -(-(length + len(more)) // BLOCK)
        tables = [self.blocks.block_table(key, group) for group in range(len(self.WINDOWS))]
        missing = sum(max(0, num_blocks - len(table)) for table in tables)
        fits = not missing or missing <= self.blocks.num_free_blocks - 3 * num_spare
        assert self.blocks.reserve(key, length + len(more), num_spare) == fits
        if fits:
            self.tokens[key] = [*self.tokens[key], *more]
            self.compute(key, length)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), keep_cached=st.booleans())
    def free(self, data: st.DataObject, keep_cached: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.tokens)))
        expected = self.blocks.num_free_blocks + self.blocks.num_blocks_freed(key)
        self.blocks.free(key, keep_cached=keep_cached)
        assert self.blocks.num_free_blocks == expected
        del self.tokens[key]

    @invariant()
    def books_agree(self) -> None:
        self.blocks.check_integrity()
        used = {block for key in self.tokens for block in self.blocks.blocks_of(key)}
        assert self.blocks.num_free_blocks == self.NUM_BLOCKS - len(used)
        assert self.blocks.holders() == self.tokens.keys()
        for key, tokens in self.tokens.items():
            self.blocks.check_sequence(key, len(tokens))

    @invariant()
    def every_sequence_reads_what_it_wrote(self) -> None:
        for key, tokens in self.tokens.items():
            for group, window in enumerate(self.WINDOWS):
                num_gone = max(len(tokens) - window, 0) // BLOCK if window else 0  # before the last
                table = self.blocks.block_table(key, group)
                assert table[:num_gone].tolist() == [NO_BLOCK] * num_gone
                held = [self.content[block] for block in table[num_gone:] if block in self.content]
                assert {group} == {own for own, _ in held}
                found = [token for _, content in held for token in content]
                own = tokens[num_gone * BLOCK :]
                assert found[: len(own)] == own


TestBlockManagerMachine = BlockManagerMachine.TestCase
