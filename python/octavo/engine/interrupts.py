"""What a signal raises comes between steps, never within one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_NAMES = ("INT", "ALRM", "TERM", "HUP", "QUIT", "USR1", "USR2", "VTALRM", "PROF")
SIGNALS = tuple(getattr(signal, f"SIG{name}") for name in _NAMES if hasattr(signal, f"SIG{name}"))
"""Signals that programs have handlers for which raise: Ctrl-C, time limits, requests to end."""


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
    """Hold back what a handler of a signal raises until the block has ended, and raise it then.

    Gives a function that says whether something is held back, so that a long block may end early.
    A step changes the queues, the blocks and the answers together; an exception in its midst would
    leave them half changed. Ctrl-C raises a KeyboardInterrupt, a handler of SIGALRM often a time
    limit's error. What a second signal raises is not held back, should a step never end. Only the
    main thread receives signals; in any other this does nothing.
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
            if signal.getsignal(number) is holder:  # else it has put another in its place
                signal.signal(number, handler)
    if kept:
        raise kept[0]
