"""The outputs of `octavo bench`: a table, Markdown, JSON, CSV."""

from __future__ import annotations

import csv
import io
import json

from octavo.bench.benchmark import BenchResult, Row
from octavo.progress import stdout_console

OUTPUTS = ("table", "md", "json", "csv")
HEADINGS = (
    *("test", "batch", "tok/s", "GB/s", "TFLOP/s"),
    *("% of limit", "limit", "logits", "gate"),
)
CSV_COLUMNS = (
    *("model", "weights", "kv_dtype", "processor", "isa", "num_threads"),
    *("tensor_parallel_size", "num_adapters"),
    *("test", "kind", "num_tokens", "batch", "depth", "tokens_per_second", "deviation"),
    *("bytes_per_second", "flops", "percent_of_limit", "limit", "logits_hash", "gate", "date"),
)
_LEFT = {"test", "limit", "logits", "states", "gate"}
_LESS = ("logits", "states", "TFLOP/s", "GB/s")  # what narrow terminals do without


def headings(result: BenchResult) -> tuple[str, ...]:
    """HEADINGS, with what the gate has compared."""
    return tuple("states" if result.embeds and h == "logits" else h for h in HEADINGS)


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of HEADINGS; "-" where there is no figure."""

    def number(value: float | None, scale: float, digits: int) -> str:
        return "-" if value is None else f"{value / scale:.{digits}f}"

    speed = "-" if row.mean is None else f"{row.mean:.2f} ± {row.deviation:.2f}"
    return (
        row.case.name,
        str(row.case.batch),
        speed,
        number(row.bytes_per_second, 1e9, 2),
        number(row.flops, 1e12, 3),
        number(row.percent_of_limit, 1, 0),
        row.limit or "-",
        row.gate.logits_hash,
        "passed" if row.gate.passed else "FAILED",
    )


def header(result: BenchResult) -> list[str]:
    """What the figures were measured on, in four lines."""
    ranks, computing = result.tensor_parallel_size, f"{result.num_threads} threads"
    if ranks > 1:
        computing = f"{ranks} GPUs" if result.device == "cuda" else f"{computing} of {ranks} ranks"
    lines = [
        f"{result.model}: {result.num_parameters / 1e6:,.1f} M parameters, "
        f"{result.weights} ({result.weight_bytes / 2**20:,.0f} MiB), KV cache {result.kv_dtype}"
        + (", random weights" if result.load_format == "dummy" else "")
        + (f", adapters {', '.join(result.adapters)}" if result.adapters else ""),
        f"{result.processor}: {computing}, {result.isa}, {result.device}; "
        f"{result.native['compiler']}; {result.date}",
    ]
    if result.loading is not None:
        loading = result.loading
        line = f"loaded in {loading.seconds:.2f} s; KV cache {loading.kv_bytes / 2**20:,.0f} MiB"
        if loading.resident_bytes_at_most and loading.resident_bytes_before:
            line += (
                f"; {loading.resident_bytes_at_most / 2**20:,.0f} MiB in memory at most, of them "
                f"{loading.resident_bytes_before / 2**20:,.0f} before"
            ) + (" (rank 0)" if ranks > 1 else "")
        lines.append(line)
    if result.peak is not None:
        lines.append(
            f"limits measured: {result.peak.bandwidth / 1e9:.1f} GB/s read from memory, "
            f"{result.peak.flops / 1e12:.3f} TFLOP/s of {result.peak.arithmetic} ({result.isa})"
        )
    return lines


def to_markdown(result: BenchResult) -> str:
    """The header as a list, then a table in GitHub's Markdown."""
    lines = [f"- {line}" for line in header(result)]
    shown = headings(result)
    lines += ["", "| " + " | ".join(shown) + " |"]
    lines += ["|" + "|".join(" --- " if h in _LEFT else " ---: " for h in shown) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in result.rows]
    return "\n".join(lines)


def to_json(result: BenchResult) -> str:
    """Everything, every sample included."""
    return json.dumps(result.to_json(), indent=2)


def to_csv(result: BenchResult) -> str:
    """A line a row, with plain numbers and what a spreadsheet needs to tell runs apart."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in result.rows:
        own = {"test": row.case.name, "tokens_per_second": row.mean, "deviation": row.deviation}
        gate = "passed" if row.gate.passed else "failed"
        own["num_adapters"] = len(result.adapters)
        values = vars(result) | vars(row.case) | vars(row.gate) | vars(row)
        writer.writerow(values | own | {"gate": gate})
    return stream.getvalue().rstrip("\n")


def print_table(result: BenchResult) -> None:
    """On standard output."""
    from octavo.tables import Figures

    console = stdout_console()
    for line in header(result):
        console.print(line)
    styles = [None if row.gate.passed else "red" for row in result.rows]
    table = Figures(headings(result), [*map(cells, result.rows)], _LEFT, _LESS, styles=styles)
    console.print(table)


def print_result(result: BenchResult, output: str) -> None:
    """In one of OUTPUTS."""
    if output == "table":
        print_table(result)
    else:
        print({"md": to_markdown, "json": to_json, "csv": to_csv}[output](result))
