"""Standard input, output and error where one is closed or full, and the keyboard during work."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Output(io.FileIO):
    """Standard output; `error` tells why it could not be written, if that has happened."""

    error: OSError | None = None

    def write(self, data: ReadableBuffer) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


class _Messages(io.FileIO):
    """Standard error. A message that cannot be written is dropped, and the work goes on."""

    def write(self, data: ReadableBuffer) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return memoryview(data).nbytes


def make_usable() -> None:
    """Give this process all three streams, whatever it was started with.

    Python has None for a closed one, and the next file that is opened would take its number. After
    this a closed input reads as empty, and a closed output fails when written to, as a full disk
    does. Characters that a stream cannot encode become "?". A width of 0 is one that is not known.
    """
    if not os.environ.get("COLUMNS", "1").strip("0"):
        del os.environ["COLUMNS"]  # into no columns rich prints nothing, not even an error
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Gets the lowest free number, which is this one; output cannot be written to.
            os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = _text(_Output(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Messages(2, "w", closefd=False), sys.stderr)


def _text(raw: io.FileIO, before: object) -> io.TextIOWrapper:
    """raw with the encoding of the stream that was there before, UTF-8 if there was none."""
    encoding = getattr(before, "encoding", None) or "utf-8"
    buffer = io.BufferedWriter(raw)
    at_once = raw.isatty() or raw.fileno() == 2
    return io.TextIOWrapper(buffer, encoding, errors="replace", line_buffering=at_once)


def output_error() -> OSError | None:
    """Flush standard output; the error if any of it, now or earlier, could not be written."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, _Output) else None


def forget_output() -> None:
    """Drop what could not be written; Python would try again at its exit and print an error."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def keep_interrupts() -> None:
    """Let Ctrl-C end the work also where Python drops its exception, as in a `__del__`.

    The signal comes once more, a little later: at once, the same place would drop it again.
    """
    before = sys.unraisablehook

    def again(dropped: sys.UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        main = threading.main_thread().ident
        if main is not None:
            threading.Timer(0.02, signal.pthread_kill, (main, signal.SIGINT)).start()

    sys.unraisablehook = again


@contextlib.contextmanager
def silent_keys() -> Iterator[None]:
    """Do not show keys that are typed meanwhile; they are kept for the next read.

    Ctrl-C and Ctrl-Z still work. Does nothing where standard input is no terminal, or where this
    program runs in the background.
    """
    try:
        import termios
    except ImportError:  # not a Unix
        yield
        return
    try:
        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
    except (OSError, ValueError, termios.error):
        yield
        return

    def change(attributes: list[int | list[bytes | int]]) -> None:
        # A background process that changes the terminal is stopped.
        with contextlib.suppress(OSError, termios.error):
            if os.tcgetpgrp(number) == os.getpgrp():
                termios.tcsetattr(number, termios.TCSANOW, attributes)

    input_flags, output_flags, control_flags, local_flags, *others = before
    # Without ICANON keys come one by one: Ctrl-D and half a line are kept as they are.
    silent = local_flags & ~(termios.ECHO | termios.ICANON)
    change([input_flags, output_flags, control_flags, silent, *others])
    try:
        yield
    finally:
        change(before)
