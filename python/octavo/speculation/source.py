"""What makes drafts: n-grams, a second model, heads. speculator.py decides how many it asks for."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Any, Literal

from octavo.draft_tree import Ranks, second_guesses
from octavo.engine.branches import Judged
from octavo.engine.request import Sequence
from octavo.engine.schedule import Schedule


class DraftSource:
    """Makes drafts for sequences. A source has its own `draft` or `draft_trees`, or both of them.

    is_free: drafts take so little time that they are made for every sequence, also to learn how
    often they would have been right. num_classes: drafts of a class are accepted about equally
    often; the class after one, as the next draft of a chain has it, is the next number, and the
    last class goes on for ever. num_places: how many places of a chain have second guesses. states:
    of which rows of the target's steps `end_step` reads the hidden states.
    """

    is_free = False
    num_classes = 1
    num_places = 0
    states: Literal["rows", "tokens"] | None = None

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
        trees = self.draft_trees([(each, own, [(0,) * count]) for each, own, count in wanted])
        return [chains[0] for chains in trees]

    def branches(self, sequence: Sequence, own: Any, depth: int, count: int) -> SequenceOf[Ranks]:
        """So many promising chains beside the first one, in order, each of `depth` drafts."""
        return second_guesses(depth, count, self.num_places)

    def draft_trees(
        self, wanted: SequenceOf[tuple[Sequence, Any, SequenceOf[Ranks]]]
    ) -> SequenceOf[SequenceOf[SequenceOf[int]]]:
        """For each (sequence, what was created for it, chains by ranks) the drafts of each chain.

        The first chain is of best guesses. A chain may be shorter than asked for; empty: there is
        none.
        """
        made = self.draft([(sequence, own, len(paths[0])) for sequence, own, paths in wanted])
        return [
            [drafts, *[()] * (len(paths) - 1)]
            for drafts, (_, _, paths) in zip(made, wanted, strict=True)
        ]

    def end_step(self, schedule: Schedule, output: Any, judged: SequenceOf[Judged]) -> None:
        """A step of the target has ended; judged: one for each of its sequences, in order."""
