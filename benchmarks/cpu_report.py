"""compare_cpu.py's ratios and tables: arithmetic and text only."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from systems import BITS

Speeds = Mapping[str, Mapping[str, Sequence[float]]]


def ratios_of(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median, least and most of the rounds' ratios, of the rounds that both took part in."""
    found = [one / other for one, other in zip(ours, theirs, strict=False)]
    return {"median": statistics.median(found), "least": min(found), "most": max(found)}


def summarize(
    speeds: Speeds,
    at_the_limit: Mapping[str, Mapping[str, tuple[float, str]]],
    forms: Mapping[str, str],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Row -> system -> median, least and most speed.

    For octavo's also the percentage of the machine's limit, the ratios to every peer, and the
    fastest peer that spends no fewer bits on a weight.
    """
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for row, systems in speeds.items():
        summary[row] = {}
        peers = [name for name in systems if not name.startswith("octavo")]
        for name, values in systems.items():
            median = statistics.median(values)
            found: dict[str, Any] = {"median": median, "least": min(values), "most": max(values)}
            found["rounds"] = len(values)
            if name in at_the_limit.get(row, {}):
                limit, which = at_the_limit[row][name]
                found |= {"percent_of_limit": 100 * median / limit, "limit": which}
            if name not in peers:
                found["ratios"] = {peer: ratios_of(values, systems[peer]) for peer in peers}
                fair = [peer for peer in peers if BITS[forms[peer]] >= BITS[forms[name]]]
                if fair:
                    found["best_peer"] = max(fair, key=lambda p: statistics.median(systems[p]))
            summary[row][name] = found
    return summary


def tables(
    summary: Mapping[str, Mapping[str, Mapping[str, Any]]], titles: Mapping[str, str]
) -> Iterator[str]:
    """Markdown: a table of speeds, and one of ratios, for every row."""
    for row, systems in summary.items():
        yield ""
        yield f"### {titles[row]}"
        yield ""
        yield "| system | median | least to most | rounds | % of the machine's limit |"
        yield "| --- | ---: | ---: | ---: | ---: |"
        for name, found in systems.items():
            percent = "-"
            if "percent_of_limit" in found:
                percent = f"{found['percent_of_limit']:.0f} ({found['limit']})"
            spread = f"{found['least']:.1f} to {found['most']:.1f}"
            yield f"| {name} | {found['median']:.1f} | {spread} | {found['rounds']} | {percent} |"
        peers = [name for name in systems if not name.startswith("octavo")]
        if not peers:
            continue
        yield ""
        yield "| octavo is, times | " + " | ".join(peers) + " | best peer at no fewer bits |"
        yield "| --- |" + " ---: |" * len(peers) + " --- |"
        for name, found in systems.items():
            if "ratios" in found:
                cells = [_cell(found["ratios"][peer]) for peer in peers]
                best = found.get("best_peer")
                last = f"{best}: {_cell(found['ratios'][best])}" if best else "-"
                yield f"| {name} | " + " | ".join(cells) + f" | {last} |"


def _cell(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"
