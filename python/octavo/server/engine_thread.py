"""The engine in a thread of its own: requests go in by a queue, outputs come out once a step.

The event loop and the engine share nothing but this file's two directions. In: commands on a
thread-safe queue, carried out between steps. Out: one `call_soon_threadsafe` a step that brings
everything the step gave, so that the loop is woken once and not once a token. The native core lets
the interpreter's lock go while it computes; meanwhile the loop writes what came before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from octavo.engine.events import EventLogFile
from octavo.errors import EngineStepError, OctavoError, WrongProcessError
from octavo.server.step_stats import StatsReader, StepStats
from octavo.server.stream import EngineRequest, ResultStream

if TYPE_CHECKING:
    from octavo.engine.engine import Engine
    from octavo.engine.outputs import OutputChunk
    from octavo.model import LoadedModel

T = TypeVar("T")
State = Literal["loading", "ready", "failed", "stopped"]
_log = logging.getLogger("octavo.engine")
_IDLE_BEAT = 0.5  # most seconds between two signs of life while there is nothing to do


class Health(NamedTuple):
    """Whether the loop really steps, and if not, why."""

    ok: bool
    reason: str
    seconds_since_progress: float


class EngineThread:
    """Loads a model and runs its engine, away from the event loop.

    load: makes the model, called in the thread. on_step: told of every step, in the event loop,
    after its outputs have been handed to their streams. stall_timeout: seconds without progress
    after which `health` says no. event_log: a file for the scheduler's decisions.
    Everything but `call`'s function runs in the event loop.
    """

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        on_step: Callable[[StepStats], None] | None = None,
        stall_timeout: float = 60.0,
        event_log: Path | None = None,
    ) -> None:
        self._load = load
        self._event_log = event_log
        self._on_step = on_step
        self._stall_timeout = stall_timeout
        self._idle_beat = min(_IDLE_BEAT, stall_timeout / 4)
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="octavo-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: dict[str, ResultStream] = {}  # of the event loop, as the next one
        self._calls: set[asyncio.Future[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.loaded: asyncio.Future[LoadedModel] | None = None
        # Of the thread; read elsewhere one attribute at a time.
        self._streams: dict[str, ResultStream] = {}
        self._outbox: list[tuple[ResultStream, OutputChunk | OctavoError]] = []
        self._stopping = False
        self._progress_at = time.monotonic()
        self.model: LoadedModel | None = None
        self.state: State = "loading"
        self.problem = ""

    # ---- the event loop's side ----

    def start(self) -> asyncio.Future[LoadedModel]:
        """Begin to load; the future is done when the first request can be taken, or failed."""
        self._loop = asyncio.get_running_loop()
        self.loaded = self._loop.create_future()
        self._thread.start()
        return self.loaded

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def open_streams(self) -> list[ResultStream]:
        """Requests that have not ended, in order of arrival."""
        return list(self._open.values())

    def submit(self, request: EngineRequest) -> ResultStream:
        """Hand a request to the engine; whatever becomes of it comes out of the stream."""
        stream = ResultStream(request, self._close)
        if not self._is_running:
            stream.put(self._not_running())
            return stream
        self._open[request.request_id] = stream
        self._idle.clear()
        self._commands.put(partial(self._add, request, stream))
        return stream

    def abort_all(self, error: OctavoError) -> None:
        """End every request with an error."""
        for stream in list(self._open.values()):
            stream.put(error)
            self._commands.put(partial(self._abort, stream.request.request_id))
            self._forget(stream)

    async def wait_until_idle(self) -> None:
        """Return when no request is open."""
        await self._idle.wait()

    async def call(self, function: Callable[[LoadedModel], T]) -> T:
        """Run a function between two steps, where it may look at the engine."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        if not self._is_running:
            raise self._not_running()
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)

        def resolve(result: T | None, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def command() -> None:
            try:
                if self.model is None:
                    raise self._not_running()
                result = function(self.model)
            except Exception as error:
                loop.call_soon_threadsafe(resolve, None, error)
            else:
                loop.call_soon_threadsafe(resolve, result, None)

        self._commands.put(command)
        return await future

    async def stop(self) -> None:
        """End the thread after the step it is in; what is unfinished stays so."""
        self._commands.put(self._stop)
        await asyncio.to_thread(self._thread.join)

    def health(self) -> Health:
        """Looks at the loop's last sign of progress, not at whether the process is there."""
        seconds = time.monotonic() - self._progress_at
        if self.state == "loading":
            return Health(False, "the model is being loaded", seconds)
        if not self._is_running:
            return Health(False, str(self._not_running()), seconds)
        if seconds > self._stall_timeout:
            reason = f"there is work, but no step has ended for {seconds:.0f} seconds"
            return Health(False, reason, seconds)
        return Health(True, "ok", seconds)

    @property
    def _is_running(self) -> bool:
        # A process that was forked after loading has a copy of all this, and no thread.
        return self.state == "ready" and self._thread.is_alive()

    def _not_running(self) -> OctavoError:
        if self.model is not None and not self.model.engine.guard.is_here:
            return WrongProcessError(self.model.engine.guard.pid, os.getpid())
        return EngineStepError(f"the engine does not run: {self.problem or self.state}")

    def _end(self) -> None:
        """The thread has ended: what it did not get to will never be done."""
        for stream in list(self._open.values()):
            stream.put(self._not_running())
            self._forget(stream)
        for future in list(self._calls):
            if not future.done():
                future.set_exception(self._not_running())

    def _close(self, stream: ResultStream) -> None:
        """Its reader has gone."""
        if self._open.get(stream.request.request_id) is stream:
            self._commands.put(partial(self._abort, stream.request.request_id))
            self._forget(stream)

    def _forget(self, stream: ResultStream) -> None:
        self._open.pop(stream.request.request_id, None)
        if not self._open:
            self._idle.set()

    def _deliver(
        self, outbox: list[tuple[ResultStream, OutputChunk | OctavoError]], stats: StepStats
    ) -> None:
        for stream, item in outbox:
            stream.put(item)
            if stream.has_ended and self._open.get(stream.request.request_id) is stream:
                self._forget(stream)
        if self._on_step is not None:
            self._on_step(stats)

    # ---- the thread's side ----

    def _run(self) -> None:
        try:
            self.model = self._load()
            self.model.engine.guard.check_process()
            recorder = _Recorder(self.model.engine, self._event_log)
        except BaseException as error:
            self.state, self.problem = "failed", f"{type(error).__name__}: {error}"
            self._tell_loaded(error)
            return
        self._progress_at = time.monotonic()
        self.state = "ready"
        self._tell_loaded(None)
        try:
            with recorder:
                self._step_until_stopped(self.model.engine, recorder)
            self.state = "stopped"
        except BaseException as error:
            _log.critical("the engine's loop has ended", exc_info=error)
            self.state, self.problem = "failed", f"{type(error).__name__}: {error}"
        self._call_loop(self._end)

    def _tell_loaded(self, error: BaseException | None) -> None:
        def tell() -> None:
            if self.loaded is None or self.loaded.done():
                return
            if error is None and self.model is not None:
                self.loaded.set_result(self.model)
            else:
                self.loaded.set_exception(error or RuntimeError("the model was not loaded"))

        self._call_loop(tell)

    def _step_until_stopped(self, engine: Engine, recorder: _Recorder) -> None:
        was_idle = True
        reader = StatsReader(engine)
        while True:
            self._take_commands(wait=not engine.has_unfinished_requests)
            if self._stopping:
                return
            steps_before = engine.num_steps
            if engine.has_unfinished_requests:
                was_idle = False
                self._step(engine)
                if engine.num_steps == steps_before and not self._outbox:
                    time.sleep(0.001)  # nothing could be scheduled: do not spin
            if engine.num_steps != steps_before or not engine.has_unfinished_requests:
                self._progress_at = time.monotonic()
            if self._outbox or not was_idle:
                self._send(reader.read())
            if not was_idle and not engine.has_unfinished_requests:
                engine.check_integrity()  # an IntegrityError ends the loop; /health says so
                was_idle = True
            recorder.flush(at_once=was_idle)

    def _take_commands(self, wait: bool) -> None:
        if wait:
            with contextlib.suppress(Empty):
                self._commands.get(timeout=self._idle_beat)()
        while not self._commands.empty():
            self._commands.get()()

    def _step(self, engine: Engine) -> None:
        try:
            chunks = engine.step()
        except Exception as error:
            _log.exception("a step of the engine failed")
            # Who was not in it goes on; with nobody in it, all must go lest it fail for ever.
            message = f"a step of the engine failed: {type(error).__name__}: {error}"
            hit = [name for name in self._streams if name in engine.failed_request_ids]
            self._fail(hit or list(self._streams), EngineStepError(message))
            engine.check_integrity()
            return
        for chunk in chunks:
            stream = self._streams.get(chunk.request_id)
            if stream is not None:
                self._outbox.append((stream, chunk))
                if chunk.result is not None:
                    del self._streams[chunk.request_id]

    def _add(self, request: EngineRequest, stream: ResultStream) -> None:
        model = self.model
        if model is None:
            return
        try:
            model.engine.add_request(
                request.request_id,
                request.prompt.token_ids,
                request.params,
                prompt=request.prompt.text,
                stream=True,
                continues_prompt=not request.prompt.is_chat,
                kept_special_ids=request.prompt.kept_special_ids,
                priority=request.priority,
                timeout=request.timeout,
                cache_salt=request.cache_salt,
            )
        except OctavoError as error:
            self._outbox.append((stream, error))
        except Exception as error:
            _log.exception("a request could not be added")
            self._outbox.append((stream, EngineStepError(f"{type(error).__name__}: {error}")))
        else:
            self._streams[request.request_id] = stream

    def _fail(self, request_ids: list[str], error: OctavoError) -> None:
        for request_id in request_ids:
            stream = self._streams.get(request_id)
            if stream is not None:
                self._outbox.append((stream, error))
            self._abort(request_id)

    def _abort(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        if self.model is None:
            return
        try:
            self.model.engine.abort(request_id)
        except Exception:
            # A detokenizer that fails while the text is finished is not asked a second time.
            _log.exception("a request could not be aborted at the first attempt")
            self.model.engine.abort(request_id)

    def _stop(self) -> None:
        self._stopping = True

    def _send(self, stats: StepStats) -> None:
        outbox, self._outbox = self._outbox, []
        self._call_loop(partial(self._deliver, outbox, stats))

    def _call_loop(self, function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to be told
            if self._loop is not None:
                self._loop.call_soon_threadsafe(function)


class _Recorder:
    """Writes the engine's event log to a file, once a second and whenever it falls idle.

    A file that cannot be opened is told of before the server is ready. One that cannot be written
    to any more, on a full disk, is given up: answers matter more.
    """

    def __init__(self, engine: Engine, path: Path | None) -> None:
        self._file = None if path is None else EventLogFile(engine.events, path)
        self._events = engine.events
        self._num_written = 0
        self._next = 0.0

    def flush(self, at_once: bool) -> None:
        """Write what is new, if it is time to."""
        if self._file is None or self._events.num_recorded == self._num_written:
            return
        now = time.monotonic()
        if not at_once and now < self._next:
            return
        self._num_written = self._events.num_recorded
        self._next = now + 1.0
        try:
            self._file.flush()
        except OSError:
            _log.exception("the event log cannot be written to; nothing more goes into it")
            self._close()

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None
