"""Telling how far a long step has come: a protocol, silence, a bar, and lines for a log."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol


class Progress(Protocol):
    """What pulling and loading report to; one step at a time."""

    def message(self, text: str) -> None:
        """A line for the user to read."""

    def start(self, description: str, total: int) -> None:
        """A step of `total` bytes begins; 0 where that is not known."""

    def advance(self, amount: int) -> None:
        """So many bytes more are done."""

    def finish(self) -> None:
        """The step is done."""


class NoProgress:
    """Says nothing."""

    def message(self, text: str) -> None:
        pass

    def start(self, description: str, total: int) -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def finish(self) -> None:
        pass


NO_PROGRESS: Progress = NoProgress()


class LogLines:
    """A line now and then, where there is no terminal to draw a bar on (the log of a job, say)."""

    SECONDS = 30.0  # between two lines

    def __init__(self, write: Callable[[str], object]) -> None:
        """write: takes a line."""
        self._write = write
        self._last = time.monotonic()

    def offer(self, line: Callable[[], str]) -> None:
        """Write what `line` returns, if the last line was long enough ago."""
        if time.monotonic() - self._last >= self.SECONDS:
            self._write(line())
            self._last = time.monotonic()


def bytes_done(what: str, done: float, total: float | None) -> str:
    """As in "loading smollm2-135m: 120 of 269 MB"; total may be unknown."""
    of_all = f" of {total / 1e6:,.0f}" if total else ""
    return f"{what}: {done / 1e6:,.0f}{of_all} MB"


def log_bytes(write: Callable[[str], object], what: str) -> Callable[[int, int], None]:
    """A callback of (bytes done, bytes in all) that gives `write` a line now and then."""
    lines = LogLines(write)
    return lambda done, total: lines.offer(lambda: bytes_done(what, done, total))


class BarProgress:
    """A bar on standard error, drawn with rich, or LogLines; use it in a `with` block."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not Console(stderr=True).is_terminal,
        )
        self._log = LogLines(self.message)
        self._task: Any = None

    def __enter__(self) -> BarProgress:
        return self  # drawn from the first step on: a message alone needs no bar

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._bar.stop()

    def message(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, description: str, total: int) -> None:
        self._bar.start()
        self._task = self._bar.add_task(description, total=total or None)

    def advance(self, amount: int) -> None:
        self._bar.update(self._task, advance=amount)
        task = self._bar.tasks[-1]
        if self._bar.disable:
            self._log.offer(lambda: bytes_done(task.description, task.completed, task.total))

    def finish(self) -> None:
        task = self._bar.tasks[self._bar.task_ids.index(self._task)]
        done = task.total or task.completed or 1
        self._bar.update(self._task, total=done, completed=done)


@contextmanager
def watch_folder(progress: Progress, folder: Path, already: int = 0) -> Iterator[None]:
    """Advance while somebody else writes into `folder`: by the growth of the files in it."""
    done = threading.Event()

    def watch() -> None:
        seen = already
        while not done.wait(0.2):
            size = folder_size(folder)
            if size > seen:
                progress.advance(size - seen)
                seen = size

    thread = threading.Thread(target=watch, name="octavo-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def folder_size(folder: Path) -> int:
    """Bytes of all files below `folder`; files and folders that vanish meanwhile are nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_size
    return total
