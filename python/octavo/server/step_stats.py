"""How the engine stands after a step, and what the step decided: read off its event log."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.engine.engine import Engine


@dataclass(frozen=True)
class StepStats:
    """One step, or none when num_steps has not grown.

    num_running, num_waiting: sequences. num_used_blocks: held by sequences. num_tokens: computed in
    the step, num_decodes of them for running answers. num_queried_tokens, num_cached_tokens: of
    sequences that were admitted, all and those that the cache had. preemptions: how many, by
    reason. waiting_reason: what the first in the queue waits for; None when nobody waits.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_used_blocks: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    num_tokens: int = 0
    num_decodes: int = 0
    num_queried_tokens: int = 0
    num_cached_tokens: int = 0
    preemptions: Counter[str] = field(default_factory=Counter)
    waiting_reason: str | None = None


class StatsReader:
    """Makes the statistics of each step; asked in the engine's thread, after every step."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._next_event = engine.events.num_recorded
        self._waiting_reason: str | None = None

    def read(self) -> StepStats:
        """What has happened since the last call."""
        engine = self._engine
        seconds, num_tokens, num_decodes, num_queried, num_cached = 0.0, 0, 0, 0, 0
        preemptions: Counter[str] = Counter()
        events = engine.events.since(self._next_event)
        self._next_event = engine.events.num_recorded
        for _, kind, _, *values in events:
            if kind == "step":
                seconds += values[0]
                num_decodes += values[1]
                num_tokens += values[2]
            elif kind == "admitted":
                num_queried += values[0]
                num_cached += values[1]
            elif kind == "preempted":
                preemptions[values[0]] += 1
            elif kind == "waited":
                self._waiting_reason = values[0]
        num_waiting = engine.scheduler.num_waiting
        if not num_waiting:
            self._waiting_reason = None
        return StepStats(
            engine.scheduler.num_running,
            num_waiting,
            engine.blocks.num_blocks - engine.blocks.num_free_blocks,
            engine.num_steps,
            seconds,
            num_tokens,
            num_decodes,
            num_queried,
            num_cached,
            preemptions,
            self._waiting_reason,
        )
