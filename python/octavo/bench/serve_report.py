"""From the records of a load to percentiles, throughput and goodput."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from octavo.bench.serve_client import Record
from octavo.bench.serve_run import Measured
from octavo.errors import InvalidArgumentError

if TYPE_CHECKING:
    from rich.table import Table

_PERCENTS = (50, 90, 99)


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
    cached = [r.num_cached_tokens for r in good if r.num_cached_tokens is not None]
    result: dict[str, Any] = {
        "load": measured.load.name,
        "concurrency": measured.load.concurrency,
        "rate": measured.load.rate if measured.load.rate != float("inf") else None,
        "requests": len(measured.records),
        "failed": len(measured.records) - len(good),
        "errors": dict(Counter(_reason(r) for r in measured.records if not r.ok)),
        "seconds": round(seconds, 3),
        "prompt_tokens": prompt,
        "cached_prompt_tokens": sum(cached) if cached else None,  # None: the server does not tell
        "answer_tokens": answer,
        "requests_per_second": round(len(good) / seconds, 3),
        "answer_tokens_per_second": round(answer / seconds, 2),
        "total_tokens_per_second": round((prompt + answer) / seconds, 2),
    }
    for name, values in kinds.items():
        milliseconds = 1000 * np.array(values or [0.0])
        result[f"{name}_ms"] = {
            "mean": round(float(milliseconds.mean()), 3),
            **{f"p{q}": round(float(np.percentile(milliseconds, q)), 3) for q in _PERCENTS},
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

    def add(name: str, form: str, key: str, inner: str = "", last: bool = False) -> None:
        found = [summary[key][inner] if inner else summary[key] for summary in summaries]
        table.add_row(name, *(format(value, form) for value in found), end_section=last)

    add("requests", "d", "requests")
    add("failed", "d", "failed")
    shares = [cached_share(summary) for summary in summaries]
    cached = ("not told" if share is None else f"{100 * share:.0f}" for share in shares)
    table.add_row("prompt tokens cached, %", *cached, end_section=True)
    add("answer tokens a second", ",.1f", "answer_tokens_per_second")
    add("all tokens a second", ",.1f", "total_tokens_per_second")
    add("requests a second", ",.2f", "requests_per_second", last=True)
    for kind, name in (("ttft", "first token"), ("itl", "between tokens"), ("e2e", "end to end")):
        for q in _PERCENTS:
            add(f"{name}, ms, p{q}", ",.0f", f"{kind}_ms", f"p{q}", last=q == _PERCENTS[-1])
    if "slo_kept" in summaries[0]:
        table.add_row("within the SLO", *(f"{100 * s['slo_kept']:.0f} %" for s in summaries))
        add("goodput, requests a second", ".2f", "goodput_requests_per_second")
    return table


def cached_share(summary: dict[str, Any]) -> float | None:
    """Which part of the prompts' tokens the server had cached; None where it does not tell."""
    cached = summary["cached_prompt_tokens"]
    return None if cached is None else cached / max(1, summary["prompt_tokens"])


def _reason(record: Record) -> str:
    """Why it failed, short enough to count."""
    if record.status not in (0, 200):
        return f"status {record.status}"
    return "no text came" if record.error is None else record.error[:80]
