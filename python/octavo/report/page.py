"""One self-contained page: plots as SVG inside it, and tables and the machine beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import count
from pathlib import Path

from octavo.files import writing
from octavo.report import plots, series, table
from octavo.report.plots import Plot
from octavo.report.results import Results, Row
from octavo.report.style import variables
from octavo.report.table import Table


@dataclass(frozen=True)
class Section:
    """A plot with its tables. machine: in a line; plot: None where only tables are there."""

    model: str
    title: str
    text: str
    machine: str
    tables: tuple[Table, ...]
    plot: Plot | None = None


TEXTS = {
    "decode": "Tokens a second of one sequence, decoded one after the other. Every weight is read "
    "once a token, so the memory's bandwidth is the limit.",
    "prefill": "Tokens a second of one prompt, up to the first token of its answer. Arithmetic is "
    "the limit.",
    "requests": "Tokens a second, prompts and answers, of requests that arrive together.",
    "batch": "Tokens a second of the answers by the number of sequences that decode together; the "
    "time includes their short prompts. Weights are read once for all of them.",
    "context": "The most memory that a process took behind a prompt of so many tokens: weights, "
    "cache and work space, mapped files included.",
    "latency": "One request alone: how long it waits for its first token, and between tokens. A "
    "curve tells the share that took no longer; the mark is the median.",
    "load": "Latency against offered load, through HTTP, the same client and requests for all "
    "servers. Lines: medians; dashed: 99th percentiles.",
    "spread": "The same servers under the heaviest load: the share of first tokens, and of times "
    "between tokens, that took no longer.",
    "quality": "What a format of the weights costs: how far the distribution of the next token "
    "moves from float32's, and how much perplexity it adds. Values of different tools are scored "
    "on different windows of the text: compare them with their own float32 only.",
    "roofline": "Every point is a measurement: how many operations it does for each byte that it "
    "has to read, and how many a second it reached. The lines are this machine's limits, measured "
    "in the same run: bandwidth, then arithmetic.",
}


def sections(results: Sequence[Results]) -> list[Section]:
    """Everything there is to show, a model and a file at a time."""
    found = [part for each in results for model in each.models for part in _of_model(each, model)]
    models = dict.fromkeys(q.model for each in results for q in each.quality)
    for model in models:
        entries = [q for each in results for q in each.quality if q.model == model]
        plot = plots.quality(entries, f"quality-{model}") if _has_cost(entries) else None
        shown = (table.quality_table(results, model),)
        title = "Quality against size"
        found.append(Section(model, title, TEXTS["quality"], "", shown, plot))
    return found


def _has_cost(entries: Sequence[object]) -> bool:
    return any(getattr(e, "mean_kl", None) is not None for e in entries)


def _of_model(results: Results, model: str) -> Iterator[Section]:
    machine = machine_of(results)

    def section(name: str, title: str, plot: Plot | None, *tables: Table | None) -> Section:
        kept = tuple(each for each in tables if each is not None)
        return Section(model, title, TEXTS[name], machine, kept, plot)

    def key(name: str) -> str:
        return f"{Path(results.file).stem}-{model}-{name}"

    titles = {"decode": "Decoding", "prefill": "Prompts", "requests": "Requests"}
    for measure, title in titles.items():
        rows = results.of(model, measure)
        if rows:
            chart = plots.bars(_one_size(rows), key(measure))
            speeds = table.speed_table(results, model, measure)
            yield section(measure, title, chart, speeds, table.ratio_table(results, model, measure))
    roof = plots.roofline(results, model, key("roofline"))
    if roof is not None:
        yield section("roofline", "Roofline", roof, _roofline_table(results, model))
    rows = results.of(model, "batch")
    if rows:
        points = series.batch_series(rows)
        chart = plots.lines(points, key("batch"), "sequences at once", rows[0].unit)
        yield section(
            "batch", "Throughput against batch", chart, table.speed_table(results, model, "batch")
        )
    rows = results.of(model, "context")
    if rows:
        points = series.context_series(rows)
        chart = plots.lines(points, key("context"), "tokens of the prompt", "MiB at most")
        yield section(
            "context", "Memory against context", chart, table.context_table(results, model)
        )
    rows = results.of(model, "latency")
    if rows:
        yield section(
            "latency",
            "First token and between tokens",
            plots.distributions(rows, key("latency")),
            table.latency_table(results, model, "latency"),
        )
    rows = results.of(model, "load")
    if rows:
        shown = table.latency_table(results, model, "load")
        yield section("load", "Latency against offered load", plots.load(rows, key("load")), shown)
        most = max(_offered(row) for row in rows)
        heaviest = [row for row in rows if _offered(row) == most]
        title = f"Distributions under load, {table.size_of(heaviest[0])}"
        yield section("spread", title, plots.distributions(heaviest, key("spread")))


def _offered(row: Row) -> float:
    """Requests a second, or users."""
    return row.rate or row.users or 0


def _one_size(rows: Sequence[Row]) -> list[Row]:
    """A row a system: where there are several depths, the first."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(row.system, row)
    return list(found.values())


