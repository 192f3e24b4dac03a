"""One self-contained page: summary, findings, heat map and table. No host is ever asked.

What can be read without a script (summary, findings, table) is written here as HTML; the maps are
drawn by the script in page.html from the figures of every tap at every position, packed into
16 bits each.
"""

from __future__ import annotations

import base64
import json
import math
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from octavo.diff.graph import LAYER_PARTS
from octavo.diff.measure import Float64
from octavo.diff.numbers import cosine, growth, number
from octavo.diff.op_sources import OP_SOURCES
from octavo.diff.report import decode_sentence, greedy_sentence, judge_sentence
from octavo.diff.result import DiffResult, Finding, TapResult
from octavo.files import write_text

LOG_LOW, LOG_HIGH = -12.0, 4.0  # the range of the packed logarithms (base 10)
MISSING, NOT_FINITE = 1, 65535  # codes besides 0 for "equal in every bit"
MAX_BINS = 512  # positions across the map; more are put together, the worst counts


def write_html(path: Path, result: DiffResult) -> None:
    """Write the page, a plain file whole or not at all; a FileError says why it could not be."""
    write_text(path, "the page", render(result))


def render(result: DiffResult) -> str:
    """The whole page."""
    page = resources.files("octavo.diff").joinpath("page.html").read_text(encoding="utf-8")
    slots = {
        "title": escape(f"octavo diff: {result.model}"),
        "head": _head(result),
        "tiles": "".join(_tiles(result)),
        "findings": _findings(result),
        "table": _table(result),
        "foot": f"octavo diff, {result.seconds:.1f} s. This page needs nothing but itself.",
        # "</script>" in a token must not end the block.
        "data": json.dumps(_data(result), ensure_ascii=True, allow_nan=False).replace(
            "<", "\\u003c"
        ),
    }
    for name, content in slots.items():
        head, tail = page.split(f"<!--slot:{name}-->")
        page = head + content + tail
    return page


def pack(values: Float64) -> bytes:
    """Figures to little-endian uint16 codes: 0 for 0, NOT_FINITE, else a logarithm. Any shape."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = (np.log10(values) - LOG_LOW) / (LOG_HIGH - LOG_LOW)
        codes = 2 + np.round(np.clip(scaled, 0, 1) * 65532)
    codes = np.where(values == 0, 0, np.where(np.isfinite(values), codes, NOT_FINITE))
    return codes.astype("<u2").tobytes()


def _head(result: DiffResult) -> str:
    verdict = ("good", "✓ no difference") if result.ok else ("bad", "✗ different")
    tokens = f"{len(result.token_ids)} token{'s' * (len(result.token_ids) != 1)}"
    return f"""<div class="top"><div>
