"""A line of sequences, the most urgent first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from octavo.engine.request import Rank, Sequence


def _rank(sequence: Sequence) -> Rank:
    return sequence.rank


class RankedQueue:
    """Sequences sorted by their rank, which never changes: insertion finds its place by bisection.

    A list suffices. Moving ten thousand pointers along takes a microsecond or two.
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
        insort(self._items, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Take the sequence out; ValueError if it is not in the queue."""
        index = bisect_left(self._items, sequence.rank, key=_rank)
        if index == len(self._items) or self._items[index] is not sequence:
            raise ValueError(f"{sequence!r} is not in the queue")
        del self._items[index]

    def pop_last(self) -> Sequence:
        """Take out the least urgent one."""
        return self._items.pop()
