"""Steps in flight in the runtime: one at a time, or the next before the last has ended.

With a depth of 2 the device never waits for Python: while it computes one step, the next is
scheduled, packed and queued. The next step needs the tokens that the last one samples. Python does
not know them yet, but the device will when the step begins. So the batch refers to them: token id
-1 - r stands for "what state row r sampled last" (see `_native.Batch`).
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from octavo.engine.adjustments import Float32, LogitAdjustments
from octavo.engine.batch import Int32, build_batch, copy_blocks
from octavo.engine.block_manager import BlockManager
from octavo.engine.prompt_logprobs import RowPlaces, Rows, add_prompt_rows
from octavo.engine.schedule import Schedule


class StepRuntime(Protocol):
    """What the engine uses of `_native.Runtime`: one step in two or three calls, and copies."""

    def copy_blocks(self, kv_group: int, pairs: Int32) -> None:
        """Copy whole KV blocks, after the steps queued so far; pairs: (n, 2), from and to."""

    def submit(self, batch: Any, *, sample: bool) -> int:
        """Queue the forward pass and return a ticket; sample: queue plain sampling, too.

        A runtime whose drafter needs them also takes `states`: "rows" or "tokens".
        """

    def sample(
        self,
        ticket: int,
        masks: Int32 | None = None,
        adjustments: LogitAdjustments | None = None,
    ) -> None:
        """Queue the sampling of a step that was submitted without."""

    def logits(self, ticket: int, rows: Int32) -> Float32:
        """Some rows of a step's logits, (len(rows), vocab_size); waits for its forward pass."""

    def set_logits(self, ticket: int, row: int, values: Float32) -> None:
        """Put other logits in the place of a row's, before `sample`."""

    def wait(self, ticket: int) -> Any:
        """Wait for the ticket and close it; returns a `_native.StepOutput`."""


NO_TICKET = -1


@dataclass
class InFlightStep:
    """A step in flight. started: when it was scheduled, in seconds of the engine's clock.

    places: which of its logit rows are of prompts; None: none. prompt_rows: their results.
    """

    schedule: Schedule
    started: float
    is_sampled: bool
    ticket: int = NO_TICKET
    places: RowPlaces | None = None
    prompt_rows: Rows | None = None


class Pipeline:
    """Submits schedules to a runtime, at most `depth` at a time, and waits for the oldest.

    make_batch: builds what `runtime.submit` takes from the fields of `BatchArrays`. states: of
    which rows every step's output is to hold the hidden states.
    """

    def __init__(
        self,
        runtime: StepRuntime,
        blocks: BlockManager,
        make_batch: Callable[..., Any],
        *,
        vocab_size: int,
        depth: int,
        states: str | None = None,
    ) -> None:
        self.depth = depth
        self._runtime = runtime
        self._blocks = blocks
        self._make_batch = make_batch
        self._vocab_size = vocab_size
        self._states: dict[str, Any] = {"states": states} if states else {}
        self._in_flight: deque[InFlightStep] = deque()

    def __len__(self) -> int:
        return len(self._in_flight)

    @property
    def has_room(self) -> bool:
        """Whether another step may be submitted."""
        return len(self._in_flight) < self.depth

    def submit(self, schedule: Schedule, now: float, *, sample: bool) -> None:
        """Queue a step. After an error, call `abandon` for it and the steps before it.

        sample: also queue plain sampling; otherwise call `sample` before the next `submit`.
        """
        step = InFlightStep(schedule, now, is_sampled=sample)
        self._in_flight.append(step)
        copy_blocks(self._runtime, schedule.copies)
        arrays = build_batch(schedule, self._blocks, self._vocab_size)
        if any([scored.num_rows for scored in schedule.scored]):
            arrays, step.places = add_prompt_rows(arrays, schedule)
        batch = self._make_batch(**arrays._asdict())
        step.ticket = self._runtime.submit(batch, sample=sample, **self._states)

    @property
    def unsampled(self) -> Schedule | None:
        """The schedule of the latest step, if its sampling is not queued yet."""
        if not self._in_flight or self._in_flight[-1].is_sampled:
            return None
        return self._in_flight[-1].schedule

    def logits(self, rows: Sequence[int]) -> Float32:
        """The logits of some sampled rows of the latest step, (len(rows), vocab_size)."""
        step = self._in_flight[-1]
        return self._runtime.logits(step.ticket, self._places(step, rows))

    def set_logits(self, rows: Sequence[int], values: Float32) -> None:
        """Put other logits in their place, before `sample`."""
        step = self._in_flight[-1]
        for place, row in zip(self._places(step, rows).tolist(), values, strict=True):
            self._runtime.set_logits(step.ticket, place, row)

    @staticmethod
    def _places(step: InFlightStep, rows: Sequence[int]) -> Int32:
        """Where sampled rows lie among all logit rows."""
        places = np.array(rows, np.int32)
        return places if step.places is None else step.places.sampled[places].astype(np.int32)

    def sample(self, masks: Int32 | None, adjustments: LogitAdjustments | None) -> None:
        """Queue the sampling of the latest step. After an error, call `abandon`."""
        step = self._in_flight[-1]
        if step.places is not None:
            masks = step.places.spread_masks(masks)
            adjustments = step.places.spread_adjustments(adjustments)
        self._runtime.sample(step.ticket, masks, adjustments)
        step.is_sampled = True

    def wait(self) -> tuple[InFlightStep, Any]:
        """The oldest step and what it sampled. After an error of the runtime, call `abandon`."""
        step = self._in_flight[0]
        output = self._runtime.wait(step.ticket)
        self._in_flight.popleft()
        if step.places is not None:
            of_rows = self._states.get("states") == "rows"
            output, step.prompt_rows = step.places.split(output, of_rows=of_rows)
        return step, output

    def abandon(self) -> list[Schedule]:
        """Wait for all steps in flight and drop their results; the latest comes first."""
        schedules = [step.schedule for step in reversed(self._in_flight)]
        while self._in_flight:
            ticket = self._in_flight.popleft().ticket
            if ticket != NO_TICKET:
                # It may have been waited for already, and have failed.
                with contextlib.suppress(Exception):
                    self._runtime.wait(ticket)
        return schedules
