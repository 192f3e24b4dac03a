"""The progress bar of a generation: requests done, tokens a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

Advance = Callable[[int, int], None]
"""Called after each step with the requests it finished and the tokens it drew."""


@contextmanager
def progress_bar(enabled: bool, num_requests: int) -> Iterator[Advance]:
    """A bar on stderr, redrawn ten times a second at most; nothing at all unless enabled."""
    if not enabled or not num_requests:
        yield lambda _num_finished, _num_tokens: None
        return
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
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("generating", total=num_requests, speed="")
        started = monotonic()
        total_tokens = 0

        def advance(num_finished: int, num_tokens: int) -> None:
            nonlocal total_tokens
            total_tokens += num_tokens
            seconds = monotonic() - started
            speed = f"{total_tokens / seconds:.1f} tokens/s" if seconds > 0 else ""
            bar.update(task, advance=num_finished, speed=speed)

        yield advance
