"""The seam between the scheduler and what guesses how answers continue (octavo.speculation)."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, Literal

from octavo.engine.request import Sequence
from octavo.engine.schedule import Schedule, ScheduleBuilder


class Drafter:
    """Guesses how answers continue, so that one step can check several tokens of a sequence.

    Drafts change only the time: an answer is the same with good drafts, bad ones or none.

    states: of which rows it reads the hidden states from the output of each step; see
    `_native.Runtime.submit`.
    """

    states: Literal["rows", "tokens"] | None = None

    def begin_step(self, running: Iterable[Sequence], step: ScheduleBuilder) -> None:
        """A step is about to be scheduled. running: all sequences that hold blocks."""

    def propose(self, sequence: Sequence) -> SequenceOf[int]:
        """Draft tokens to follow the sequence's own; none where it has no guess.

        Called after `begin_step` for each decoding sequence that may take drafts.
        """
        return ()

    def branches(self, sequence: Sequence) -> SequenceOf[SequenceOf[int]]:
        """Other chains of drafts, to be checked beside that of `propose` in the same step.

        In the order of a depth-first walk through the tree that all chains form (branches.py).
        """
        return ()

    def awaits(self, sequence: Sequence) -> bool:
        """Whether the next token, which a step in flight samples, is to be followed by drafts.

        If so the sequence skips this step: drafts can only follow tokens that are known.
        """
        return True

    def end_step(self, schedule: Schedule, output: Any, seconds: float) -> None:
        """A step has ended. output: a `_native.StepOutput`. The answers do not have its tokens yet.

        seconds: since the step before it ended, or since it was scheduled if that was later.
        """


@dataclass
class DraftCounts:
    """Drafts checked since the engine began.

    num_drafts: how often a sequence had any. num_draft_tokens: those that chains share count once.
    accepted_per_position[i]: how often the draft in place i, counted from 0, was right, and all
    before it. num_branches: chains beside the first. num_branch_wins: how often one of those was
    right for longest.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    num_branches: int = 0
    num_branch_wins: int = 0

    def add(
        self, num_draft_tokens: int, num_accepted: int, num_branches: int = 0, is_win: bool = False
    ) -> None:
        """A sequence had so many drafts, and num_accepted of a chain were right.

        is_win: the chain was a branch.
        """
        self.num_drafts += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_branches += num_branches
        self.num_branch_wins += is_win
        accepted = self.accepted_per_position
        accepted += [0] * (num_draft_tokens - len(accepted))
        for position in range(num_accepted):
            accepted[position] += 1
