"""The terminal's keyboard while nobody reads it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


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
