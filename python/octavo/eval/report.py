"""The table of `octavo eval`, and its progress bar."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from octavo.eval.run import EvalResult, ModelRun


class ProgressBar:
    """A bar with the time left on standard error; nothing where that is no terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task: TaskID | None = None
        self._description = ""

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, description: str, done: int, total: int) -> None:
        """What goes on, and how much of how much is done."""
        if self._task is None or description != self._description:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(description, total=total)
            self._description = description
        self._progress.update(self._task, completed=done, total=total)


def render(result: EvalResult) -> RenderableType:
    """Two small tables: the models' perplexities, and how far they lie apart."""
    title = (
        f"{result.text}: {result.num_scored:,} of {result.num_tokens:,} tokens scored, "
        f"{result.num_windows} windows of {result.window}, stride {result.stride}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("model", overflow="fold")
    table.add_column("numbers")
    for heading in ("weights", "nats a token", "perplexity"):
        table.add_column(heading, justify="right")
    for run in (result.model, result.against):
        if run is not None:
            table.add_row(*_row(run))
    parts: list[RenderableType] = [table]
    if result.divergence is not None:
        parts.append(_divergence_table(result))
    parts.append(f"{result.seconds:.1f} s")
    return Group(*parts)


def _row(run: ModelRun) -> tuple[str, ...]:
    value = run.perplexity
    return (
        Path(run.path).name,
        f"{run.weights}, KV {run.kv_dtype}, {run.device}",
        f"{run.weight_bytes / 2**20:,.0f} MiB",
        f"{value.mean_surprisal:.5f}",
        f"{value.value:,.4f} ± {value.standard_error:,.2f}",
    )


def _divergence_table(result: EvalResult) -> Table:
    found = result.divergence
    table = Table(title="The first against the second", title_justify="left")
    headings = ("mean KL", "median", "99 %", "max", "same first choice", "perplexity ratio")
    for heading in headings:
        table.add_column(heading, justify="right")
    if found is not None:
        kls = (found.mean_kl, found.median_kl, found.p99_kl, found.max_kl)
        table.add_row(
            *(f"{value:.3g}" for value in kls),
            f"{found.top_agreement:.2%}",
            f"{found.perplexity_ratio:.5f} ({found.perplexity_ratio - 1:+.3%})",
        )
    return table


def print_report(result: EvalResult) -> None:
    """On standard output, as wide as the terminal."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=110)
    console.print(render(result))
