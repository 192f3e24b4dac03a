"""What a run has found so far, as python/octavo/report/results.schema.json describes it."""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from spec import SystemSpec
from systems import Row, latencies

from octavo.bench.cases import Peak, Work, least_seconds
from octavo.report.results import SCHEMA, SCHEMA_FILE

# A peer's format -> octavo's of as many bits, whose work a row of the peer is held against.
ROOFS = {"f32": "f32", "bf16": "bf16", "q8_0": "int8", "q4_0": "int4"}
ROOFS |= {form: form for form in ("int8", "w8a8", "int4", "int4-nonuniform", "int4-g128")}


class Record:
    """Collects systems, samples and gaps; `content` is the whole file."""

    def __init__(self, title: str, spec: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "title": title,
            "spec": spec,
            "machine": machine,
            "seconds": 0.0,
            "models": [],
            "systems": [],
            "rows": [],
            "quality": [],
            "gaps": [],
        }

    def gap(self, model: str, system: str, what: str, why: object) -> None:
        """Something that was asked for and is not there."""
        text = " ".join(str(why).split())[-400:]
        found = {"model": model, "system": system, "what": what, "why": text}
        if found not in self.content["gaps"]:
            self.content["gaps"].append(found)

    def write(self, file: Path) -> None:
        """Write everything; an interrupted run keeps what it has. Checked where that is possible.

        Raises jsonschema.ValidationError.
        """
        if importlib.util.find_spec("jsonschema") is not None:
            import jsonschema

            jsonschema.validate(self.content, json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part")
        text = json.dumps(self.content, indent=1, allow_nan=False)
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(file)


class Samples:
    """The samples of one row by one system, and what they come to."""

    def __init__(self, model: str, system: SystemSpec, row: Row) -> None:
        self.model, self.system, self.row = model, system, row
        self._found: list[Mapping[str, Any]] = []
        self._joules: list[Mapping[str, float]] = []
        self.memory: Mapping[str, int] = {}

    def __len__(self) -> int:
        return len(self._found)

    def add(self, sample: Mapping[str, Any], joules: Mapping[str, float]) -> float:
        """Another sample, as `System.run` returns it; its speed in tokens a second."""
        self._found.append(sample)
        self._joules.append(joules)
        return self.row.speed(sample)

    def to_json(self, roof: tuple[str, Sequence[tuple[float, float]], Peak] | None) -> Any:
        """A row of the file. roof: whose work it is held against, that of a token, the limits."""
        speeds = [self.row.speed(sample) for sample in self._found]
        found: dict[str, Any] = {
            "model": self.model,
            "system": self.system.name,
            "measure": self.row.name,
            "prompt": self.row.prompt,
            "tokens": self.row.generated,
            "requests": self.row.requests,
            "unit": "tokens/s",
            "samples": speeds,
            **spread(speeds),
        }
        if roof is not None:
            found |= self._roofline(*roof, statistics.median(speeds))
        if self.row.name == "latency":
            firsts, gaps = latencies(self._found)
            found |= {"first_ms": distribution(firsts), "between_ms": distribution(gaps)}
        found |= {f"{place}_bytes": count for place, count in self.memory.items() if count}
        for part in self._joules[0] if self._joules else ():
            each = [joules[part] / self.row.tokens for joules in self._joules]
            found[f"{part}_joules_per_token"] = statistics.median(each)
        return found

    def _roofline(
        self, name: str, works: Sequence[tuple[float, float]], peak: Peak, speed: float
    ) -> dict[str, Any]:
        parts = [least_seconds(Work(*work), peak) for work in works]
        least = sum(seconds for seconds, _ in parts)
        return {
            "percent_of_limit": 100 * least * speed,
            "limit": max(parts)[1],
            "limit_of": name,
            "bytes": sum(work[0] for work in works) * self.row.tokens,
            "operations": sum(work[1] for work in works) * self.row.tokens,
            "operations_per_second": sum(work[1] for work in works) * speed,
        }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def distribution(values: Sequence[float]) -> dict[str, Any]:
    """How many there are, three percentiles, and 101 quantiles, from which a plot is drawn."""
    quantiles = [round(float(value), 4) for value in np.quantile(values, np.linspace(0, 1, 101))]
    percentiles = {f"p{part}": quantiles[part] for part in (50, 90, 99)}
    return {"count": len(values), **percentiles, "quantiles": quantiles}
