"""The table of `octavo eval`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType

from octavo.eval.evaluation import EvalResult, ModelRun
from octavo.eval.measures import Divergence
from octavo.progress import stdout_console
from octavo.tables import Figures


def render(result: EvalResult) -> RenderableType:
    """Two small tables: the models' perplexities, and how far they lie apart."""
    title = (
        f"{result.text}: {result.num_scored:,} of {result.num_tokens:,} tokens scored, "
        f"{result.num_windows} windows of {result.window}, stride {result.stride}"
    )
    rows = [_row(run) for run in (result.model, result.against) if run is not None]
    headings = ("model", "numbers", "weights", "nats a token", "perplexity")
    parts: list[RenderableType] = [Figures(headings, rows, ("model", "numbers"), title=title)]
    if result.divergence is not None:
        parts.append(_divergence_table(result.divergence))
    parts.append(f"{result.seconds:.1f} s")
    return Group(*parts)


def _row(run: ModelRun) -> tuple[str, ...]:
    value = run.perplexity
    adapter = "" if run.adapter is None else f" + {Path(run.adapter).name}"
    return (
        Path(run.path).name + adapter,
        f"{run.weights}, KV {run.kv_dtype}, {run.device}"
        + (f", {run.tensor_parallel_size} ranks" if run.tensor_parallel_size > 1 else ""),
        f"{run.weight_bytes / 2**20:,.0f} MiB",
        f"{value.mean_surprisal:.5f}",
        f"{value.value:,.4f} ± {value.standard_error:,.2f}",
    )


def _divergence_table(found: Divergence) -> Figures:
    headings = ("mean KL", "median", "99 %", "max", "same first choice", "perplexity ratio")
    kls = (found.mean_kl, found.median_kl, found.p99_kl, found.max_kl)
    row = (
        *(f"{value:.3g}" for value in kls),
        f"{found.top_agreement:.2%}",
        f"{found.perplexity_ratio:.5f} ({found.perplexity_ratio - 1:+.3%})",
    )
    return Figures(headings, [row], title="The first against the second")


def print_report(result: EvalResult) -> None:
    """On standard output, as wide as the terminal."""
    stdout_console().print(render(result))
