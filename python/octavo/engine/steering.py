"""What changes the logits of a step before tokens are sampled: masks, penalties and biases.

Most requests ask for none of it, and then a step samples right after its forward pass. Where a
change depends on tokens that a step in flight still samples (penalties, grammars), the next step is
submitted without sampling, and samples as soon as those tokens are known: Python works on the masks
while the forward pass runs, and no other request waits.
"""

from __future__ import annotations

import operator

from octavo.engine.adjustments import LogitAdjustments, build_adjustments
from octavo.engine.answer import Answer
from octavo.engine.constraints import Int32, UInt32, all_allowed
from octavo.engine.schedule import Schedule


class Steering:
    """Of the unfinished answers those whose logits may be changed."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._steered: dict[object, Answer] = {}  # by the key of their sequence

    def add(self, answer: Answer) -> None:
        """Remember an answer, if anything changes its logits."""
        if answer.adjuster is not None or answer.constraints:
            self._steered[answer.sequence.key] = answer

    def remove(self, key: object) -> None:
        """Forget an answer; no harm if it was never added."""
        self._steered.pop(key, None)

    def changes(self, schedule: Schedule) -> bool:
        """Whether a logit of this step is to be changed."""
        return bool(self._steered) and any(answer.is_steered for answer in self._rows(schedule))

    def must_wait(self, schedule: Schedule) -> bool:
        """Whether a change depends on tokens that a step in flight before this one samples."""
        return bool(self._steered) and any(
            answer.sequence.watches_answer and answer.sequence.num_pending_tokens
            for answer in self._rows(schedule)
        )

    def arrays(self, schedule: Schedule) -> tuple[Int32 | None, LogitAdjustments | None]:
        """Masks and adjustments of every logit row, as `Runtime.sample` takes them.

        An answer whose change cannot be made gets a `failure`, and its row none.
        """
        rows = [self._steered.get(sequence.key) for sequence in schedule.row_sequences]
        masks = None
        for row, answer in enumerate(rows):
            if answer is not None and answer.is_constrained:
                if masks is None:
                    masks = all_allowed(len(rows), self._vocab_size)
                self._forbid(answer, masks[row].view("uint32"))
        adjusters = [None if answer is None else answer.adjuster for answer in rows]
        return masks, build_adjustments(adjusters)

    def _rows(self, schedule: Schedule) -> list[Answer]:
        keys = map(operator.attrgetter("key"), schedule.row_sequences)
        return [self._steered[key] for key in keys if key in self._steered]

    def _forbid(self, answer: Answer, words: UInt32) -> None:
        try:
            for constraint in answer.constraints:
                constraint.forbid(words)
            if not words.any():
                raise ValueError("its constraints forbid every token")
        except Exception as error:  # other requests are not affected
            answer.failure = (
                f"the next token of request {answer.request.request_id!r} cannot be chosen: "
                f"{type(error).__name__}: {error}"
            )
            words[:] = all_allowed(1, self._vocab_size).view("uint32")[0]
