"""The plots of a report, drawn by matplotlib (the extra `plot`)."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from octavo.errors import InvalidArgumentError
from octavo.report.results import Distribution, Quality, Results, Row
from octavo.report.style import GRID, INK, MUTED, PAPER, look
from octavo.report.table import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE, NARROW = 6.3, 3.7  # inches; a page is as wide as one of them at about 96 dots an inch
Draw = Callable[["Figure", bool], None]
"""Draws into a figure; the flag says that it is a narrow one."""


def need_matplotlib(option: str) -> None:
    """Raise InvalidArgumentError where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise InvalidArgumentError(
            f"{option} needs matplotlib, which is not installed: `pip install 'octavo[plot]'` (or "
            "`pip install matplotlib`), or leave it out: the tables need nothing"
        )


@dataclass(frozen=True)
class Plot:
    """height: in inches, wide and narrow."""

    name: str
    draw: Draw
    height: tuple[float, float] = (3.7, 3.7)

    def picture(self, suffix: str, narrow: bool = False, paper: str = "none") -> bytes:
        """Drawn for a page or a phone, as an SVG with its texts as texts, or as a PNG."""
        import matplotlib
        from matplotlib.figure import Figure

        data = io.BytesIO()
        salt = f"octavo-{self.name}-{narrow}"
        with matplotlib.rc_context({**_settings(narrow), "svg.hashsalt": salt}):
            size = (NARROW if narrow else WIDE, self.height[narrow])
            figure = Figure(figsize=size, layout="constrained", facecolor=paper)
            self.draw(figure, narrow)
            more = {"metadata": {"Date": None}} if suffix == "svg" else {"dpi": 160}
            figure.savefig(data, format=suffix, **more)
        return data.getvalue()


def _settings(narrow: bool) -> dict[str, Any]:
    size = 8.0 if narrow else 8.5
    return {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": size,
        "axes.titlesize": size + 0.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": size,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "axes.facecolor": "none",
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "lines.linewidth": 1.6,
        "lines.markersize": 5.0,
        "legend.frameon": False,
        "legend.fontsize": size - 0.5,
    }


def _legend(figure: Figure, narrow: bool, handles: dict[str, Any]) -> None:
    """Below the plot, each system once."""
    columns = 2 if narrow else min(4, len(handles))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=columns,
        handlelength=2.6,
        columnspacing=1.2,
    )


def _marks(row_system: str, **more: Any) -> dict[str, Any]:
    style = look(row_system)
    return {
        "color": style.color,
        "marker": style.mark,
        "linestyle": style.line,
        "markeredgecolor": PAPER,
        "markeredgewidth": 0.7,
        **more,
    }


def bars(rows: Sequence[Row], name: str) -> Plot:
    """A bar a system, with the least and the most of the rounds, and how near the limit it is."""
    unit = rows[0].unit

    def draw(figure: Figure, narrow: bool) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        places = range(len(rows))[::-1]
        for place, row in zip(places, rows, strict=True):
            axes.barh(place, row.median, height=0.66, color=look(row.system).color)
            axes.plot(
                [min(row.samples), max(row.samples)],
                [place] * 2,
                color=INK,
                linewidth=1.2,
                marker="|",
                markersize=5,
            )
            text = number(row.median)
            if row.percent_of_limit is not None:
                text += f" · {row.percent_of_limit:.0f} % of limit"
            axes.annotate(
                text,
                (max(row.samples), place),
                textcoords="offset points",
                xytext=(5, 0),
                va="center",
            )
        axes.set_yticks(list(places), [row.system for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"{unit}; lines: least to most of the rounds")
        axes.set_xlim(0, max(max(row.samples) for row in rows) * (1.8 if narrow else 1.4))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 6))

    height = 0.8 + 0.3 * len(rows)
    return Plot(name, draw, (height, height))


