"""Telling how far a long step has come: a protocol, silence, and a bar."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
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


class BarProgress:
    """A bar on standard error, drawn with rich; use it in a `with` block."""

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
        )
        self._task: Any = None

    def __enter__(self) -> BarProgress:
        return self  # drawn from the first step on: a message alone needs no bar

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._bar.stop()

    def message(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, description: str, total: int) -> None:
        self._bar.start()
        self._task = self._bar.add_task(description, total=total or None)

    def advance(self, amount: int) -> None:
        self._bar.update(self._task, advance=amount)

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
    """Bytes of all files below `folder`; files that vanish meanwhile count as nothing."""
    total = 0
    for entry in folder.rglob("*"):
        try:
            if entry.is_file():
                total += entry.stat().st_size
        except OSError:
            continue
    return total
