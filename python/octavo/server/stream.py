"""What comes out of the engine's thread: the outputs of a request, and statistics of each step."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.engine.outputs import EngineStats, OutputChunk, RequestOutput
from octavo.engine.search import Search
from octavo.errors import (
    AdaptersInUseError,
    EngineStepError,
    InvalidArgumentError,
    OctavoError,
    QueueFullError,
)
from octavo.prompts import EncodedPrompt
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo.engine.engine import Engine

_log = logging.getLogger("octavo.server")
_REFUSALS = (InvalidArgumentError, QueueFullError, AdaptersInUseError)


@dataclass(frozen=True)
class EngineRequest:
    """Arguments of `Engine.add_request`; is_servers_limit: the timeout is not of the client."""

    request_id: str
    prompt: EncodedPrompt
    params: SamplingParams
    priority: int = 0
    timeout: float | None = None
    cache_salt: str | None = None
    adapter: str | None = None
    is_servers_limit: bool = False
    search: Search | None = None
    part_of: str = ""


class ResultStream:
    """Outputs of a request, put in step by step and read by one reader.

    request: what was asked. arrival_time: seconds of `time.monotonic`. result: the whole output,
    once it has ended well. observe: called with each chunk as it comes, and with None when the
    request ends without its last one, unless it was never begun; for the metrics.
    first_token_time, num_output_tokens: how far it has come.
    """

    def __init__(
        self, request: EngineRequest, on_close: Callable[[ResultStream], None] | None = None
    ) -> None:
        self.request = request
        self.arrival_time = time.monotonic()
        self.first_token_time: float | None = None
        self.num_output_tokens = 0
        self.result: RequestOutput | None = None
        self.observe: Callable[[OutputChunk | None], None] | None = None
        self._on_close = on_close
        self._chunks: list[OutputChunk] = []
        self._error: OctavoError | None = None
        self._changed = asyncio.Event()
        self._only_end = False  # what the reader waits for

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self.result is not None or self._error is not None

    def put(self, item: OutputChunk | OctavoError) -> None:
        """Add what came; only the last chunk, and an error, wake a reader of `wait`."""
        if self.has_ended:
            return
        if isinstance(item, OctavoError):
            self._error = item
        else:
            self.num_output_tokens += len(item.token_ids)
            if item.token_ids and self.first_token_time is None:
                self.first_token_time = time.monotonic()
            if not self._only_end:
                self._chunks.append(item)
            self.result = item.result
            if item.result is not None:  # of a search all of them are known now
                self.num_output_tokens = item.result.metrics.num_output_tokens
        if self.has_ended or not self._only_end:
            self._changed.set()
        if self.observe is not None and not isinstance(item, _REFUSALS):
            try:
                self.observe(item if isinstance(item, OutputChunk) else None)
            except Exception:  # a figure is lost, not the answers of this step
                _log.exception("an observer of %s failed", self.request.request_id)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from its arrival; None before there is one, and of a search before its end."""
        if self.result is not None:
            return self.result.metrics.time_to_first_token
        first = self.first_token_time
        return None if first is None else first - self.arrival_time

    async def next_chunks(self) -> list[OutputChunk]:
        """All that has come since the last call, at least one chunk; [] at the end.

        Raises the error that ended the request, after the chunks that came before it.
        """
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self.result is not None:
                return []
            self._changed.clear()
            await self._changed.wait()
        chunks, self._chunks = self._chunks, []
        return chunks

    async def wait(self) -> RequestOutput:
        """The whole output; raises the error that ended the request."""
        self._only_end = True
        while not self.has_ended:
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None:
            raise self._error
        if self.result is None:
            raise EngineStepError("the request ended without a result")
        return self.result

    def raise_if_refused(self) -> None:
        """Raise the error, if there is one, of a request that was never begun."""
        if isinstance(self._error, _REFUSALS):
            raise self._error

    def close(self) -> None:
        """End reading: what is unfinished is aborted within a step."""
        if not self.has_ended and self._on_close is not None:
            self._on_close(self)
            self.put(EngineStepError("the client has gone"))


@dataclass(frozen=True)
class StepStats:
    """Since the last ones: one step, or none.

    engine: how it stands now, and what it has done since it began. num_tokens: computed in the
    step. preemptions: how many, by reason.
    """

    engine: EngineStats
    num_tokens: int
    preemptions: Counter[str]


class StatsReader:
    """Makes the statistics of each step from the event log, in the engine's thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._next_event = engine.events.num_recorded

    def read(self) -> StepStats:
        """What has happened since the last call."""
        events = self._engine.events.since(self._next_event)
        self._next_event = self._engine.events.num_recorded
        num_tokens = sum(values[2] for _, kind, _, *values in events if kind == "step")
        reasons = (values[0] for _, kind, _, *values in events if kind == "preempted")
        return StepStats(self._engine.stats(), num_tokens, Counter(reasons))
