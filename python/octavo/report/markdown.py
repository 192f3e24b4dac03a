"""The tables of results files in Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from octavo.report.results import Results
from octavo.report.table import Table, gap_table, machine_lines, tables_of


def tables(results: Results) -> Iterator[str]:
    """Every table of one file, line by line, with the machine before and the gaps behind them."""
    yield f"# {results.title}"
    yield ""
    yield from (f"- {name}: {value}" for name, value in machine_lines(results))
    for model in results.models:
        yield ""
        yield f"## {model}"
        for table in tables_of(results, model):
            yield from lines_of(table)
    gaps = gap_table(results)
    if gaps is not None:
        yield from lines_of(gaps)


def lines_of(table: Table) -> Iterator[str]:
    """A heading and a table."""
    yield ""
    yield f"### {table.title}"
    yield ""
    yield "| " + " | ".join(table.headings) + " |"
    right = ["---:" if table.is_number(i) else "---" for i in range(len(table.headings))]
    yield "| " + " | ".join(right) + " |"
    for row in table.rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
