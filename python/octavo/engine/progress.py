"""The progress bar of a generation: requests done, tokens a second."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

Advance = Callable[[int], None]
"""Called with the requests finished since the last call, 0 to show the time and the speed only."""


@contextmanager
def progress_bar(
    turn: threading.Lock, num_requests: int, num_drawn: Callable[[], int]
) -> Iterator[Advance | None]:
    """A bar on stderr, redrawn ten times a second at most.

    turn: held while a bar is shown. While another thread shows one there is none, but None.
    num_drawn: how many tokens the engine has drawn so far, for all requests of all threads.
    """
    if not turn.acquire(blocking=False):
        yield None
        return
    try:
        with _bar(num_requests, num_drawn) as advance:
            yield advance
    finally:
        turn.release()


@contextmanager
def _bar(num_requests: int, num_drawn: Callable[[], int]) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    # Prints of other threads keep going where they went: what they hold of sys.stdout would outlive
    # the bar.
    with Progress(
        *columns, console=Console(stderr=True), redirect_stdout=False, redirect_stderr=False
    ) as bar:
        task = bar.add_task("generating", total=num_requests, speed="")
        started, drawn_before = monotonic(), num_drawn()

        def advance(num_finished: int) -> None:
            seconds = monotonic() - started
            num_tokens = num_drawn() - drawn_before
            speed = f"{num_tokens / seconds:.1f} tokens/s" if seconds > 0 else ""
            bar.update(task, advance=num_finished, speed=speed)

        yield advance
