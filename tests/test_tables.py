"""Tables of figures on consoles of every width: nothing is cut, and little is left out."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from octavo.tables import Figures

HEADINGS = ("test", "tokens/s", "bits of the logits", "gate")
ROWS = [
    ("pp512", "1,234.56 ± 0.78", "0123456789abcdef", "passed"),
    ("tg8", "9.0", "none", "FAILED"),
]
TABLE = Figures(HEADINGS, ROWS, ("test", "gate"), ("bits of the logits",), "A title", "below")


def shown(width: int, table: Figures = TABLE) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("width", range(24, 90))
def test_no_figure_is_cut(width: int) -> None:
    lines = shown(width)
    text = squeezed("\n".join(lines))
    assert max(map(len, lines)) <= width and "…" not in text
    needed = {cell for row in ROWS for cell in row} | {*HEADINGS, "A title", "below"}
    left_out = {"0123456789abcdef", "none", "bits of the logits"} if 36 <= width < 57 else set()
    assert {each for each in needed if squeezed(each) not in text} == left_out
    assert ("│" in text) == (width >= 36)


def test_a_list_has_a_line_for_each_figure() -> None:
    assert shown(35) == [
        *("A title", "test                pp512", "tokens/s            1,234.56 ± 0.78"),
        *("bits of the logits  0123456789abcde", "                    f"),
        *("gate                passed", "", "test                tg8"),
        *("tokens/s            9.0", "bits of the logits  none", "gate                FAILED"),
        *("", "below"),
    ]


def test_words_begin_at_the_left_and_rows_have_styles() -> None:
    row = next(line for line in shown(80) if "tg8" in line)
    assert row.startswith("│ tg8   │             9.0 │")
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    console.print(Figures(HEADINGS, ROWS, styles=(None, "red")))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "\x1b[31m" in text.partition("pp512")[2] and "\x1b[31m" not in text.partition("pp512")[0]
