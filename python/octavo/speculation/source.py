"""What makes drafts: n-grams, a second model, heads. speculator.py decides how many it asks for."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Any

from octavo.engine.request import Sequence
from octavo.engine.schedule import Schedule


class DraftSource:
    """Makes drafts for sequences.

    is_free: drafts take so little time that they are made for every sequence, also to learn how
    often they would have been right. num_classes: drafts of a class are accepted about equally
    often; the class after one, as the next draft of a chain has it, is the next number, and the
    last class goes on for ever. taps: of the target's steps, what `end_step` reads from its output.
    """

    is_free = False
    num_classes = 1
    taps: tuple[str, ...] = ()

    def create(self, sequence: Sequence) -> Any:
        """What the source keeps about a sequence as long as that lives."""
        return None

    def begin_step(self, running: Iterable[Sequence]) -> None:
        """running: all sequences that hold blocks; others need nothing that the source keeps."""

    def look(self, sequence: Sequence, own: Any) -> int:
        """The class of the first draft to come; -1 where there is none. own: what was created."""
        return 0

    def draft(self, wanted: SequenceOf[tuple[Sequence, Any, int]]) -> SequenceOf[SequenceOf[int]]:
        """At most so many drafts for each (sequence, what was created for it, count)."""
        return [()] * len(wanted)

    def end_step(self, schedule: Schedule, output: Any, num_accepted: SequenceOf[int]) -> None:
        """A step of the target has ended; num_accepted: of the drafts of each of its entries."""
