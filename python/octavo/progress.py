"""Telling how far long work has come: not at all, by bars on a terminal, by lines in a log."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

Advance = Callable[[int], None]
"""Called with the requests finished since the last call, 0 to show the time and the speed only."""
StageProgress = Callable[[str, int, int], None]
"""Called with what is going on, and how much of how much is done."""
Unit = Literal["count", "percent", "bytes"]


class Progress:
    """What pulling and loading report to, one step at a time. This one says nothing."""

    def message(self, text: str) -> None:
        """A line for the user to read."""

    def start(self, description: str, total: int) -> None:
        """A step of `total` bytes begins; 0 where that is not known."""

    def advance(self, amount: int) -> None:
        """So many bytes more are done."""

    def finish(self) -> None:
        """The step is done."""


NO_PROGRESS = Progress()
_NARROW = 60  # columns of a terminal, below which there is no bar, only how much is done


def stderr_console() -> Console:
    """For everything that is not the answer itself: stdout stays clean for pipes."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def stdout_console() -> Console:
    """For a report on standard output; 110 columns wide where that is no terminal."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 110
    return console


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
            self.now(line())
            self._last = time.monotonic()

    def now(self, line: str) -> None:
        """Write a line at once."""
        self._write(line)

    def end(self) -> None:
        """No more lines will come."""


class NotebookLine(LogLines):
    """One line on standard error that is written over again and again.

    Notebooks show that as terminals do. Bars of rich would need ipywidgets there.
    """

    SECONDS = 0.2

    def __init__(self) -> None:
        super().__init__(self._overwrite)
        self._width = 0

    def _overwrite(self, line: str) -> None:
        sys.stderr.write("\r" + line.ljust(self._width))
        sys.stderr.flush()
        self._width = len(line)

    def end(self) -> None:
        """Let what comes next begin on a line of its own."""
        if self._width:
            sys.stderr.write("\n")


def log_bytes(write: Callable[[str], object], what: str) -> Callable[[int, int], None]:
    """A callback of (bytes done, bytes in all) that gives `write` a line now and then."""
    lines = LogLines(write)
    return lambda done, total: lines.offer(lambda: f"{what}: {_amount('bytes', done, total)}")


class Bar(Progress):
    """Bars on standard error, all of one look; in a notebook a NotebookLine, elsewhere LogLines.

    Use it in a `with` block. `update` is the callback that work in stages
    takes. Nothing is drawn before the first step begins: a message alone needs no bar.
    """

    def __init__(
        self, unit: Unit, *, keep: bool = False, quiet: bool = False, redirect: bool = True
    ) -> None:
        """unit: how the amount that is done is shown.

        keep: leave each step's bar on the screen; else a step takes the place of the one before,
        and the last one vanishes. quiet: show nothing but messages. redirect: what is printed
        meanwhile goes above the bar.
        """
        self._console = stderr_console()
        in_notebook = self._console.is_jupyter
        draws = self._console.is_terminal and not in_notebook
        self._bar = _rich_bar(self._console, unit, keep, redirect) if draws and not quiet else None
        self._log: LogLines | None = None
        if not draws and not quiet:
            self._log = NotebookLine() if in_notebook else LogLines(self.message)
        self._unit = unit
        self._keep = keep
        self._task: Any = None
        self._description, self._done, self._total, self._facts = "", 0, 0, ""
        self._started, self._done_before = 0.0, 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.stop()
        if self._log is not None:
            self._log.end()

    def message(self, text: str) -> None:
        self._console.print(text)

    def start(self, description: str, total: int, done: int = 0) -> None:
        """A step begins, of which `done` is done already; total 0 where that is not known."""
        self._description, self._done, self._total, self._facts = description, done, total, ""
        self._started, self._done_before = time.monotonic(), done
        if self._bar is not None:
            if self._task is None:
                self._bar.start()
            elif not self._keep:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(
                description, total=total or None, completed=done, facts=""
            )

    def advance(self, amount: int) -> None:
        self._show(self._done + amount, self._total, self._facts)

    def finish(self) -> None:
        done = self._total or self._done or 1
        self._show(done, done, self._facts)

    def update(self, stage: str, done: int, total: int, facts: str = "") -> None:
        """Show that `done` of `total` of a stage are done. facts: what else there is to say."""
        if stage != self._description:
            self.start(stage, total, done)
        self._show(done, total, facts)

    def write_line(self) -> None:
        """In a log, say at once how far it is: at the end of work that has no other sign of it."""
        if self._log is not None:
            self._log.now(self._line())

    def _show(self, done: int, total: int, facts: str) -> None:
        self._done, self._total, self._facts = done, total, facts
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total or None, facts=facts)
        if self._log is not None:
            self._log.offer(self._line)

    def _line(self) -> str:
        parts = [f"{self._description}: {_amount(self._unit, self._done, self._total)}"]
        if self._facts:
            parts.append(self._facts)
        num_new, num_left = self._done - self._done_before, self._total - self._done
        if num_new > 0 and num_left > 0:
            seconds = (time.monotonic() - self._started) / num_new * num_left
            parts.append(f"about {duration(seconds)} left")
        return ", ".join(parts)


def _rich_bar(console: Console, unit: Unit, keep: bool, redirect: bool) -> RichProgress:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as RichProgress

    amounts: dict[Unit, tuple[ProgressColumn, ...]] = {
        "count": (MofNCompleteColumn(),),
        "percent": (TextColumn("{task.percentage:3.0f} %"),),
        "bytes": (DownloadColumn(), TransferSpeedColumn()),
    }
    figures = amounts[unit]
    if console.width < _NARROW:  # else every column would be cut
        figures = figures[:1]
    else:
        figures = (BarColumn(28), *figures, TimeRemainingColumn(elapsed_when_finished=True))
    return RichProgress(
        TextColumn("{task.description:<12}", markup=False),
        *figures,
        TextColumn("{task.fields[facts]}", markup=False),
        console=console,
        transient=not keep,
        redirect_stdout=redirect,
        redirect_stderr=redirect,
    )


def _amount(unit: Unit, done: int, total: int) -> str:
    """As in "120 of 269 MB"; total 0 where it is not known."""
    if unit == "count":
        return f"{done:,}/{total:,}"
    if unit == "percent":
        return f"{100 * done / (total or 1):.0f} %"
    of_all = f" of {total / 1e6:,.0f}" if total else ""
    return f"{done / 1e6:,.0f}{of_all} MB"


def duration(seconds: float) -> str:
    """43 s, 5 min 12 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


@contextmanager
def request_bar(
    turn: threading.Lock, num_requests: int, num_drawn: Callable[[], int] | None
) -> Iterator[Advance | None]:
    """The bar of a generation: requests done, tokens a second.

    turn: held while a bar is shown. While another thread shows one there is none, but None.
    num_drawn: how many tokens the engine has drawn so far, for all requests of all threads; None:
    they are embeddings, and none is drawn.
    """
    if not turn.acquire(blocking=False):
        yield None
        return
    num_done, started, drawn_before = 0, time.monotonic(), num_drawn() if num_drawn else 0
    what = "generating" if num_drawn else "embedding"

    def advance(num_finished: int) -> None:
        nonlocal num_done
        num_done += num_finished
        speed = ""
        if num_drawn is not None:
            drawn = num_drawn() - drawn_before
            speed = f"{drawn / max(time.monotonic() - started, 1e-9):,.1f} tokens/s"
        bar.update(what, num_done, num_requests, speed)

    try:
        # Prints of other threads keep going where they went: what they hold of sys.stdout would
        # outlive the bar.
        with Bar("count", keep=True, redirect=False) as bar:
            bar.start(what, num_requests)
            yield advance
            bar.write_line()
    finally:
        turn.release()


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
