"""Standard input, output and error: usable where one is closed; keys kept while nobody reads."""

from __future__ import annotations

import contextlib
import io
import os
import sys
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
    """Standard error. Messages that nobody can take any more stop no work: they are dropped."""

    def write(self, data: ReadableBuffer) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return memoryview(data).nbytes


def make_usable() -> None:
    """Give this process all three streams, whatever it was started with.

    Python has None for a closed one, and the next file that is opened would take its number. Now a
    closed input is an empty one, and a closed output fails when it is written to, as a full disk
    does. What a stream's encoding cannot say becomes "?".
    """
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
    """Flush standard output; the reason if any of it could not be written, ever."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, _Output) else None


def forget_output() -> None:
    """Let what could not be written go; Python would try again, and complain, as it ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


@contextlib.contextmanager
def silent_keys() -> Iterator[None]:
    """Keep keys that are typed meanwhile from being shown; whoever reads next gets them.

    Ctrl-C and Ctrl-Z work on. Does nothing where standard input is no terminal, or belongs to
    another program: this one runs in the background.
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
        # Whoever changes a terminal from the background is stopped.
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
