"""The progress bar of commands that work in stages: diff, eval, bench, quantize."""

from __future__ import annotations

import contextlib

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from octavo.cli.common import stderr_console
from octavo.cli.terminal import silent_keys
from octavo.weights.progress import LogLines


class StageBar:
    """A bar on standard error, begun anew for each stage; where that is no terminal, LogLines.

    Use as a context manager; `update` is the callback that the work takes.
    """

    def __init__(self, *columns: str | ProgressColumn, quiet: bool = False) -> None:
        console = stderr_console()
        draws = console.is_terminal and not quiet
        self._log = None if draws or quiet else LogLines(console.print)
        self._keys = silent_keys() if draws else contextlib.nullcontext()
        self._progress = Progress(*columns, console=console, transient=True, disable=not draws)
        self._task: TaskID | None = None
        self._stage = ""

    @classmethod
    def with_counts(cls) -> StageBar:
        """Shows how many of how many, for stages of a few seconds."""
        counts = TextColumn("{task.completed:.0f}/{task.total:.0f}", style="dim")
        return cls(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(28), counts)

    @classmethod
    def with_time_left(cls, *, quiet: bool = False) -> StageBar:
        """Shows per cent and the time left, for stages of minutes; nothing if quiet."""
        percent = TextColumn("{task.percentage:3.0f} %")
        return cls(
            TextColumn("{task.description}"),
            BarColumn(),
            percent,
            TimeRemainingColumn(),
            quiet=quiet,
        )

    def __enter__(self) -> StageBar:
        self._keys.__enter__()
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._keys.__exit__(None, None, None)

    def update(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` of a stage are done."""
        if self._task is None or stage != self._stage:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(stage, total=total)
            self._stage = stage
        self._progress.update(self._task, completed=done, total=total)
        if self._log is not None and total:
            self._log.offer(lambda: f"{stage}: {100 * done / total:.0f} %")
