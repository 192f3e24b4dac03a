"""README's and docs' figures are those of the results that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from octavo.report.results import SCHEMA

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import figures

    return figures


def test_all_pages_agree_with_the_results(figures) -> None:
    assert [str(problem) for problem in figures.check_pages()] == []


TABLE = """
<!-- figures: made.json -->
| | decode | prompt of 512 |
|---|---|---|
| octavo int8 | 12.5 (11.0 to 14.1; 80 %) | 1,230 |
| llama.cpp Q8_0 | 6.2 | |

<!-- figures: made.json: 2.0 -->
Decoding is 2.0 times as fast.
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def row(system: str, measure: str, samples: list[float], **more: float) -> dict[str, object]:
        sizes = {"prompt": 512, "tokens": 1, "requests": 1, "unit": "tokens/s", "model": "m"}
        return {**sizes, "system": system, "measure": measure, "samples": samples, **more}

    rows = [
        row("octavo int8", "decode", [11.04, 12.51, 14.06], percent_of_limit=80.4),
        row("octavo int8", "prefill", [1234.0]),
        row("llama.cpp q8_0", "decode", [6.24, 6.15, 6.2]),
    ]
    machine = {"date": "", "processor": "x", "num_threads": 1}
    content = {"schema": SCHEMA, "title": "t", "machine": machine, "rows": rows}
    (tmp_path / "made.json").write_text(json.dumps(content))
    return tmp_path


def test_figures_that_agree(figures, folder: Path) -> None:
    assert figures.check_text(TABLE, "page.md", folder) == []


@pytest.mark.parametrize(
    "right, wrong, message",
    [
        ("12.5 (", "12.6 (", "12.6 (octavo int8, decode) is no figure"),
        ("14.1;", "14.2;", "14.2 (octavo int8"),
        ("80 %", "81 %", "81 (octavo int8"),
        ("1,230", "1,240", "1,240 (octavo int8, prompt of 512)"),
        ("1,230", "12.5", "12.5 (octavo int8, prompt of 512)"),  # of another column
        ("| 6.2 |", "| 12.5 |", "12.5 (llama.cpp Q8_0, decode)"),  # of another row
        ("2.0 times", "2.1 times", "2.0 is listed as a figure"),
        ("made.json: 2.0", "made.json: 2.2", "2.2 is listed as a figure"),
        ("made.json -->\n|", "other.json -->\n|", "there is no benchmarks/results/other.json"),
        ("<!-- figures: made.json -->\n", "", "a table with figures says no source"),
    ],
)
def test_figures_that_do_not(figures, folder: Path, right: str, wrong: str, message: str) -> None:
    assert right in TABLE
    found = figures.check_text(TABLE.replace(right, wrong), "page.md", folder)
    assert len(found) == 1 and message in str(found[0]), found


def test_what_was_not_kept_says_so(figures, folder: Path) -> None:
    table = TABLE.replace("<!-- figures: made.json -->\n", "*(not kept)*\n\n").replace("12.5", "1")
    assert figures.check_text(table, "page.md", folder) == []
