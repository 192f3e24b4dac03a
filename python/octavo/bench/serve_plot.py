"""Plots of a load test as one SVG file, made with nothing but strings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from octavo.bench.serve_run import Measured

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 430, 270, 58, 40, 34
_COLOURS = ("#7a2e2a", "#2f5d8a", "#3d7a4e", "#a8762b", "#6b4a8c", "#3c8487", "#99456b", "#5f5f5f")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.title{font-weight:600}.grid{stroke:#e5e0d6}"
    ".line{fill:none;stroke-width:2}"
)
Points = Sequence[tuple[float, float]]


def plot(measured: Sequence[Measured], summaries: Sequence[dict[str, Any]], title: str) -> str:
    """Distributions of TTFT, ITL and E2E, and throughput over the loads, as the text of an SVG."""
    names = [found.load.name for found in measured]
    good = [[record for record in found.records if record.ok] for found in measured]
    panels = [
        _panel(
            "Time to first token, ms", "requests", [_steps([r.ttft for r in own]) for own in good]
        ),
        _panel(
            "Inter-token latency, ms",
            "tokens",
            [_steps([gap for r in own for gap in r.gaps]) for own in good],
        ),
        _panel("End to end, ms", "requests", [_steps([r.e2e for r in own]) for own in good]),
    ]
    if len(summaries) > 1 and all(summary["rate"] is None for summary in summaries):
        points = [(s["concurrency"], s["answer_tokens_per_second"]) for s in summaries]
        panels.append(_throughput(points))
    columns = 2
    rows = math.ceil(len(panels) / columns)
    width, height = columns * _WIDTH, rows * _HEIGHT + 64
    placed = [
        f'<g transform="translate({i % columns * _WIDTH},{i // columns * _HEIGHT + 56})">{p}</g>'
        for i, p in enumerate(panels)
    ]
    legend = "".join(
        f'<circle cx="{20 + 130 * i}" cy="44" r="5" fill="{_COLOURS[i % len(_COLOURS)]}"/>'
        f'<text x="{30 + 130 * i}" y="48">{escape(name)}</text>'
        for i, name in enumerate(names)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}"><style>{_STYLE}</style>'
        f'<rect width="{width}" height="{height}" fill="#fffdf9"/>'
        f'<text class="title" x="14" y="24">{escape(title)}</text>{legend}{"".join(placed)}</svg>\n'
    )


def _steps(seconds: Sequence[float]) -> Points:
    """A cumulative distribution: (milliseconds, percent), thinned to what an eye can tell apart."""
    ordered = sorted(seconds)
    count = len(ordered)
    stride = max(1, count // 400)
    kept = [(1000 * ordered[i], 100 * (i + 1) / count) for i in range(0, count, stride)]
    return [*kept, (1000 * ordered[-1], 100.0)] if ordered else []


def _panel(title: str, of_what: str, lines: Sequence[Points]) -> str:
    most = max((x for line in lines for x, _ in line), default=1.0)
    drawn = [_line(line, i, (0.0, most), (0.0, 100.0)) for i, line in enumerate(lines)]
    return _frame(f"{title}: % of {of_what}", (0.0, most), (0.0, 100.0)) + "".join(drawn)


def _throughput(points: Points) -> str:
    most_x, most_y = max(x for x, _ in points), max(y for _, y in points)
    frame = _frame("Answer tokens a second, by users", (0.0, most_x), (0.0, most_y))
    return frame + _line(points, 0, (0.0, most_x), (0.0, most_y), dots=True)


def _place(
    x: float, y: float, xs: tuple[float, float], ys: tuple[float, float]
) -> tuple[float, float]:
    across = (x - xs[0]) / ((xs[1] - xs[0]) or 1)
    up = (y - ys[0]) / ((ys[1] - ys[0]) or 1)
    return (
        _LEFT + across * (_WIDTH - _LEFT - 18),
        _HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _TOP),
    )


def _line(
    points: Points,
    index: int,
    xs: tuple[float, float],
    ys: tuple[float, float],
    dots: bool = False,
) -> str:
    colour = _COLOURS[index % len(_COLOURS)]
    placed = [_place(x, y, xs, ys) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in placed)
    line = f'<polyline class="line" stroke="{colour}" points="{path}"/>'
    return line + (f'<g fill="{colour}">{marks}</g>' if dots else "")


def _frame(title: str, xs: tuple[float, float], ys: tuple[float, float]) -> str:
    parts = [f'<text class="title" x="{_LEFT}" y="18">{escape(title)}</text>']
    for tick in _ticks(*ys):
        x, y = _place(xs[0], tick, xs, ys)
        parts.append(f'<line class="grid" x1="{x}" x2="{_WIDTH - 18}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(*xs):
        x, y = _place(tick, ys[0], xs, ys)
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{tick:g}</text>')
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers from low to high."""
    span = (high - low) or 1.0
    step: float = 10.0 ** math.floor(math.log10(span))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if span / s <= 6)
    count = math.floor((high - low) / step + 1e-9)
    return [round(low + i * step, 10) for i in range(count + 1)]