def roofline(results: Results, model: str, name: str) -> Plot | None:
    """Operations a second over operations a byte, beneath the machine's limits."""
    rows = [
        row
        for row in results.of(model, "decode", "prefill", "batch", "requests")
        if row.operations and row.bytes and row.operations_per_second
    ]
    limits = {
        s.system: s.limits
        for s in results.systems
        if s.model == model and s.limits.get("flops") and s.limits.get("bandwidth")
    }
    if not rows or not limits:
        return None
    measures = {"decode": "o", "prefill": "^", "batch": "s", "requests": "P"}

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.subplots()
        across = [row.operations / row.bytes for row in rows if row.operations and row.bytes]
        left, right = min(across) / 2.5, max(across) * 3
        flat: dict[str, tuple[float, float]] = {}
        for system, limit in limits.items():
            kind = str(limit.get("arithmetic", "")) or system
            if limit["flops"] > flat.get(kind, (0.0, 0.0))[1]:
                flat[kind] = (limit["bandwidth"], limit["flops"])
        for kind, (bandwidth, flops) in flat.items():
            knee = flops / bandwidth
            axes.plot(
                [left, knee, max(right, 1.5 * knee)],
                [left * bandwidth, flops, flops],
                color=MUTED,
                linewidth=1.1,
            )
            axes.annotate(
                kind,
                (max(right, 1.5 * knee), flops),
                textcoords="offset points",
                xytext=(0, 3),
                ha="right",
                color=MUTED,
                fontsize=6.5 if narrow else 7.5,
            )
        handles: dict[str, Any] = {}
        for row in rows:
            if row.operations and row.bytes and row.operations_per_second:
                (point,) = axes.plot(
                    row.operations / row.bytes,
                    row.operations_per_second,
                    linestyle="none",
                    marker=measures[row.measure],
                    color=look(row.system).color,
                    markersize=7,
                    markeredgecolor=PAPER,
                    markeredgewidth=0.8,
                )
                engine = row.system.split()[0]
                handles.setdefault(f"{engine}, {row.measure}", point)
        axes.set(
            xscale="log",
            yscale="log",
            ylabel="operations a second",
            xlabel="operations for each byte read, at least",
        )
        axes.yaxis.set_major_formatter(_si)
        _plain_log(axes.xaxis)
        _legend(figure, narrow, handles)

    return Plot(name, draw, (4.3, 4.8))


def _si(value: float, _: object = None) -> str:
    """2e12 -> "2 T"."""
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:g} {letter}"
    return f"{value:g}"


