"""One engine for many threads: one waiting thread makes the steps for all that wait.

There is no background thread. A waiting thread takes the lead if no thread has it: it carries out
the commands of all threads, makes steps, and puts each result into the inbox of its call. When its
own call has a result, it gives up the lead and wakes another waiting thread. All others sleep until
their inbox has something.

No thread ever waits for the lead to change the engine. Such a command goes into a queue, and the
leading thread carries it out between two steps. So a call may be ended from anywhere: by another
thread, or by the garbage collector during a step.
"""

from __future__ import annotations

import copy
import enum
import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from octavo.engine.guard import deferred_interrupt
from octavo.engine.outputs import OutputChunk, refused_output
from octavo.engine.search import Search
from octavo.errors import EngineClosedError, EngineInUseError, OctavoError, WrongProcessError
from octavo.prompts import EncodedPrompt
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo.engine.engine import Engine

T = TypeVar("T")
LOOK_AGAIN_SECONDS = 1.0
"""The longest sleep: a second Ctrl-C while the lead changes hands may lose a wake-up."""
BEAT_SECONDS = 0.1  # between two calls of `on_step` while another thread makes the steps
# No request could be answered any more: these are never an error of one alone.
_OF_ENGINE = (EngineClosedError, EngineInUseError, WrongProcessError)


class Asked(NamedTuple):
    """A request without a number yet. key: the caller's name for it.

    may_be_refused: if the engine refuses it, its output says so, and the call goes on.
    """

    key: Any
    prompt: EncodedPrompt
    params: SamplingParams
    stream: bool = False
    adapter: str | None = None
    search: Search | None = None
    may_be_refused: bool = False


class Arrival(NamedTuple):
    """A chunk of the request with this key."""

    key: Any
    chunk: OutputChunk


class Sign(enum.Enum):
    """What an inbox may hold besides arrivals and errors."""

    LOOK = "perhaps no thread leads"
    ENDED = "the call was ended"


