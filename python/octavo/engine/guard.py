"""Who may use an engine: one thread at a time, in the process that made it."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from octavo.errors import EngineInUseError, WrongProcessError

P = ParamSpec("P")
T = TypeVar("T")
EXIT_SECONDS = 30.0
"""How long the end of the program waits for a daemon thread's step, which takes far less."""


class EngineGuard:
    """A context for every use of an engine; it refuses, and never waits.

    Entering raises a WrongProcessError in a process that was forked from the one that made the
    engine: the threads that compute exist in that one only, and to wait for them is to wait for
    ever. It raises an EngineInUseError while another thread is inside.

    When the program ends, Python kills daemon threads as soon as they come back from the core,
    and C++ ends the process with an error if that happens within its functions. So the end waits
    until nobody is inside, and a daemon thread that enters later ends there, with a SystemExit.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._inside = threading.Lock()
        self._program_ends = threading.Event()
        weakref.finalize(self, _empty, self._inside, self._program_ends, self.pid)

    @property
    def is_here(self) -> bool:
        """Whether this process made the engine."""
        return os.getpid() == self.pid

    def check_process(self) -> None:
        """WrongProcessError in a process that was forked from the one that made the engine."""
        if not self.is_here:
            raise WrongProcessError(self.pid, os.getpid())

    def __enter__(self) -> None:
        self.check_process()
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
    """At the program's end (or the guard's own): let no daemon thread in, and wait for who is."""
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
