"""Tables of figures on a console of any width: no figure is cut."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_BETWEEN = 3  # columns of the console that a border and its blanks take


@dataclass(frozen=True)
class Figures:
    """A table for a rich console; where it has no room, a list with a line for each figure.

    left: headings of columns of words, which begin at the left. less: headings of columns that are
    left out before there is a list, the least telling first. styles: one for each row; none: plain.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Collection[str] = ()
    less: Sequence[str] = ()
    title: str | None = None
    caption: str | None = None
    styles: Sequence[str | None] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As rich asks for it."""
        shown = list(self.headings)
        for heading in (None, *self.less):
            shown = [each for each in shown if each != heading]
            if 1 + sum(self._width(each) + _BETWEEN for each in shown) <= options.max_width:
                yield self._table(shown)
                return
        yield from self._list()

    def _column(self, heading: str) -> list[str]:
        place = self.headings.index(heading)
        return [row[place] for row in self.rows]

    def _width(self, heading: str) -> int:
        return max(map(cell_len, (heading, *self._column(heading))))

    def _table(self, shown: Sequence[str]) -> Table:
        table = Table(
            title=self.title, caption=self.caption, title_justify="left", caption_justify="left"
        )
        for heading in shown:
            is_left = heading in self.left
            table.add_column(heading, justify="left" if is_left else "right", no_wrap=True)
        rows = list(zip(*map(self._column, shown), strict=True))
        for row, style in zip(rows, self.styles or [None] * len(rows), strict=True):
            table.add_row(*row, style=style)
        return table

    def _list(self) -> RenderResult:
        if self.title:
            yield self.title
        for row, style in zip(self.rows, self.styles or [None] * len(self.rows), strict=True):
            lines = Table.grid(padding=(0, 2, 0, 0))
            lines.add_column(no_wrap=True)
            lines.add_column(overflow="fold")
            for heading, cell in zip(self.headings, row, strict=True):
                lines.add_row(heading, cell, style=style)
            yield lines
            yield ""
        if self.caption:
            yield self.caption
