"""From the records of a load to percentiles, throughput and goodput."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from octavo.bench.serve_client import Record
from octavo.bench.serve_run import Measured
from octavo.errors import InvalidArgumentError

if TYPE_CHECKING:
    from rich.table import Table

_QUANTILES = (50, 90, 99)


@dataclass(frozen=True)
class Slo:
    """Limits of latency (service-level objectives), in seconds; None: no limit.

    ttft: to the first token. itl: mean for each token after it. e2e: to the end.
    """

    ttft: float | None = None
    itl: float | None = None
    e2e: float | None = None

    def holds(self, record: Record) -> bool:
        """Whether a request was answered in time."""
        limits = ((self.ttft, record.ttft), (self.itl, record.mean_gap), (self.e2e, record.e2e))
        return all(limit is None or value <= limit for limit, value in limits)


def parse_slo(text: str) -> Slo:
    """ "ttft:500,itl:50" in milliseconds."""
    found: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(ttft|itl|e2e):(\d+(?:\.\d+)?)\s*", part)
        if match is None:
            raise InvalidArgumentError(
                f"--slo is {text!r}; expected milliseconds as in ttft:500,itl:50,e2e:10000"
            )
        found[match[1]] = float(match[2]) / 1000
    return Slo(**found)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the nearest two, as NumPy has it; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarize(measured: Measured, slo: Slo | None = None) -> dict[str, Any]:
    """All figures of one load; latencies in milliseconds."""
    good = [record for record in measured.records if record.ok]
    seconds = measured.seconds
    kinds = {
        "ttft": [record.ttft for record in good],
        "itl": [gap for record in good for gap in record.gaps],
        "e2e": [record.e2e for record in good],
    }
    prompt = sum(record.num_prompt_tokens for record in good)
    answer = sum(record.num_answer_tokens for record in good)
    result: dict[str, Any] = {
        "load": measured.load.name,
        "concurrency": measured.load.concurrency,
        "rate": measured.load.rate if measured.load.rate != float("inf") else None,
        "requests": len(measured.records),
        "failed": len(measured.records) - len(good),
        "errors": dict(Counter(_reason(r) for r in measured.records if not r.ok)),
        "seconds": round(seconds, 3),
        "prompt_tokens": prompt,
        "answer_tokens": answer,
        "requests_per_second": round(len(good) / seconds, 3),
        "answer_tokens_per_second": round(answer / seconds, 2),
        "total_tokens_per_second": round((prompt + answer) / seconds, 2),
    }
    for name, values in kinds.items():
        result[f"{name}_ms"] = {
            "mean": round(1000 * sum(values) / len(values), 3) if values else 0.0,
            **{f"p{q}": round(1000 * percentile(values, q), 3) for q in _QUANTILES},
        }
    if slo is not None:
        kept = sum(slo.holds(record) for record in good)
        result["slo_ms"] = {k: v * 1000 for k, v in asdict(slo).items() if v is not None}
        result["goodput_requests_per_second"] = round(kept / seconds, 3)
        result["slo_kept"] = round(kept / max(1, len(measured.records)), 4)
    return result


def make_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """A column for each load."""
    from rich.table import Table

    table = Table()
    table.add_column("")
    for summary in summaries:
        table.add_column(summary["load"], justify="right")

    def add(name: str, make: Callable[[dict[str, Any]], str], last: bool = False) -> None:
        table.add_row(name, *(make(summary) for summary in summaries), end_section=last)

    add("requests", lambda s: str(s["requests"]))
    add("failed", lambda s: str(s["failed"]), last=True)
    add("answer tokens a second", lambda s: f"{s['answer_tokens_per_second']:,.1f}")
    add("all tokens a second", lambda s: f"{s['total_tokens_per_second']:,.1f}")
    add("requests a second", lambda s: f"{s['requests_per_second']:,.2f}", last=True)
    for kind, name in (("ttft", "first token"), ("itl", "between tokens"), ("e2e", "end to end")):
        for q in _QUANTILES:

            def cell(s: dict[str, Any], kind: str = kind, q: int = q) -> str:
                return f"{s[f'{kind}_ms'][f'p{q}']:,.0f}"

            add(f"{name}, ms, p{q}", cell, last=q == _QUANTILES[-1])
    if any("slo_kept" in summary for summary in summaries):
        add("within the SLO", lambda s: f"{100 * s['slo_kept']:.0f} %")
        add("goodput, requests a second", lambda s: f"{s['goodput_requests_per_second']:.2f}")
    return table


def _reason(record: Record) -> str:
    """Why it failed, short enough to count."""
    if record.status not in (0, 200):
        return f"status {record.status}"
    return "no text came" if record.error is None else record.error[:80]
