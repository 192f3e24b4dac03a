"""The engine in a thread of its own: requests go in by a queue, outputs come out once a step.

The event loop and the engine share nothing else. In: commands on a thread-safe queue, carried out
between steps. Out: one `call_soon_threadsafe` a step with everything the step gave, so that the
loop is woken once a step and not once a token. The native core lets the interpreter's lock go while
it computes; meanwhile the loop writes what came before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from octavo.engine.events import EventLogFile
from octavo.engine.guard import EXIT_SECONDS
from octavo.engine.outputs import OutputChunk
from octavo.errors import (
    EngineStepError,
    InvalidArgumentError,
    OctavoError,
    RankError,
    WrongProcessError,
)
from octavo.server.stream import EngineRequest, ResultStream, StatsReader, StepStats

if TYPE_CHECKING:
    from octavo.engine.engine import Engine
    from octavo.model import LoadedModel

T = TypeVar("T")
Outbox = list[tuple[ResultStream, OutputChunk | OctavoError]]
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

    load: makes the model, called in the thread. on_step: called in the event loop for every step,
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
        self._calls: set[Future[Any]] = set()
        self._loading: Future[LoadedModel] = Future()
        self._idle = asyncio.Event()
        self._idle.set()
        self.loaded: asyncio.Future[LoadedModel] | None = None
        # Of the thread; read elsewhere one attribute at a time.
        self._streams: dict[str, ResultStream] = {}
        self._outbox: Outbox = []
        self._stopping = False
        self._program_ends, self._has_loaded = threading.Event(), threading.Event()
        self._progress_at = time.monotonic()
        self.model: LoadedModel | None = None
        self.state: State = "loading"
        self.problem = ""

    # ---- the event loop's side ----

    def start(self) -> asyncio.Future[LoadedModel]:
        """Begin to load; the future is done when the first request can be taken, or failed."""
        self._loop = asyncio.get_running_loop()
        self.loaded = asyncio.wrap_future(self._loading)
        weakref.finalize(self, _end_loading, self._program_ends, self._has_loaded, os.getpid())
        self._thread.start()
        return self.loaded

    def on_load(self, done: int, total: int) -> None:
        """End loading with the program: to be called while the model is loaded, in the thread."""
        if self._program_ends.is_set():
            raise SystemExit

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def open_streams(self) -> list[ResultStream]:
        """Requests that have not ended, in order of arrival."""
        return list(self._open.values())

    def submit(self, request: EngineRequest) -> ResultStream:
        """Hand a request to the engine; whatever becomes of it comes out of the stream.

        Of two open requests with one id, the second gets an InvalidArgumentError.
        """
        stream, name = ResultStream(request, self._close), request.request_id
        if not self._is_running:
            stream.put(self._not_running())
            return stream
        if name in self._open:  # which would lose the first one's stream
            message = f"request {name!r} is already running: name it anew"
            stream.put(InvalidArgumentError(message))
            return stream
        self._open[name] = stream
        self._idle.clear()
        self._commands.put(partial(self._add, request, stream))
        return stream

    def abort_all(self, error: OctavoError) -> None:
        """End every request with an error."""
        for stream in self.open_streams():
            self._drop(stream)
            stream.put(error)

    async def wait_until_idle(self) -> None:
        """Return when no request is open."""
        await self._idle.wait()

    async def call(self, function: Callable[[LoadedModel], T]) -> T:
        """Run a function between two steps, where it may look at the engine."""
        model = self.model
        if model is None or not self._is_running:
            raise self._not_running()
        future: Future[T] = Future()
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(model))
            except Exception as error:
                future.set_exception(error)

        self._commands.put(command)
        return await asyncio.wrap_future(future)

    async def stop(self) -> None:
        """End the thread after the step it is in; what is unfinished stays so."""
        self._commands.put(partial(setattr, self, "_stopping", True))
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
        self.abort_all(self._not_running())
        for future in list(self._calls):
            if not future.done():
                future.set_exception(self._not_running())

    def _close(self, stream: ResultStream) -> None:
        """The stream's reader has gone."""
        if self._open.get(stream.request.request_id) is stream:
            self._drop(stream)

    def _drop(self, stream: ResultStream) -> None:
        """Abort a request. What the stream is given next says why to its reader."""
        name = stream.request.request_id
        self._commands.put(partial(self._abort, name))
        self._forget(stream)
        if self._is_running and stream.observe is not None:  # to the metrics it is no error
            stream.observe(OutputChunk(name, 0, "", finish_reason="abort"))

    def _forget(self, stream: ResultStream) -> None:
        self._open.pop(stream.request.request_id, None)
        if not self._open:
            self._idle.set()

    def _deliver(self, outbox: Outbox, stats: StepStats) -> None:
        for stream, item in outbox:
            stream.put(item)
            if stream.has_ended and self._open.get(stream.request.request_id) is stream:
                self._forget(stream)
        if self._on_step is not None:
            self._on_step(stats)

    # ---- the thread's side ----

    def _run(self) -> None:
        is_wanted = self._loading.set_running_or_notify_cancel()
        try:
            self.model = model = self._load()
            model.engine.guard.check_process()
            recorder = _Recorder(model.engine, self._event_log)
        except BaseException as error:
            self._fail_with(error)
            if is_wanted:
                self._loading.set_exception(error)
            return
        finally:
            self._has_loaded.set()
        self._progress_at = time.monotonic()
        self.state = "ready"
        if is_wanted:
            self._loading.set_result(model)
        try:
            with contextlib.closing(recorder):
                self._step_until_stopped(model.engine, recorder)
            self.state = "stopped"
        except BaseException as error:
            _log.critical("the engine's loop has ended", exc_info=error)
            self._fail_with(error)
        self._call_loop(self._end)

    def _fail_with(self, error: BaseException) -> None:
        self.state, self.problem = "failed", f"{type(error).__name__}: {error}"

    def _step_until_stopped(self, engine: Engine, recorder: _Recorder) -> None:
        was_idle = True
        reader = StatsReader(engine)
        while True:
            self._take_commands(wait=not engine.has_unfinished_requests)
            if self._stopping:
                return
            steps_before = engine.num_steps
            if not engine.has_unfinished_requests:
                _check_ranks(engine)
            else:
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
            # Requests outside the step go on. If the step had none, all end: it would fail again.
            message = f"a step of the engine failed: {type(error).__name__}: {error}"
            hit = [name for name in self._streams if name in engine.failed_request_ids]
            for name in hit or list(self._streams):
                self._outbox.append((self._streams[name], EngineStepError(message)))
                self._abort(name)
            if isinstance(error, RankError):  # no step can follow: /health says so
                raise
            engine.check_integrity()
            return
        for chunk in chunks:
            take = self._streams.get if chunk.result is None else self._streams.pop
            stream = take(chunk.request_id, None)
            if stream is not None:
                self._outbox.append((stream, chunk))

    def _add(self, request: EngineRequest, stream: ResultStream) -> None:
        try:
            self._engine.add_request(
                request.request_id,
                request.prompt.token_ids,
                request.params,
                prompt=request.prompt.text,
                stream=request.search is None,
                continues_prompt=not request.prompt.is_chat,
                kept_special_ids=request.prompt.kept_special_ids,
                priority=request.priority,
                timeout=request.timeout,
                cache_salt=request.cache_salt,
                adapter=request.adapter,
                search=request.search,
                part_of=request.part_of,
            )
        except OctavoError as error:
            self._outbox.append((stream, error))
        except Exception as error:
            _log.exception("a request could not be added")
            self._outbox.append((stream, EngineStepError(f"{type(error).__name__}: {error}")))
        else:
            self._streams[request.request_id] = stream

    def _abort(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        try:
            self._engine.abort(request_id)
        except Exception:
            # A detokenizer that fails while the text is finished is not asked a second time.
            _log.exception("a request could not be aborted at the first attempt")
            self._engine.abort(request_id)

    @property
    def _engine(self) -> Engine:
        if self.model is None:
            raise self._not_running()
        return self.model.engine

    def _send(self, stats: StepStats) -> None:
        outbox, self._outbox = self._outbox, []
        self._call_loop(partial(self._deliver, outbox, stats))

    def _call_loop(self, function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: there is no reader any more
            if self._loop is not None:
                self._loop.call_soon_threadsafe(function)


def _check_ranks(engine: Engine) -> None:
    """Raise a RankError where a rank of a divided model has ended; only a step would notice it."""
    getattr(engine.runtime, "check", lambda: None)()


def _end_loading(program_ends: threading.Event, has_loaded: threading.Event, pid: int) -> None:
    """At the program's end: wait for a thread that loads, which must not be in the core then.

    `EngineGuard` says why, and does the same for one that steps. pid: the process that loads.
    """
    program_ends.set()
    if os.getpid() == pid and not has_loaded.wait(1.0):
        _log.warning("the program ends while a model is loaded: waiting for %d s", EXIT_SECONDS)
        has_loaded.wait(EXIT_SECONDS)


class _Recorder:
    """Writes the engine's event log to a file, once a second and whenever it falls idle.

    A file that cannot be opened is an error before the server is ready. One that cannot be written
    to any more, on a full disk, is given up: answers matter more.
    """

    def __init__(self, engine: Engine, path: Path | None) -> None:
        self._file = None if path is None else EventLogFile(engine.events, path)
        self._next = 0.0

    def flush(self, at_once: bool) -> None:
        """Write what is new, if it is time to."""
        now = time.monotonic()
        if self._file is None or (now < self._next and not at_once):
            return
        self._next = now + 1.0
        try:
            self._file.flush()
        except OSError:
            _log.exception("the event log cannot be written to; nothing more goes into it")
            self.close()

    def close(self) -> None:
        """Write what is new, and close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None
