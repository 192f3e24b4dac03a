"""The two queues of sequences, and how a sequence comes from one into the other."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator, Mapping
from operator import attrgetter

from octavo.engine.block_manager import BlockCopy, BlockManager
from octavo.engine.request import Sequence, SequenceState


class RankedQueue:
    """Sequences sorted by their rank, which never changes: insertion finds its place by bisection.

    The most urgent one comes first. A list suffices: to move ten thousand pointers along takes a
    microsecond or two.
    """

    def __init__(self) -> None:
        self._items: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._items)

    def __getitem__(self, index: int) -> Sequence:
        return self._items[index]

    def add(self, sequence: Sequence) -> None:
        """Put the sequence where its rank belongs."""
        insort(self._items, sequence, key=attrgetter("rank"))

    def remove(self, sequence: Sequence) -> None:
        """Take the sequence out; ValueError if it is not in the queue."""
        index = bisect_left(self._items, sequence.rank, key=attrgetter("rank"))
        if index == len(self._items) or self._items[index] is not sequence:
            raise ValueError(f"{sequence!r} is not in the queue")
        del self._items[index]


class SequenceQueues:
    """Sequences that wait and sequences that run. The scheduler decides; here it is written down.

    blocks: a sequence that runs holds some. max_num_seqs: how many may run.
    """

    def __init__(self, blocks: BlockManager, max_num_seqs: int) -> None:
        self.blocks = blocks
        self._waiting = RankedQueue()
        self._running = RankedQueue()
        self._free_state_rows = list(range(max_num_seqs - 1, -1, -1))
        self._fork_copies: list[BlockCopy] = []  # for the next step

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks: not admitted yet, or preempted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_places(self) -> int:
        """How many more sequences may run."""
        return len(self._free_state_rows)

    def resume(self, sequence: Sequence) -> None:
        """A waiting sequence has got blocks: it runs."""
        self._waiting.remove(sequence)
        self._running.add(sequence)
        sequence.state = SequenceState.RUNNING
        sequence.state_row = self._free_state_rows.pop()

    def requeue(self, sequence: Sequence) -> None:
        """A running sequence gives its blocks back and waits; it keeps its tokens."""
        self._running.remove(sequence)
        self.blocks.free(sequence.key)
        self._free_state_rows.append(sequence.state_row)
        sequence.state = SequenceState.WAITING
        sequence.num_computed_tokens = sequence.num_published_blocks = 0
        self._waiting.add(sequence)

    def rest(self, sequence: Sequence) -> None:
        """A waiting beam has no part in its search until it is added again."""
        self._waiting.remove(sequence)
        sequence.state = SequenceState.IDLE

    def fork(
        self, parents: Mapping[Hashable, Hashable], others: list[Hashable], num_tokens: int
    ) -> None:
        """As `BlockManager.fork`; the next step makes the copies."""
        self._fork_copies += self.blocks.fork(parents, others, num_tokens)
