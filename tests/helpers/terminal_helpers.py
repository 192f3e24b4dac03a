"""Programs in a terminal of their own, whose keys and screen a test has."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from typing import IO

MARKED = "\x1b[?2004h"  # the terminal is to tell what is pasted
SENT = "\x1b[?2004l"  # a message has been taken
PROMPT = "\x1b[?25h"  # the cursor is shown: the prompt is on the screen, and keys are taken


class Terminal:
    """A program in a pseudo-terminal of its own, so that Ctrl-C and Ctrl-D are real."""

    # The child makes the terminal its controlling one before it becomes the program.
    _START = (
        "import fcntl, os, sys, termios; os.setsid();"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    )

    def __init__(self, *arguments: str, stdout: IO[str] | None = None, TERM: str = "xterm") -> None:
        self.descriptor, child = os.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("4H", 24, 60, 0, 0))
        command = [sys.executable, "-c", self._START, sys.executable, "-m", "octavo"]
        self.process = subprocess.Popen(
            [*command, *arguments],
            stdin=child,
            stdout=stdout or child,
            stderr=child,
            close_fds=True,
            env={**os.environ, "TERM": TERM, "COLUMNS": "", "LINES": ""},
        )
        os.close(child)
        self.seen = ""
        self.all = ""
        self.read_before = ""  # what the last wait went past

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self.descriptor)

    def send(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def wait_for(self, text: str, seconds: float = 30.0) -> None:
        """Read until `text` has come; it and all before it are then forgotten."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} did not come; there is {self.seen[-500:]!r}"
            self._read()
        self.read_before, _, self.seen = self.seen.partition(text)

    def wait_for_characters(self, count: int) -> None:
        """Read until so much more has come, whatever it is."""
        end = time.monotonic() + 30.0
        while len(self.seen) < count:
            assert time.monotonic() < end, f"not {count} characters, but {self.seen!r}"
            self._read()

    def _read(self) -> None:
        if select.select([self.descriptor], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):  # Linux's way to say that it has ended
                read = os.read(self.descriptor, 4096).decode(errors="replace")
                self.seen += read
                self.all += read
