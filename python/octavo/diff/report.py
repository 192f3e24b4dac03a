"""The terminal report and the JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from octavo.diff import texts
from octavo.diff.result import DiffResult, Finding, TapResult
from octavo.diff.texts import number, tap_fields
from octavo.progress import stdout_console

# Fields of a result that the JSON does not have, or has in another form.
_APART = ("model", "names", "descriptions", "rows", "taps", "judge")


def print_report(
    result: DiffResult,
    *,
    show_all: bool = False,
    page: Path | None = None,
    console: Console | None = None,
) -> None:
    """Print the whole report on standard output (or `console`). page: where --html was written."""
    if console is None:
        console = stdout_console()
    marks = Marks(ascii_only=not (console.encoding or "").lower().startswith("utf"))
    console.print(_header(result))
    console.print(tap_table(result, marks, width=console.width, show_all=show_all))
    console.print(_legend(result))
    for finding in result.findings:
        console.print(_finding(finding, marks))
    console.print(_checks(result, marks))
    if page is not None:
        console.print(Text(f"\nheat map: {page}", style="dim"))


class Marks:
    """The signs of the report, for terminals with and without Unicode."""

    def __init__(self, ascii_only: bool = False) -> None:
        self.states = {
            "good": Text("ok" if ascii_only else "✓", style="green"),
            "bad": Text("X" if ascii_only else "✗", style="bold red"),
            "note": Text("~" if ascii_only else "≈", style="yellow"),
            "plain": Text("-" if ascii_only else "·", style="dim"),
        }
        self.differs = Text("! " if ascii_only else "≠ ", style="yellow")
        self.first = "> " if ascii_only else "▶ "
        self.times = "x" if ascii_only else "×"


def _header(result: DiffResult) -> RenderableType:
    title = Text.assemble(
        ("octavo diff  ", "bold"),
        (result.model, "bold cyan"),
        (f"   {len(result.token_ids)} tokens, {result.dtype}", "dim"),
    )
    compared = Table.grid(padding=(0, 2))
    for name, description in zip(result.names, result.descriptions, strict=True):
        compared.add_row("", Text(name, style="bold"), Text(description))
    return Group(title, compared, Text())


def tap_table(result: DiffResult, marks: Marks, *, width: int, show_all: bool = False) -> Table:
    """All taps in the order of execution; layers that are within tolerance fold to one line.

    width: of the terminal, in columns; narrow ones lose the less telling figures.
    """
    needed = {"max abs": 64, "relative": 0, "cosine": 76, "growth": 88}
    columns = [title for title, least in needed.items() if width >= least]
    checked = result.checked if width >= 52 else []
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("\n  tap", no_wrap=True)
    for title in [
        *(f"\n{title}" for title in columns),
        *(f"own error\n{result.names[index]}" for index in checked),
    ]:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    first = result.first_bad
    for layer in result.layers():
        # Unfolded is the first layer that is over tolerance.
        for taps in [[tap] for tap in layer] if show_all or first in layer else [layer]:
            style = "red" if any(any(tap.broken) for tap in taps) else ""
            table.add_row(*_row(taps, columns, checked, marks, first), style=style)
    return table


def _row(
    taps: list[TapResult],
    columns: list[str],
    checked: list[int],
    marks: Marks,
    first: TapResult | None,
) -> list[Text]:
    folded, is_first = len(taps) > 1, taps == [first]
    name = f"layers.{taps[0].layer}" if folded else taps[0].name
    label = Text((marks.first if is_first else "  ") + name)
    if is_first:
        label.stylize("bold red")
    if folded:
        label.append(f"  {len(taps)} taps", style="dim")
    figures = texts.figures(taps)
    cells = [label, *(Text(figures[name].replace("×", marks.times)) for name in columns)]
    for index in checked:
        broken = any(tap.broken[index] for tap in taps)
        cells.append(Text(texts.own_error(taps, index), style="bold red" if broken else ""))
    return [*cells, _verdict(taps, marks)]


def _verdict(taps: list[TapResult], marks: Marks) -> Text:
    if all(tap.ok for tap in taps):
        return marks.states["good"]
    broken = [tap.part for tap in taps if any(tap.broken)]
    if not broken:
        # Its own op is right (or could not be checked): what went in differs already.
        return Text.assemble(marks.differs, ("differs", "yellow"))
    verdict = marks.states["bad"].copy()
    verdict.append(" op is wrong" if len(taps) == 1 else f" wrong: {', '.join(broken)}")
    return verdict


def _legend(result: DiffResult) -> RenderableType:
    """One dim paragraph: what the columns are, and their tolerances."""
    runs = _span([tap.tolerance for tap in result.taps])
    own = []
    for index in result.checked:
        limits = [tap.own_tolerances[index] for tap in result.taps if tap.own[index] is not None]
        own.append(f"{result.names[index]} {_span(limits)}")
    text = (
        f"Figures of the worst token. relative: |a - b| / |a|, tolerance {runs}. growth: over the "
        "relative error of what went in. own error: the op against its definition on the inputs "
        f"it had, tolerance {', '.join(own) or '-'}."
    )
    return Padding(Text(text, style="dim"), (1, 0, 0, 2))


def _span(limits: list[float]) -> str:
    low, high = number(min(limits)), number(max(limits))
    return low if low == high else f"{low} to {high}"


def _finding(finding: Finding, marks: Marks) -> RenderableType:
    """The paragraph that names an op to look at."""
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column()
    if finding.mistake is not None:
        lines.add_row("it gives", Text(f"{finding.mistake} (agrees to rounding)", style="yellow"))
    for name, text in texts.finding_lines(finding).items():
        lines.add_row(name, Text(text, style="cyan" if name == "look at" else ""))
    first = f"   first at {finding.tap}{texts.more_taps(finding)}"
    title = Text.assemble(marks.states["bad"], " ", (finding.title, "bold red"), (first, "red"))
    return Group(Text(), title, Padding(lines, (0, 0, 0, 2)))


def _checks(result: DiffResult, marks: Marks) -> RenderableType:
    """Logits, greedy tokens, prefill against decode, the judge, and the verdict."""
    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column(no_wrap=True, style="bold")
    lines.add_column()
    for check in texts.checks(result):
        lines.add_row(marks.states[check.state], check.name, check.sentence)
    if result.missing:
        lines.add_row(marks.states["plain"], "not seen", ", ".join(result.missing))
    text, style = ("no difference", "bold green") if result.ok else ("different", "bold red")
    last = result.taps[-1]
    verdict = Text.assemble((text, style), (f"   {result.seconds:.1f} s", "dim"))
    if result.ok and last.own[0] is not None:
        verdict.append("   every op checked on its own inputs", style="dim")
    return Group(Text(), lines, Text(), verdict)


def to_json(result: DiffResult) -> str:
    """The whole result but for the heat map's rows; not-finite numbers become null."""
    first = result.first_bad
    document: dict[str, Any] = {
        "schema": 1,
        "ok": result.ok,
        "first_bad": None if first is None else first.name,
        "model": result.model,
        **dict(zip(("left_name", "right_name"), result.names, strict=True)),
        **dict(zip(("left_description", "right_description"), result.descriptions, strict=True)),
        **_plain({key: value for key, value in vars(result).items() if key not in _APART}),
        "taps": [_tap_json(tap) for tap in result.taps],
        "judge": _plain(result.judge),
    }
    for name in ("logits", "greedy", "decode"):
        part = getattr(result, name)
        if part is not None:
            document[name]["ok"] = part.ok
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)


def _tap_json(tap: TapResult) -> dict[str, Any]:
    fields = {
        **tap_fields(tap),
        "max_abs": tap.max_abs,
        "cosine_gap": tap.cosine_gap,
        "cosine": 1 - tap.cosine_gap,
        "ok": tap.ok,
        "parted": tap.differs,
        **dict(zip(("left_broken", "right_broken"), tap.broken, strict=True)),
    }
    return {key: _plain(value) for key, value in fields.items()}


def _plain(value: Any) -> Any:
    """Dataclasses to dictionaries, tuples to lists, NaN and infinities to None."""
    if hasattr(value, "__dataclass_fields__"):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