def _plain_log(axis: Any) -> None:
    """1, 10, 100 and not powers; 2 and 5 where there are few of them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    if high < 30 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_minor_formatter(NullFormatter())


def lines(
    series: dict[str, list[tuple[float, float]]], name: str, across: str, up: str, log: bool = True
) -> Plot:
    """A line a system."""

    def draw(figure: Figure, narrow: bool) -> None:
        axes, handles = figure.subplots(), {}
        for system, points in series.items():
            xs, ys = zip(*sorted(points), strict=True)
            base = system.split(" · ")[0]
            own = {"alpha": 0.55} if system != base else {}
            (handles[system],) = axes.plot(xs, ys, **_marks(base, **own))
        places = sorted({x for points in series.values() for x, _ in points})
        if log:
            axes.set_xscale("log", base=2)
            axes.set_xticks(places, [f"{place:,g}" for place in places])
            axes.minorticks_off()
        axes.set(xlabel=across, ylabel=up)
        axes.set_ylim(0, None)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        _legend(figure, narrow, handles)

    return Plot(name, draw, (3.7, 4.1))


def distributions(
    rows: Sequence[Row], name: str, label: Callable[[Row], str] = lambda row: row.system
) -> Plot:
    """The share of first tokens, and of times between tokens, that took no longer."""

    def draw(figure: Figure, narrow: bool) -> None:
        both = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
        handles: dict[str, Any] = {}
        for axes, (which, title) in zip(
            both, (("first_ms", "First token"), ("between_ms", "Between tokens")), strict=True
        ):
            for row in rows:
                found = getattr(row, which)
                if found is not None:
                    xs, ys = _curve(found)
                    style = look(row.system)
                    (line,) = axes.plot(xs, ys, color=style.color, linestyle=style.line)
                    axes.plot(found.p50, 50, style.mark, color=style.color, markeredgecolor=PAPER)
                    handles.setdefault(label(row), line)
            axes.set(
                title=title,
                xlabel="milliseconds",
                ylabel="% that took no longer",
                xscale="log",
                ylim=(0, 100),
            )
            low, high = axes.get_xlim()
            axes.set_xlim(low / 1.3, high * 1.3)
            _plain_log(axes.xaxis)
        _legend(figure, narrow, handles)

    return Plot(name, draw, (3.7, 6.2))


def _curve(found: Distribution) -> tuple[Sequence[float], Sequence[float]]:
    if found.quantiles:
        return [max(value, 1e-3) for value in found.quantiles], range(101)
    points = [(found.p50, 50), (found.p90, 90), (found.p99, 99)]
    kept = [(x, float(y)) for x, y in points if x]
    return [x for x, _ in kept], [y for _, y in kept]


def load(rows: Sequence[Row], name: str) -> Plot:
    """Latency over the offered load: medians as lines, 99th percentiles dashed and paler."""
    by_rate = all(row.rate for row in rows)

    def draw(figure: Figure, narrow: bool) -> None:
        both = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
        handles: dict[str, Any] = {}
        for axes, (which, title) in zip(
            both, (("first_ms", "First token"), ("between_ms", "Between tokens")), strict=True
        ):
            for system in dict.fromkeys(row.system for row in rows):
                own = [row for row in rows if row.system == system and getattr(row, which)]
                xs = [row.rate if by_rate else row.users for row in own]
                style = look(system)
                for part, width, line in (("p50", 1.7, "solid"), ("p99", 1.1, (0, (4, 2)))):
                    ys = [getattr(getattr(row, which), part) for row in own]
                    (drawn,) = axes.plot(
                        xs,
                        ys,
                        color=style.color,
                        linewidth=width,
                        linestyle=line,
                        marker=style.mark,
                        markeredgecolor=PAPER,
                    )
                    if part == "p50":
                        handles.setdefault(system, drawn)
            places = sorted({(row.rate if by_rate else row.users) or 0 for row in rows})
            axes.set(
                title=title,
                ylabel="milliseconds",
                yscale="log",
                xlabel="requests a second" if by_rate else "users at once",
            )
            axes.set_xscale("log", base=2)
            axes.set_xticks(places, [f"{place:g}" for place in places])
            axes.minorticks_off()
            _plain_log(axes.yaxis)
        _legend(figure, narrow, handles)

    return Plot(name, draw, (3.7, 6.2))


def quality(entries: Sequence[Quality], name: str) -> Plot:
    """KL divergence and perplexity over the bits of a weight."""
    panels: list[tuple[str, str, Callable[[Quality], float | None]]] = [
        ("KL divergence from float32", "nats, mean", lambda q: q.mean_kl),
        (
            "Perplexity beside float32",
            "% more",
            lambda q: None if q.perplexity_ratio is None else 100 * (q.perplexity_ratio - 1),
        ),
    ]

    def draw(figure: Figure, narrow: bool) -> None:
        both = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
        handles: dict[str, Any] = {}
        for axes, (title, up, value) in zip(both, panels, strict=True):
            for each in entries:
                found = value(each)
                if found is not None:
                    style = look(each.system)
                    (point,) = axes.plot(
                        each.bits,
                        found,
                        style.mark,
                        color=style.color,
                        markeredgecolor=PAPER,
                        markersize=7,
                    )
                    handles.setdefault(each.system, point)
            log = "log" if title.startswith("KL") else "linear"
            axes.set(title=title, xlabel="bits of a weight", ylabel=up, yscale=log)
        _legend(figure, narrow, handles)

    return Plot(name, draw, (3.7, 6.2))
