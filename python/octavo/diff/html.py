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
from typing import Any

import numpy as np

from octavo.diff import texts
from octavo.diff.measure import Float64
from octavo.diff.result import DiffResult, Finding, TapResult
from octavo.diff.texts import Check, number, tap_fields

LOG_LOW, LOG_HIGH = -12.0, 4.0  # the range of the packed logarithms (base 10)
MISSING, NOT_FINITE = 1, 65535  # codes besides 0 for "equal in every bit"
MAX_BINS = 512  # positions across the map; more are put together, the worst counts


def render(result: DiffResult) -> str:
    """The whole page."""
    page = resources.files("octavo.diff").joinpath("page.html").read_text(encoding="utf-8")
    slots = {
        "title": escape(f"octavo diff: {result.model}"),
        "head": _head(result),
        "tiles": _tiles(result),
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
    compared = "\n".join(
        f"<dt>{escape(name)}</dt><dd>{escape(description)}</dd>"
        for name, description in zip(result.names, result.descriptions, strict=True)
    )
    tokens = f"{len(result.token_ids)} token{'s' * (len(result.token_ids) != 1)}"
    return f"""<div class="top"><div>
<h1>octavo diff <small>{escape(result.model)}, {tokens}, {result.dtype}</small></h1>
<dl class="compared">{compared}</dl></div>
<span class="pill {verdict[0]}" role="status">{verdict[1]}</span>
<button type="button" id="theme" class="theme" hidden>light / dark</button></div>"""


def _tiles(result: DiffResult) -> str:
    good = sum(tap.ok for tap in result.taps)
    first = result.first_bad
    text = "all within tolerance" if first is None else f"the first over it is {first.name}"
    taps = Check("taps", "good" if first is None else "bad", f"{good} of {len(result.taps)}", text)
    titles = {"greedy": "greedy tokens", "decode": "prefill and decode"}
    titles["judge"] = "judged in float64"
    return "".join(
        f'<div class="card tile {check.state}"><h3>{titles.get(check.name, check.name)}</h3>'
        f"<strong>{escape(check.figure)}</strong><p>{escape(check.sentence)}</p></div>"
        for check in [taps, *texts.checks(result)]
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
    mistake = ""
    if finding.mistake is not None:
        mistake = f'<p class="mistake">it gives: {escape(finding.mistake)}</p>'
    lines = {name: escape(text) for name, text in texts.finding_lines(finding).items()}
    lines["look at"] = f"<code>{lines['look at']}</code>"
    rows = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in lines.items())
    return (
        f'<article class="card finding"><h3>{escape(finding.title)}, first at '
        f"<code>{escape(finding.tap)}</code>{texts.more_taps(finding)}</h3>{mistake}"
        f"<dl>{rows}</dl></article>"
    )


def _table(result: DiffResult) -> str:
    heads = ["tap", "max abs", "relative", "tolerance", "cosine", "growth"]
    heads += [f"own error, {escape(result.names[index])}" for index in result.checked] + [""]
    bodies = []
    for taps in result.layers():
        body = "".join(_row([tap], result, is_layer=False) for tap in taps)
        if taps[0].layer is None:
            bodies.append(f"<tbody>{body}</tbody>")
        else:
            row = _row(taps, result, is_layer=True)
            bodies.append(f'<tbody class="layer">{row}{body}</tbody>')
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return f"<table><thead><tr>{head}</tr></thead>{''.join(bodies)}</table>"


def _row(taps: list[TapResult], result: DiffResult, *, is_layer: bool) -> str:
    """A row of the table: of one tap, or of a whole layer, with a button that unfolds it."""
    first, figures = taps[0], texts.figures(taps)
    bad = sum(not tap.ok for tap in taps)
    broken = [tap.part for tap in taps if any(tap.broken)]
    states: dict[str, object] = {"bad": broken, "after": bad and not broken}
    if is_layer:
        unfolded = "true" if result.first_bad in taps else "false"
        name = f'<button type="button" aria-expanded="{unfolded}">layers.{first.layer}</button>'
        wrong, differs = ", ".join(broken), f"{bad} of {len(taps)}"
        states = {"sum": True, **states}
    else:
        name, wrong, differs = escape(first.name), "op is wrong", "differs"
        states = {"tap": first.layer is not None, **states, "first": first is result.first_bad}
    hot = ' class="hot"'
    cells = [
        f"<td>{name}</td>",
        f"<td>{figures['max abs']}</td>",
        f"<td{hot if first.differs and not is_layer else ''}>{figures['relative']}</td>",
        f"<td>{'' if is_layer else number(first.tolerance)}</td>",
        f"<td>{figures['cosine']}</td>",
        f"<td>{figures['growth']}</td>",
    ]
    for index in result.checked:
        mark = hot if first.broken[index] and not is_layer else ""
        cells.append(f"<td{mark}>{texts.own_error(taps, index)}</td>")
    verdict = f"✗ {wrong}" if broken else f"≠ {differs}" if bad else "✓"
    kind = " ".join(state for state, true in states.items() if true)
    return f'<tr class="{kind}">{"".join(cells)}<td>{escape(verdict)}</td></tr>'


def _data(result: DiffResult) -> dict[str, Any]:
    """What the script draws from."""
    count = len(result.token_ids)
    bins = min(count, MAX_BINS)
    starts = [bin_index * count // bins for bin_index in range(bins)]
    first = result.first_bad
    any_wrong = any(any(tap.broken) for tap in result.taps)
    return {
        "tokens": list(result.token_texts) or [f"#{token}" for token in result.token_ids],
        "token_ids": list(result.token_ids),
        "bin_starts": starts,
        "log_low": LOG_LOW,
        "log_high": LOG_HIGH,
        "parts": list(dict.fromkeys(tap.part for tap in result.taps if tap.layer is not None)),
        "first_bad": None if first is None else first.name,
        "taps": [_tap_data(tap, any_wrong) for tap in result.taps],
        "metrics": _metrics(result, starts),
    }


def _tap_data(tap: TapResult, any_wrong: bool) -> dict[str, Any]:
    """any_wrong: some op is wrong by itself; then only such are marked, else all that differ."""

    fields = {**tap_fields(tap), "op": tap.node.op}
    fields["marked"] = any(tap.broken) or not (any_wrong or tap.ok)
    for name, value in fields.items():
        # JSON has no infinity; 1e999 is read as one by JavaScript, but is not valid everywhere.
        if isinstance(value, float) and not math.isfinite(value):
            fields[name] = 1e308
    return fields


def _metrics(result: DiffResult, starts: list[int]) -> list[dict[str, str]]:
    """The figures that the map can show, packed: for each tap, for each bin, the worst."""
    rows = [result.rows[tap.name] for tap in result.taps]
    figures: list[tuple[str, str, str, list[Float64 | None]]] = [
        ("relative", "relative error", "tolerance", [row.errors.relative for row in rows])
    ]
    for index in result.checked:
        place, name = ("left", "right")[index], result.names[index]
        own: list[Float64 | None] = [row.own[index] for row in rows]
        figures.append((f"own_{place}", f"own error, {name}", f"own_tolerance_{place}", own))
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
