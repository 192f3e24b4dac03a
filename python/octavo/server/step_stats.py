"""What a step of the engine decided, read off its event log, and how the engine stands after it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from octavo.engine.outputs import EngineStats

if TYPE_CHECKING:
    from octavo.engine.engine import Engine


@dataclass(frozen=True)
class StepStats:
    """Since the last ones: one step, or none.

    engine: how it stands now, and what it has done since it began. seconds: the step took.
    num_tokens: computed in it, num_decodes of them for running answers. preemptions: how many, by
    reason.
    """

    engine: EngineStats
    seconds: float = 0.0
    num_tokens: int = 0
    num_decodes: int = 0
    preemptions: Counter[str] = field(default_factory=Counter)


class StatsReader:
    """Makes the statistics of each step; asked in the engine's thread, after every step."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._next_event = engine.events.num_recorded

    def read(self) -> StepStats:
        """What has happened since the last call."""
        seconds, num_tokens, num_decodes = 0.0, 0, 0
        preemptions: Counter[str] = Counter()
        events = self._engine.events.since(self._next_event)
        self._next_event = self._engine.events.num_recorded
        for _, kind, _, *values in events:
            if kind == "step":
                seconds += values[0]
                num_decodes += values[1]
                num_tokens += values[2]
            elif kind == "preempted":
                preemptions[values[0]] += 1
        return StepStats(self._engine.stats(), seconds, num_tokens, num_decodes, preemptions)
