"""Plots of a load test as one SVG file, drawn by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.bench.serve_run import Measured
from octavo.errors import InvalidArgumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PARTS = np.linspace(0.0, 1.0, 401)  # of a distribution that is drawn; an eye sees no more


def need_matplotlib() -> None:
    """Raise InvalidArgumentError where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise InvalidArgumentError(
            "--plot needs matplotlib, which is not installed: `pip install 'octavo[plot]'` (or "
            "`pip install matplotlib`), or leave it out; --json writes all figures"
        )


def plot(measured: Sequence[Measured], summaries: Sequence[dict[str, Any]], title: str) -> str:
    """What `draw` draws, as the text of an SVG."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "octavo"}):
        draw(measured, summaries, title).savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def draw(measured: Sequence[Measured], summaries: Sequence[dict[str, Any]], title: str) -> Figure:
    """Distributions of TTFT, ITL and E2E; with several numbers of users throughput over them."""
    from matplotlib import style
    from matplotlib.figure import Figure

    records = [[record for record in found.records if record.ok] for found in measured]
    gaps = [[gap for record in own for gap in record.gaps] for own in records]
    panels = (
        ("Time to first token (ms)", "Requests (%)", [[r.ttft for r in own] for own in records]),
        ("Inter-token latency (ms)", "Tokens (%)", gaps),
        ("End-to-end latency (ms)", "Requests (%)", [[r.e2e for r in own] for own in records]),
    )
    with style.context("tableau-colorblind10"):
        figure = Figure(figsize=(9.0, 6.5), layout="constrained")
        figure.suptitle(title, parse_math=False)
        *distributions, throughput = figure.subplots(2, 2).flat
    for axes, (across, up, of_loads) in zip(distributions, panels, strict=True):
        for found, seconds in zip(measured, of_loads, strict=True):
            milliseconds = 1000 * np.quantile(seconds or [math.nan], _PARTS)
            axes.plot(milliseconds, 100 * _PARTS, label=found.load.name)
        axes.set(xlabel=across, ylabel=up, xlim=(0, None), ylim=(0, 100))
        axes.grid(alpha=0.3)
    if len(summaries) > 1 and all(summary["rate"] is None for summary in summaries):
        throughput.plot(
            [each["concurrency"] for each in summaries],
            [each["answer_tokens_per_second"] for each in summaries],
            "o-",
        )
        throughput.set(
            xlabel="Users", ylabel="Throughput (answer tokens/s)", xlim=(0, None), ylim=(0, None)
        )
        throughput.grid(alpha=0.3)
    else:
        throughput.remove()
    lines, names = distributions[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=4)
    return figure