<h1>octavo diff <small>{escape(result.model)}, {tokens}, {result.dtype}</small></h1>
<dl class="sides"><dt>{escape(result.left_name)}</dt><dd>{escape(result.left_description)}</dd>
<dt>{escape(result.right_name)}</dt><dd>{escape(result.right_description)}</dd></dl></div>
<span class="pill {verdict[0]}" role="status">{verdict[1]}</span>
<button type="button" id="theme" class="theme" hidden>light / dark</button></div>"""


def _tiles(result: DiffResult) -> list[str]:
    good = sum(tap.ok for tap in result.taps)
    first = result.first_bad
    text = "all within tolerance" if first is None else f"the first over it is {first.name}"
    tiles = [_tile(first is None, "taps", f"{good} of {len(result.taps)}", text)]
    logits = result.logits
    tiles.append(
        _tile(
            logits.ok,
            "logits",
            number(logits.max_abs),
            f"largest error over {logits.positions} positions (tolerance "
            f"{number(logits.tolerance)}); the same first choice at {logits.same_choice}",
        )
    )
    if (greedy := result.greedy) is not None:
        same = len(greedy.left) if greedy.parted_at is None else greedy.parted_at
        state = "note" if greedy.tie else greedy.ok
        title = f"{same} of {len(greedy.left)} the same"
        tiles.append(_tile(state, "greedy tokens", title, greedy_sentence(result)))
    if (decode := result.decode) is not None:
        title = "bit-identical" if decode.different == 0 else number(decode.max_abs)
        tiles.append(_tile(decode.ok, "prefill and decode", title, decode_sentence(result)))
    if (judge := result.judge) is not None:
        title = f"{number(judge.logits_left)} and {number(judge.logits_right)}"
        tiles.append(_tile("plain", "judged in float64", title, judge_sentence(result)))
    return tiles


def _tile(state: bool | str, name: str, title: str, text: str) -> str:
    kind = state if isinstance(state, str) else ("good" if state else "bad")
    return (
        f'<div class="card tile {kind}"><h3>{escape(name)}</h3><strong>{escape(title)}</strong>'
        f"<p>{escape(text)}</p></div>"
    )


def _findings(result: DiffResult) -> str:
    if not result.findings:
        return ""
    cards = "".join(_finding(finding) for finding in result.findings)
    return (
        '<section aria-labelledby="findings-title"><header><h2 id="findings-title">Look here</h2>'
        f"</header>{cards}</section>"
    )


def _finding(finding: Finding) -> str:
    more = len(finding.taps) - 1
    also = f" and at {more} more" if more else ""
    mistake = (
        ""
        if finding.mistake is None
        else f'<p class="mistake">it gives: {escape(finding.mistake)}</p>'
    )
    return (
        f'<article class="card finding"><h3>{escape(finding.title)}, first at '
        f"<code>{escape(finding.tap)}</code>{also}</h3>{mistake}<dl>"
        f"<dt>measured</dt><dd>{escape(finding.evidence)}</dd>"
        f"<dt>look at</dt><dd><code>{escape(finding.files)}</code></dd>"
        f"<dt>hint</dt><dd>{escape(finding.hint)}</dd></dl></article>"
    )


def _table(result: DiffResult) -> str:
    sides = [
        (index, name)
        for index, name in enumerate((result.left_name, result.right_name))
        if any(_own(tap, index) is not None for tap in result.taps)
    ]
    heads = ["tap", "max abs", "relative", "tolerance", "cosine", "growth"]
    heads += [f"own error, {escape(name)}" for _, name in sides] + [""]
    indices = [index for index, _ in sides]
    bodies = []
    for taps in _by_layer(result):
        body = "".join(_tap_row(tap, indices, result.first_bad) for tap in taps)
        if taps[0].layer is None:
            bodies.append(f"<tbody>{body}</tbody>")
            continue
        unfold = result.first_bad in taps
        summary = _layer_row(taps, indices, unfold)
        bodies.append(f'<tbody class="layer">{summary}{body}</tbody>')
    row = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return f"<table><thead><tr>{row}</tr></thead>{''.join(bodies)}</table>"


def _by_layer(result: DiffResult) -> list[list[TapResult]]:
    groups: dict[object, list[TapResult]] = {}
    for tap in result.taps:
        groups.setdefault(tap.name if tap.layer is None else tap.layer, []).append(tap)
    return list(groups.values())


def _own(tap: TapResult, index: int) -> float | None:
    return (tap.own_left, tap.own_right)[index]


def _tap_row(tap: TapResult, sides: list[int], first: TapResult | None) -> str:
    cells = [
        f"<td>{escape(tap.name)}</td>",
        f"<td>{number(tap.max_abs)}</td>",
        f'<td class="{"hot" if tap.parted else ""}">{number(tap.relative)}</td>',
        f"<td>{number(tap.tolerance)}</td>",
        f"<td>{cosine(tap.cosine_gap)}</td>",
        f"<td>{growth(tap.growth, tap.relative)}</td>",
    ]
    for index in sides:
        hot = "hot" if (tap.left_broken, tap.right_broken)[index] else ""
        cells.append(f'<td class="{hot}">{number(_own(tap, index))}</td>')
    broken = tap.left_broken or tap.right_broken
    verdict = "✓" if tap.ok else "✗ op is wrong" if broken else "≠ differs"
    marks = " ".join(
        name
        for name, true in (
            ("tap", tap.layer is not None),
            ("bad", broken),
            ("after", not (broken or tap.ok)),
            ("first", tap is first),
        )
        if true
    )
    return f'<tr class="{marks}">{"".join(cells)}<td>{verdict}</td></tr>'


def _layer_row(taps: list[TapResult], sides: list[int], unfold: bool) -> str:
    bad = sum(not tap.ok for tap in taps)
    growths = [tap.growth for tap in taps if tap.growth is not None]
    cells = [
        f'<td><button type="button" aria-expanded="{"true" if unfold else "false"}">'
        f"layers.{taps[0].layer}</button></td>",
        f"<td>{number(max(tap.max_abs for tap in taps))}</td>",
        f"<td>{number(max(tap.relative for tap in taps))}</td>",
        "<td></td>",
        f"<td>{cosine(max(tap.cosine_gap for tap in taps))}</td>",
        f"<td>{growth(max(growths, default=None), 0.0)}</td>",
    ]
    for index in sides:
        known = [value for tap in taps if (value := _own(tap, index)) is not None]
        cells.append(f"<td>{number(max(known)) if known else '–'}</td>")
    broken = [tap.part for tap in taps if tap.left_broken or tap.right_broken]
    verdict = f"✗ {', '.join(broken)}" if broken else f"≠ {bad} of {len(taps)}" if bad else "✓"
    kind = " bad" if broken else " after" if bad else ""
    return f'<tr class="sum{kind}">{"".join(cells)}<td>{escape(verdict)}</td></tr>'


def _data(result: DiffResult) -> dict[str, Any]:
    """What the script draws from."""
    count = len(result.token_ids)
    bins = min(count, MAX_BINS)
    starts = [bin_index * count // bins for bin_index in range(bins)]
    parts = {tap.part for tap in result.taps if tap.layer is not None}
    first = result.first_bad
    any_wrong = any(tap.left_broken or tap.right_broken for tap in result.taps)
    return {
        "tokens": list(result.token_texts) or [f"#{token}" for token in result.token_ids],
        "token_ids": list(result.token_ids),
        "bin_starts": starts,
        "log_low": LOG_LOW,
        "log_high": LOG_HIGH,
        "parts": [part for part in LAYER_PARTS if part in parts],
        "first_bad": None if first is None else first.name,
        "taps": [_tap_data(tap, any_wrong) for tap in result.taps],
        "metrics": _metrics(result, starts),
    }


def _tap_data(tap: TapResult, any_wrong: bool) -> dict[str, Any]:
    """any_wrong: some op is wrong by itself; then only such are marked, else all that differ."""

    def plain(value: float | None) -> float | None:
        # JSON has no infinity; 1e999 is read as one by JavaScript, but is not valid everywhere.
        return value if value is None or math.isfinite(value) else 1e308

    return {
        "name": tap.name,
        "layer": tap.layer,
        "part": tap.part,
        "op": OP_SOURCES[tap.part].name,
        "position": tap.position,
        "relative": plain(tap.relative),
        "own_left": plain(tap.own_left),
        "own_right": plain(tap.own_right),
        "growth": plain(tap.growth),
        "tolerance": tap.tolerance,
        "own_tolerance_left": tap.own_tolerance_left,
        "own_tolerance_right": tap.own_tolerance_right,
        "marked": tap.left_broken or tap.right_broken or not (any_wrong or tap.ok),
    }


def _metrics(result: DiffResult, starts: list[int]) -> list[dict[str, str]]:
    """The figures that the map can show, packed: for each tap, for each bin, the worst."""
    rows = [result.rows[tap.name] for tap in result.taps]
    figures: list[tuple[str, str, str, list[Float64 | None]]] = [
        ("relative", "relative error", "tolerance", [row.errors.relative for row in rows])
    ]
    for side, name in (("left", result.left_name), ("right", result.right_name)):
        own: list[Float64 | None] = [getattr(row, f"own_{side}") for row in rows]
        if any(values is not None for values in own):
            figures.append((f"own_{side}", f"own error, {name}", f"own_tolerance_{side}", own))
    missing = np.full(len(starts), MISSING, dtype="<u2").tobytes()
    return [
        {
            "id": key,
            "label": label,
            "tolerance": tolerance,
            "codes": base64.b64encode(
                b"".join(
                    missing if values is None else pack(np.maximum.reduceat(values, starts))
                    for values in columns
                )
            ).decode("ascii"),
        }
        for key, label, tolerance, columns in figures
    ]
