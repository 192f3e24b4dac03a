"""An engine's guard: one thread at a time, in the process that made it; no signal in a step."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from octavo.errors import EngineClosedError, EngineInUseError, WrongProcessError

P = ParamSpec("P")
T = TypeVar("T")
EXIT_SECONDS = 30.0
"""How long the end of the program waits for a daemon thread's step; a step takes far less."""
_NAMES = ("INT", "ALRM", "TERM", "HUP", "QUIT", "USR1", "USR2", "VTALRM", "PROF")
SIGNALS = tuple(getattr(signal, f"SIG{name}") for name in _NAMES if hasattr(signal, f"SIG{name}"))
"""Signals whose handlers may raise: Ctrl-C, time limits, requests to end."""


class EngineGuard:
    """A context for every use of an engine; it refuses, and never waits.

    Entering raises a WrongProcessError in a process that was forked from the one that made the
    engine: the threads that compute exist only there, and waiting for them would never end. It
    raises an EngineInUseError while another thread is inside, an EngineClosedError after `close`.

    When the program ends, Python kills daemon threads as soon as they come back from the core,
    and C++ ends the process with an error if that happens within its functions. So the end waits
    until no thread is inside, and a daemon thread that enters later ends there, with a SystemExit.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._inside = threading.Lock()
        self._program_ends = threading.Event()
        self._is_closed = False
        weakref.finalize(self, _empty, self._inside, self._program_ends, self.pid)

    @property
    def is_here(self) -> bool:
        """Whether this process made the engine."""
        return os.getpid() == self.pid

    def check_process(self) -> None:
        """WrongProcessError in a process that was forked from the one that made the engine."""
        if not self.is_here:
            raise WrongProcessError(self.pid, os.getpid())

    def close(self) -> None:
        """Let nobody in any more."""
        self._is_closed = True

    def __enter__(self) -> None:
        self.check_process()
        if self._is_closed:
            raise EngineClosedError("the model was closed: load it again to ask it")
        is_free = self._inside.acquire(blocking=False)
        if self._program_ends.is_set() and threading.current_thread().daemon:
            if is_free:
                self._inside.release()
            raise SystemExit
        if not is_free:
            raise EngineInUseError(
                "the engine was used by two threads at a time; expected one: ask through LLM, "
                "which any number of threads may share, or drive the engine from one thread"
            )

    def __exit__(self, *_: object) -> None:
        self._inside.release()


def _empty(inside: threading.Lock, program_ends: threading.Event, pid: int) -> None:
    """At the program's end (or the guard's): let no daemon thread in, wait for one inside."""
    program_ends.set()
    if os.getpid() == pid and inside.acquire(timeout=EXIT_SECONDS):
        inside.release()


class Guarded(Protocol):
    """An object with a guard."""

    guard: EngineGuard


Owner = TypeVar("Owner", bound=Guarded)


def guarded(
    method: Callable[Concatenate[Owner, P], T],
) -> Callable[Concatenate[Owner, P], T]:
    """The method, run within the guard of its object."""

    @functools.wraps(method)
    def inside(owner: Owner, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with owner.guard:
            return method(owner, *args, **kwargs)

    return inside


class _Held:
    """A signal handler that calls another one and keeps the first exception that it raises."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any], kept: list[BaseException]):
        self.handler = handler
        self._kept = kept

    def __call__(self, number: int, frame: FrameType | None) -> None:
        try:
            self.handler(number, frame)
        except BaseException as error:
            if self._kept:
                raise
            self._kept.append(error)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold back the exception of a signal's handler until the block has ended, and raise it then.

    Yields a function that says whether an exception is held back, so that a long block may end
    early. A step changes the queues, the blocks and the answers together; an exception in the
    middle would leave them half changed. Ctrl-C raises a KeyboardInterrupt, a handler of SIGALRM
    often a time limit's error. A second signal's exception is not held back, in case a step never
    ends. Only the main thread receives signals; in any other this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    kept: list[BaseException] = []
    held: dict[int, _Held] = {}
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if callable(handler) and not isinstance(handler, _Held):  # else a block around this holds
            held[number] = _Held(handler, kept)
    for number, holder in held.items():
        signal.signal(number, holder)
    try:
        yield lambda: bool(kept)
    finally:
        for number, holder in held.items():
            handler = holder.handler
            if signal.getsignal(number) is holder:  # else the handler has installed another one
                signal.signal(number, handler)
    if kept:
        raise kept[0]
