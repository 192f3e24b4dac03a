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

from octavo.diff.numbers import cosine, growth, number
from octavo.diff.result import DiffResult, Finding, TapResult

UNSEEN_WIDTH = 110  # columns when the output is no terminal


def print_report(
    result: DiffResult,
    *,
    show_all: bool = False,
    page: Path | None = None,
    console: Console | None = None,
) -> None:
    """Print the whole report on standard output (or `console`). page: where --html was written."""
    if console is None:
        console = Console(highlight=False, emoji=False, markup=False)
        if not console.is_terminal:
            console = Console(highlight=False, emoji=False, markup=False, width=UNSEEN_WIDTH)
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
        self.good = Text("ok" if ascii_only else "✓", style="green")
        self.bad = Text("X" if ascii_only else "✗", style="bold red")
        self.note = Text("~" if ascii_only else "≈", style="yellow")
        self.parted = Text("! " if ascii_only else "≠ ", style="yellow")
        self.first = "> " if ascii_only else "▶ "
        self._ascii_only = ascii_only

    def plain(self, text: str) -> str:
        return text.replace("×", "x") if self._ascii_only else text

    def of(self, ok: bool) -> Text:
        return self.good if ok else self.bad


def _header(result: DiffResult) -> RenderableType:
    title = Text.assemble(
        ("octavo diff  ", "bold"),
        (result.model, "bold cyan"),
        (f"   {len(result.token_ids)} tokens, {result.dtype}", "dim"),
    )
    sides = Table.grid(padding=(0, 2))
    sides.add_row("", Text(result.left_name, style="bold"), Text(result.left_description))
    sides.add_row("", Text(result.right_name, style="bold"), Text(result.right_description))
    return Group(title, sides, Text())


def tap_table(result: DiffResult, marks: Marks, *, width: int, show_all: bool = False) -> Table:
    """All taps in the order of execution; layers that are within tolerance fold to one line.

    width: of the terminal, in columns; narrow ones lose the less telling figures.
    """
    own = [
        (f"own error\n{name}", values)
        for name, values in (
            (result.left_name, [tap.own_left for tap in result.taps]),
            (result.right_name, [tap.own_right for tap in result.taps]),
        )
        if any(value is not None for value in values)
    ]
    columns = ["relative"]
    if width >= 64:
        columns.insert(0, "max abs")
    if width >= 76:
        columns.append("cosine")
    if width >= 88:
        columns.append("growth")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("\n  tap", no_wrap=True)
    for title in columns:
        table.add_column(f"\n{title}", justify="right", no_wrap=True)
    own_index = []
    for title, values in own:
        if width >= 52:
            table.add_column(title, justify="right", no_wrap=True)
            own_index.append(0 if values == [tap.own_left for tap in result.taps] else 1)
    table.add_column("", no_wrap=True)
    first = result.first_bad
    for group in _groups(result, show_all):
        table.add_row(*_row(group, columns, own_index, marks, first), style=_style(group))
    return table


def _groups(result: DiffResult, show_all: bool) -> list[list[TapResult]]:
    """Taps to be shown together in a line: one each, or a whole layer.

    Unfolded are the first layer that is over tolerance and every tap where an op is wrong.
    """
    by_layer: dict[object, list[TapResult]] = {}
    for tap in result.taps:
        by_layer.setdefault(tap.name if tap.layer is None else tap.layer, []).append(tap)
    first = result.first_bad
    groups: list[list[TapResult]] = []
    for taps in by_layer.values():
        unfold = show_all or len(taps) == 1 or (first is not None and first in taps)
        groups += [[tap] for tap in taps] if unfold else [taps]
    return groups


def _row(
    taps: list[TapResult],
    columns: list[str],
    own_index: list[int],
    marks: Marks,
    first: TapResult | None,
) -> list[Text]:
    folded = len(taps) > 1
    worst = max(taps, key=lambda tap: (tap.relative, tap.max_abs))
    figures = {
        "max abs": number(max(tap.max_abs for tap in taps)),
        "relative": number(worst.relative),
        "cosine": cosine(max(tap.cosine_gap for tap in taps)),
        "growth": marks.plain(_largest_growth(taps)),
    }
    is_first = first is not None and taps == [first]
    name = f"layers.{taps[0].layer}" if folded else taps[0].name
    label = Text(marks.first if is_first else "  ", style="bold red")
    label.append(name, style="bold red" if is_first else "")
    if folded:
        label.append(f"  {len(taps)} taps", style="dim")
    cells = [label, *(Text(figures[column]) for column in columns)]
    for index in own_index:
        values = [(tap.own_left, tap.own_right)[index] for tap in taps]
        broken = any((tap.left_broken, tap.right_broken)[index] for tap in taps)
        known = [value for value in values if value is not None]
        shown = number(max(known)) if known else "-"
        cells.append(Text(shown, style="bold red" if broken else ""))
    return [*cells, _verdict(taps, marks)]


def _largest_growth(taps: list[TapResult]) -> str:
    shown = [growth(tap.growth, tap.relative) for tap in taps]
    known = [tap.growth for tap in taps if tap.growth is not None]
    return "new" if "new" in shown else growth(max(known, default=None), 0.0)


def _verdict(taps: list[TapResult], marks: Marks) -> Text:
    if all(tap.ok for tap in taps):
        return marks.good
    broken = [tap.part for tap in taps if tap.left_broken or tap.right_broken]
    if not broken:
        # Its own op is right (or could not be judged): what went in differs already.
        return Text.assemble(marks.parted, ("differs", "yellow"))
    verdict = marks.bad.copy()
    verdict.append(" op is wrong" if len(taps) == 1 else f" wrong: {', '.join(broken)}")
    return verdict