class Call:
    """The open requests of one caller. As a context manager, it ends at the end of the block.

    num_open: requests whose end has not been taken. inbox, request_ids (of those that run): used
    by `SharedEngine`. Raises WrongProcessError in a process that did not make the engine.
    """

    def __init__(self, shared: SharedEngine) -> None:
        self.check_process = shared.engine.guard.check_process
        self.check_process()
        self.num_open = 0
        self.has_ended = False
        self.inbox: SimpleQueue[Arrival | Exception | Sign] = SimpleQueue()
        self.request_ids: set[str] = set()
        self._shared = shared

    def ask(self, requests: SequenceOf[Asked]) -> None:
        """Add requests, which get consecutive numbers.

        If the engine refuses one that may not be, it and all after it are not added, and `take`
        raises the error.
        """
        self.num_open += len(requests)
        self._shared.do(partial(self._shared.add, self, requests))

    def take(self, on_step: Callable[[], None] | None = None) -> Arrival | None:
        """The next arrival; makes steps or waits for it. None when no more will come.

        on_step: called after every step made here, and ten times a second while others make them.
        Raises the error of a step in which one of the requests was; the call has then ended.
        """
        if not self.num_open or self.has_ended:
            return None
        item = self._shared.next_item(self, on_step)
        if isinstance(item, Sign):
            return None
        if isinstance(item, Exception):
            self.end()
            try:
                raise item
            finally:
                del item  # a cycle through the traceback would keep it alive
        if item.chunk.result is not None:
            self.num_open -= 1
        return item

    def end(self) -> None:
        """Abort unfinished requests; any thread may call this, at any time and repeatedly."""
        self.has_ended = True
        if self.num_open and self._shared.engine.guard.is_here:
            self.inbox.put(Sign.ENDED)  # for a thread that waits for an arrival
            self._shared.do(partial(self._shared.drop, self))

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class SharedEngine:
    """An engine with its open calls. Nothing else may drive the engine meanwhile."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._numbers = itertools.count()
        self._open: dict[str, tuple[Call, Any]] = {}  # call and key by request id
        self._commands: deque[Callable[[], None]] = deque()
        self._waiting: dict[Call, None] = {}  # calls whose threads sleep, or are about to
        self._lead = threading.Lock()
        self._leader: int | None = None  # the thread that has it

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def between_steps(self, function: Callable[[Engine], T]) -> T:
        """Run a function while no thread changes the engine; it must not wait for answers."""
        self.engine.guard.check_process()
        self._check_not_within()
        outcome: Future[T] = Future()

        def command() -> None:
            try:
                outcome.set_result(function(self.engine))
            except Exception as error:
                outcome.set_exception(error)

        self.do(command)
        return outcome.result()

    def do(self, command: Callable[[], None]) -> None:
        """Carry out a command between two steps: now, if no thread leads. It must not raise."""
        self._commands.append(command)
        with deferred_interrupt():
            self._settle()
            self._wake_one()

    def next_item(
        self, call: Call, on_step: Callable[[], None] | None
    ) -> Arrival | Exception | Sign:
        """The next item of the call's inbox; makes steps, or waits for them, until there is one."""
        self.engine.guard.check_process()
        self._check_not_within()
        seconds = LOOK_AGAIN_SECONDS if on_step is None else BEAT_SECONDS
        try:
            # Before trying to take the lead: a thread that gives it up from now on sees this call.
            self._waiting[call] = None
            while True:
                if call.inbox.empty():
                    self._step_for_all(call, on_step)
                try:
                    item = call.inbox.get(timeout=seconds)
                except Empty:
                    if on_step is not None:
                        on_step()
                    continue
                if item is not Sign.LOOK:
                    return item
        finally:
            self._waiting.pop(call, None)
            self._wake_one()

    def _check_not_within(self) -> None:
        if self._leader == threading.get_ident():
            raise EngineInUseError(
                "an answer was asked for in the midst of a step, by the very thread that makes it; "
                "expected no such thing in signal handlers, finalizers, `between_steps` and "
                "logits processors"
            )

    # ---- the lead ----

    def _take_lead(self) -> bool:
        if not self._lead.acquire(blocking=False):
            return False
        self._leader = threading.get_ident()
        return True

    def _give_lead_up(self) -> None:
        self._leader = None
        self._lead.release()

    def _step_for_all(self, call: Call, on_step: Callable[[], None] | None) -> None:
        """Lead until `call` has a result; returns at once while another thread leads."""
        with deferred_interrupt() as interrupted:
            if not self._take_lead():
                return
            try:
                self._carry_out()
                while call.inbox.empty() and not interrupted():
                    self._step(call)
                    if on_step is not None:
                        on_step()
                    self._carry_out()
            finally:
                self._give_lead_up()
                self._settle()

    def _settle(self) -> None:
        """Carry out commands, unless another thread leads: then that thread does it, here too."""
        while self._commands and self._take_lead():
            try:
                self._carry_out()
            finally:
                self._give_lead_up()

    def _wake_one(self) -> None:
        """If no thread leads, wake the one that waits longest, so that it takes the lead."""
        if not self._waiting or self._lead.locked():
            return
        for call in list(self._waiting):
            if not call.has_ended:  # else its thread was told already, or is gone
                call.inbox.put(Sign.LOOK)
                return

    # ---- what only the thread that leads does ----

    def _carry_out(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def add(self, call: Call, requests: SequenceOf[Asked]) -> None:
        """A command: start requests."""
        for asked in requests:
            try:
                self._add(call, asked)
            except Exception as error:
                is_its_own = isinstance(error, OctavoError) and not isinstance(error, _OF_ENGINE)
                if not (asked.may_be_refused and is_its_own):
                    self._fail(call, error)
                    return
                refused = refused_output(asked.prompt.text, error)
                call.inbox.put(Arrival(asked.key, OutputChunk("", 0, "", result=refused)))

    def _add(self, call: Call, asked: Asked) -> None:
        request_id = str(next(self._numbers))
        self.engine.add_request(
            request_id,
            asked.prompt.token_ids,
            asked.params,
            prompt=asked.prompt.text,
            stream=asked.stream,
            continues_prompt=not asked.prompt.is_chat,
            kept_special_ids=asked.prompt.kept_special_ids,
            adapter=asked.adapter,
            search=asked.search,
        )
        call.request_ids.add(request_id)
        self._open[request_id] = (call, asked.key)

    def drop(self, call: Call) -> None:
        """A command: abort every request of a call."""
        while call.request_ids:
            request_id = call.request_ids.pop()
            self._open.pop(request_id, None)
            # A detokenizer that fails while the text is finished is not called again.
            for _ in range(2):
                try:
                    self.engine.abort(request_id)
                    break
                except Exception:  # no caller waits for this answer
                    continue

    def _fail(self, call: Call, error: Exception) -> None:
        self.drop(call)
        call.inbox.put(error)

    def _step(self, leader: Call) -> None:
        """One step, its chunks delivered, or its error."""
        try:
            chunks = self.engine.step()
        except Exception as error:
            self._fail_step(leader, error)
            return
        for chunk in chunks:
            call, key = self._open.get(chunk.request_id, (None, None))
            if call is None:
                continue
            if chunk.result is not None:
                del self._open[chunk.request_id]
                call.request_ids.discard(chunk.request_id)
            call.inbox.put(Arrival(key, chunk))
        if not self.engine.has_unfinished_requests and leader.inbox.empty():
            vanished = EngineInUseError(
                "requests have vanished from the engine; expected nobody else to step it, nor to "
                "abort what was asked through LLM: ask through LLM alone"
            )
            self._fail_step(leader, vanished)

    def _fail_step(self, leader: Call, error: Exception) -> None:
        """Fail the calls with requests in the step; with none, all, which would else wait on."""
        calls = dict.fromkeys(call for call, _ in self._open.values())
        hit = [call for call in calls if call.request_ids & self.engine.failed_request_ids]
        for call in hit or {**calls, leader: None}:
            self._fail(call, error if call is leader else _twin(error))


class SharedIterator(Generator[T, None, None]):
    """A generator over a call that any thread may read and close, at any time.

    One thread reads at a time and others wait for their turn; a thread that reads while it is
    closed gets StopIteration. A plain generator raises a ValueError in both cases.
    """

    def __init__(self, generator: Generator[T, None, None], call: Call) -> None:
        self._generator = generator
        self._call = call
        self._reading = threading.Lock()

    def __next__(self) -> T:
        return self.send(None)

    def send(self, value: None) -> T:
        """As `next`."""
        self._call.check_process()  # a thread that was not forked may hold the lock
        with self._reading:
            return self._generator.send(value)

    def throw(self, *error: Any) -> T:
        """Raise an error where the generator stands."""
        self._call.check_process()
        with self._reading:
            return self._generator.throw(*error)

    def close(self) -> None:
        """End the call and abort its unfinished requests."""
        self._call.end()
        if self._reading.acquire(blocking=False):  # else the reading thread sees that it ended
            try:
                self._generator.close()
            finally:
                self._reading.release()


def _twin(error: Exception) -> Exception:
    """A copy for another thread, since a traceback belongs to one; `error` is its cause."""
    try:
        found = copy.copy(error)
    except Exception:  # its constructor takes other arguments than its args
        return error
    found.__cause__ = error
    return found
