"""From rows to the points of a line for each system."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence

from octavo.report.results import Row

Series = dict[str, list[tuple[float, float]]]


def batch_series(rows: Sequence[Row]) -> Series:
    """System -> (sequences, tokens a second)."""
    return _series((row.system, float(row.requests), row.median) for row in rows)


def context_series(rows: Sequence[Row]) -> Series:
    """System -> (tokens of the prompt, MiB); what lies on the device as a line of its own."""

    def parts() -> Iterator[tuple[str, float, float]]:
        for row in rows:
            if row.host_bytes:
                yield row.system, float(row.prompt), row.host_bytes / 2**20
            if row.device_bytes:
                yield f"{row.system} · device", float(row.prompt), row.device_bytes / 2**20

    return _series(parts())


def _series(points: Iterable[tuple[str, float, float]]) -> Series:
    """The median where a system has several values at a place."""
    found: dict[str, dict[float, list[float]]] = {}
    for system, x, y in points:
        if math.isfinite(y):
            found.setdefault(system, {}).setdefault(x, []).append(y)
    return {
        system: [(x, statistics.median(ys)) for x, ys in own.items()]
        for system, own in found.items()
    }