def _style(taps: list[TapResult]) -> str:
    return "red" if any(tap.left_broken or tap.right_broken for tap in taps) else ""


def _legend(result: DiffResult) -> RenderableType:
    """One dim paragraph: what the columns are, and their tolerances."""
    runs = _span([tap.tolerance for tap in result.taps])
    own = [
        f"{name} {_span(limits)}"
        for name, limits in (
            (
                result.left_name,
                [t.own_tolerance_left for t in result.taps if t.own_left is not None],
            ),
            (
                result.right_name,
                [t.own_tolerance_right for t in result.taps if t.own_right is not None],
            ),
        )
        if limits
    ]
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
    more = f" and at {len(finding.taps) - 1} more taps" if len(finding.taps) > 1 else ""
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column()
    if finding.mistake is not None:
        lines.add_row("it gives", Text(f"{finding.mistake} (agrees to rounding)", style="yellow"))
    lines.add_row("measured", finding.evidence)
    lines.add_row("look at", Text(finding.files, style="cyan"))
    lines.add_row("hint", finding.hint)
    title = Text.assemble(
        marks.bad, " ", (finding.title, "bold red"), (f"   first at {finding.tap}{more}", "red")
    )
    return Group(Text(), title, Padding(lines, (0, 0, 0, 2)))


def _checks(result: DiffResult, marks: Marks) -> RenderableType:
    """Logits, greedy tokens, prefill against decode, the judge, and the verdict."""
    lines = Table.grid(padding=(0, 2))
    lines.add_column(no_wrap=True)
    lines.add_column(no_wrap=True, style="bold")
    lines.add_column()
    logits = result.logits
    lines.add_row(
        marks.of(logits.ok),
        "logits",
        f"max abs error {number(logits.max_abs)} over {logits.positions} positions (tolerance "
        f"{number(logits.tolerance)}); same first choice at {logits.same_choice}",
    )
    if result.greedy is not None:
        mark = marks.note if result.greedy.tie else marks.of(result.greedy.ok)
        lines.add_row(mark, "greedy", greedy_sentence(result))
    if result.decode is not None:
        lines.add_row(marks.of(result.decode.ok), "decode", decode_sentence(result))
    if result.judge is not None:
        lines.add_row(Text("·", style="dim"), "judge", judge_sentence(result))
    if result.missing:
        lines.add_row(Text("·", style="dim"), "not seen", ", ".join(result.missing))
    text, style = ("no difference", "bold green") if result.ok else ("different", "bold red")
    last = result.taps[-1]
    verdict = Text.assemble((text, style), (f"   {result.seconds:.1f} s", "dim"))
    if result.ok and last.own_left is not None:
        verdict.append("   every op checked on its own inputs", style="dim")
    return Group(Text(), lines, Text(), verdict)


def greedy_sentence(result: DiffResult) -> str:
    """What greedy decoding showed."""
    greedy = result.greedy
    if greedy is None:
        return ""
    shown = f": {result.greedy_texts[0]!r}" if result.greedy_texts[0] else ""
    if greedy.parted_at is None:
        return f"{len(greedy.left)} tokens, all the same{shown}"
    step = greedy.parted_at
    sentence = (
        f"the same for {step} of {len(greedy.left)} tokens, then {result.left_name} takes "
        f"{greedy.left[step]} (top-2 margin {number(greedy.left_margin)}), {result.right_name} "
        f"{greedy.right[step]} (margin {number(greedy.right_margin)})"
    )
    if greedy.tie:
        sentence += "; margins this small are within bf16's rounding"
    return sentence


def decode_sentence(result: DiffResult) -> str:
    """What prefill against token-by-token decode showed, on the left side."""
    decode = result.decode
    if decode is None:
        return ""
    count = f"{decode.positions} position{'s' * (decode.positions != 1)}"
    who = f"{result.left_name}'s last {count}, one token at a time"
    if decode.different == 0:
        promise = ", as it promises on the CPU" if decode.promised else ""
        return f"{who}: bit-identical to prefill{promise}"
    broken = "; it promises equality in every bit" if decode.promised else ""
    return (
        f"{who}: {decode.different} differ from prefill, by {number(decode.max_abs)} at most"
        f"{broken}"
    )


def judge_sentence(result: DiffResult) -> str:
    """Who rounds more, against the model without rounding."""
    judge = result.judge
    if judge is None:
        return ""
    left, right = max(judge.left.values()), max(judge.right.values())
    return (
        f"against {judge.description}: {result.left_name} is off by {number(left)} at the worst "
        f"tap and {number(judge.logits_left)} in the logits, {result.right_name} by "
        f"{number(right)} and {number(judge.logits_right)}"
    )


def to_json(result: DiffResult) -> str:
    """The whole result but for the heat map's rows; not-finite numbers become null."""
    fields = {
        key: value for key, value in vars(result).items() if key not in ("rows", "taps", "judge")
    }
    first = result.first_bad
    document: dict[str, Any] = {
        "schema": 1,
        "ok": result.ok,
        "first_bad": None if first is None else first.name,
        **{key: _plain(value) for key, value in fields.items()},
        "taps": [
            {
                **_plain(tap),
                "cosine": _plain(1 - tap.cosine_gap),
                "ok": tap.ok,
                "parted": tap.parted,
                "left_broken": tap.left_broken,
                "right_broken": tap.right_broken,
            }
            for tap in result.taps
        ],
        "judge": _plain(result.judge),
    }
    for name in ("logits", "greedy", "decode"):
        part = getattr(result, name)
        if part is not None:
            document[name]["ok"] = part.ok
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """Dataclasses to dictionaries, tuples to lists, NaN and infinities to None."""
    if hasattr(value, "__dataclass_fields__"):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
