"""The seam between the scheduler and what guesses how answers continue (octavo.speculation)."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

from octavo.engine.request import Sequence
from octavo.engine.schedule import Schedule, ScheduleBuilder


class Drafter:
    """Guesses how answers continue, so that one step can check several tokens of a sequence.

    Drafts change only the time: an answer is the same with good drafts, bad ones or none.

    taps: what it reads from the output of each step, besides tokens; see docs/taps.md.
    """

    taps: tuple[str, ...] = ()

    def begin_step(self, running: Iterable[Sequence], step: ScheduleBuilder) -> None:
        """A step is about to be scheduled. running: all sequences that hold blocks."""

    def propose(self, sequence: Sequence) -> SequenceOf[int]:
        """Draft tokens to follow the sequence's own; none where it has no guess.

        Called after `begin_step` for each decoding sequence that may take drafts.
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

    num_drafts: how often a sequence had any. accepted_per_position[i]: how often the draft in place
    i, counted from 0, was right, and all before it.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)

    def add(self, num_draft_tokens: int, num_accepted: int) -> None:
        """A sequence had so many drafts, and the first num_accepted were right."""
        self.num_drafts += 1
        self.num_draft_tokens += num_draft_tokens
        accepted = self.accepted_per_position
        accepted += [0] * (num_draft_tokens - len(accepted))
        for position in range(num_accepted):
            accepted[position] += 1