def _roofline_table(results: Results, model: str) -> Table:
    heads = ("limits of", "memory, GB/s", "arithmetic, Gop/s", "of")
    made = [
        (
            s.system,
            f"{s.limits['bandwidth'] / 1e9:.1f}",
            f"{s.limits['flops'] / 1e9:,.0f}",
            str(s.limits.get("arithmetic", "-")),
        )
        for s in results.systems
        if s.model == model and s.limits.get("flops") and s.limits.get("bandwidth")
    ]
    return Table("The machine's limits, measured", heads, tuple(made))


def machine_of(results: Results) -> str:
    """The machine in a line, for beside a plot."""
    known = dict(table.machine_lines(results))
    parts = [known.get("processor", "a machine that the file does not name")]
    if "threads" in known and "GPU" not in known:
        parts.append(f"{known['threads']} threads")
    parts += [known[name] for name in ("instruction set", "date", "commit") if name in known]
    if float(results.machine.get("load", 0.0)) > 0.5:
        parts.append(f"the machine was busy before: load {results.machine['load']:.1f}")
    return " · ".join(parts)


def lacking(results: Sequence[Results]) -> list[str]:
    """What a whole report would have, and no file holds."""
    wanted = {
        "batch": "throughput against batch size",
        "context": "memory against context length",
        "latency": "first token and between tokens of one request",
        "load": "latency against offered load",
    }
    found = {row.measure for each in results for row in each.rows}
    missing = [text for measure, text in wanted.items() if measure not in found]
    if not any(row.operations for each in results for row in each.rows):
        missing.append("a roofline: no file has operations and bytes of its rows")
    if not any(each.quality for each in results):
        missing.append("quality against size: give files of `octavo eval --json`, too")
    if not any(r.cpu_joules_per_token or r.gpu_joules_per_token for e in results for r in e.rows):
        missing.append("joules: the machine counted none")
    return missing


def render(results: Sequence[Results], title: str) -> str:
    """The page as HTML, with nothing outside it."""
    from jinja2 import Environment

    text = resources.files("octavo.report").joinpath("page.html").read_text(encoding="utf-8")
    shown = sections(results)
    drawings = [_themed(part.plot) if part.plot else None for part in shown]
    systems = [table.system_table(each, model) for each in results for model in each.models]
    energy = [table.energy_table(each, model) for each in results for model in each.models]
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    return page.render(
        title=title,
        results=[(each, table.machine_lines(each), table.gap_table(each)) for each in results],
        sections=list(zip(shown, drawings, strict=True)),
        tables=[each for each in (*systems, *energy) if each is not None],
        lacking=lacking(results),
        variables=variables().values(),
    )


def _themed(plot: Plot) -> dict[str, str]:
    """Both widths of a plot, its colours those of the page."""
    found = {}
    for width, narrow in (("wide", False), ("narrow", True)):
        text = plot.picture("svg", narrow).decode("utf-8")
        text = text[text.index("<svg") :]
        for color, (name, _, _) in variables().items():
            text = text.replace(color, f"var(--{name})")
        found[width] = text
    return found


def _new_file(folder: Path, name: str, suffix: str, written: Sequence[Path]) -> Path:
    """A file in the folder, of a plot's name without what is special in paths, and not yet used."""
    stem = re.sub(r"[^\w.-]+", "_", name)
    numbered = (f"{stem}-{number}" if number > 1 else stem for number in count(1))
    files = (folder / f"{each}.{suffix}" for each in numbered)
    return next(file for file in files if file not in written)


def write_pictures(results: Sequence[Results], folder: Path, suffix: str) -> list[Path]:
    """Every plot as a PNG or an SVG file of its own, on white paper. Raises FileError."""
    with writing(folder, "plots"):
        folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for part in sections(results):
        if part.plot is not None:
            file = _new_file(folder, part.plot.name, suffix, written)
            with writing(file, "a plot"):
                file.write_bytes(part.plot.picture(suffix, paper="white"))
            written.append(file)
    return written
