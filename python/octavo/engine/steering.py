"""What changes the logits of a step before tokens are sampled: masks, penalties, own functions.

Most requests ask for none of it, and then a step samples right after its forward pass. Where a
change depends on tokens that a step in flight still samples (penalties, grammars), the next step is
submitted without sampling, and samples as soon as those tokens are known: Python works on the masks
while the forward pass runs, and no other request waits. A user's own functions get the logits, so
Python waits for the forward pass of a step that has some.
"""

from __future__ import annotations

import operator

import numpy as np

from octavo.engine.adjustments import LogitAdjustments, build_adjustments
from octavo.engine.answer import Answer
from octavo.engine.constraints import Int32, UInt32, all_allowed
from octavo.engine.pipeline import Pipeline
from octavo.engine.schedule import Schedule

NO_TOKEN = "its constraints forbid every token"  # the client's mistake, and not the model's


class Steering:
    """Of the unfinished answers those whose logits may be changed."""

    def __init__(self, vocab_size: int, pipeline: Pipeline) -> None:
        self._vocab_size = vocab_size
        self._pipeline = pipeline
        self._steered: dict[object, Answer] = {}  # by the key of their sequence

    def add(self, answer: Answer) -> None:
        """Remember an answer, if anything changes its logits."""
        if answer.is_steered or answer.constraints:
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

        For the latest step in flight, whose logits are changed here by its users' own functions. An
        answer whose change cannot be made gets a `failure`, and its row none.
        """
        rows = [self._steered.get(sequence.key) for sequence in schedule.row_sequences]
        masks = self._process(rows)
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

    def _process(self, rows: list[Answer | None]) -> Int32 | None:
        """Change logits by their users' own functions; masks of what these forbid, if anything."""
        numbers = [row for row, each in enumerate(rows) if each is not None and each.processors]
        if not numbers:
            return None
        masks = all_allowed(len(rows), self._vocab_size)
        logits = self._pipeline.logits(numbers)
        for index, row in enumerate(numbers):
            answer, words = rows[row], masks[row].view("uint32")
            if answer is None or answer.processors is None or not np.isfinite(logits[index]).all():
                continue  # the model's own fault: it is found out when the step has ended
            try:
                logits[index] = answer.processors.apply(logits[index].copy(), words)
                if not words.any():
                    raise ValueError("its logits processors forbid every token")
            except Exception as error:
                self._give_up(answer, error, words)
        self._pipeline.set_logits(numbers, logits)
        is_free = np.array_equal(masks, all_allowed(len(rows), self._vocab_size))
        return None if is_free else masks

    def _forbid(self, answer: Answer, words: UInt32) -> None:
        try:
            for constraint in answer.constraints:
                constraint.forbid(words)
            if not words.any():
                raise ValueError(NO_TOKEN)
        except Exception as error:
            self._give_up(answer, error, words)

    def _give_up(self, answer: Answer, error: Exception, words: UInt32) -> None:
        """The answer's request ends with the step; other requests are not affected."""
        answer.failure = answer.failure or (
            f"the next token of request {answer.request.request_id!r} cannot be chosen: "
            f"{type(error).__name__}: {error}"
        )
        words[:] = all_allowed(1, self._vocab_size).view("uint32")[0]
