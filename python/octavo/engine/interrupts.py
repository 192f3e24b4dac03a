"""Ctrl-C between steps, never within one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold a first Ctrl-C back until the block has ended, and raise it then.

    Gives a function that says whether one is held back, so that a long block may end early.
    A step changes the queues, the blocks and the answers together; an exception in its midst would
    leave them half changed. The second Ctrl-C is not held back, should a step never end. Only the
    main thread receives signals; in any other this does nothing, and so it does where somebody
    else than Python's default handler looks after SIGINT.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    pending = False

    def hold(_signal_number: int, _frame: FrameType | None) -> None:
        nonlocal pending
        pending = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: pending
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pending:
        raise KeyboardInterrupt
