"""A written event log, read back: facts about the engine, and its events by request and by step."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.engine.events import FIELDS, LOG_VERSION, EventLog
from octavo.errors import InvalidArgumentError
from octavo.files import read_text

Record = Mapping[str, Any]
"""An event: "time" (seconds), "event" (its kind), "request", "sample", and the kind's fields."""


@dataclass(frozen=True)
class Step:
    """A step that was computed; times in seconds of the log."""

    number: int
    start: float
    end: float
    num_decodes: int
    num_tokens: int
    num_attended: int
    num_running: int
    num_waiting: int
    num_free_blocks: int

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass(frozen=True)
class Wait:
    """From start to end, `head` was the first in the queue and waited for `reason`."""

    start: float
    end: float
    head: str
    reason: str
    num_needed: int
    num_available: int


@dataclass(frozen=True)
class LogFile:
    """An event log. Times count from its first event; header: facts about the engine."""

    header: Mapping[str, Any]
    records: tuple[Record, ...]
    steps: tuple[Step, ...] = ()
    waits: tuple[Wait, ...] = ()
    _by_request: Mapping[str, list[Record]] = field(default_factory=dict)

    @property
    def request_ids(self) -> list[str]:
        """The requests that the log knows, in order of appearance."""
        return list(self._by_request)

    def of_request(self, request_id: str) -> list[Record]:
        """The events of one request; InvalidArgumentError if there are none."""
        if request_id not in self._by_request:
            known = ", ".join(list(self._by_request)[:5])
            dropped = self.header.get("num_dropped", 0)
            lost = f"; {dropped} earlier events fell out of the ring" if dropped else ""
            raise InvalidArgumentError(
                f"the log has no request {request_id!r}; it has {len(self._by_request)}, beginning "
                f"with {known or 'none'}{lost}"
            )
        return self._by_request[request_id]

    def step(self, number: int) -> Step | None:
        """The step of this number; None for one that failed or is not in the log."""
        index = bisect_right(self.steps, number, key=lambda step: step.number) - 1
        return self.steps[index] if index >= 0 and self.steps[index].number == number else None

    def steps_between(self, start: float, end: float) -> tuple[Step, ...]:
        """The steps that ended in the half-open span from start (not included) to end."""
        low = bisect_right(self.steps, start + 1e-6, key=lambda step: step.end)
        high = bisect_right(self.steps, end + 1e-6, key=lambda step: step.end)
        return self.steps[low:high]

    @property
    def drafted_steps(self) -> frozenset[int]:
        """The numbers of the steps that checked drafts."""
        return frozenset(each["step"] for each in self.records if each["event"] == "drafts")


def num_answers(arrived: Record) -> int:
    """How many answers a request has: the beams of a search, or n."""
    found: int = arrived["num_beams"] or arrived["n"]
    return found


def first(records: Iterable[Record], kind: str) -> Record | None:
    """The first event of a kind; None if there is none."""
    return next((record for record in records if record["event"] == kind), None)


def read_log(path: str | Path) -> LogFile:
    """Read a log that `EventLog.write` or `--event-log` wrote.

    Raises FileError for a file that cannot be read, and InvalidArgumentError, naming the line, for
    one that is not an event log.
    """
    text = read_text(path, "an event log, as `octavo batch --event-log FILE` writes")
    return parse_log(text.splitlines(), str(path))


def log_of(events: EventLog) -> LogFile:
    """An engine's log so far, without a file."""
    return parse_log(events.as_jsonl(), "the log")


def parse_log(lines: Iterable[str], name: str) -> LogFile:
    """A log from its lines; name: for error messages."""
    records: list[dict[str, Any]] = []
    header: dict[str, Any] | None = None
    lines = list(lines)
    if len(lines) > 1 and not lines[-1].endswith("}"):
        lines.pop()  # incomplete: the writing process was stopped
    for number, line in enumerate(lines, 1):
        record = _parse_line(line, f"line {number} of {name}")
        if header is None:
            header = _check_header(record, name)
        else:
            kind = record.get("event")
            if kind not in FIELDS or not isinstance(record.get("time"), (int, float)):
                raise InvalidArgumentError(
                    f'line {number} of {name} has "event": {kind!r}; expected an event of octavo '
                    f'with a "time"'
                )
            if kind == "arrived":
                record.setdefault("num_beams", 0)  # logs had none of it at first
            missing = [name for name in FIELDS[kind] if name not in record]
            if missing:
                raise InvalidArgumentError(
                    f"line {number} of {name} is a {kind!r} without {', '.join(missing)}"
                )
            records.append(record)
    if header is None:
        raise InvalidArgumentError(f"{name} is empty; expected an event log")
    return _index(header, records)


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise InvalidArgumentError(f"{where} is {line[:60]!r}; expected an object in JSON")
    return record


def _check_header(record: dict[str, Any], name: str) -> dict[str, Any]:
    if record.get("event") != "log" or record.get("version") != LOG_VERSION:
        raise InvalidArgumentError(
            f"{name} does not begin as an event log of version {LOG_VERSION}: write one with "
            f"`octavo batch --event-log FILE`"
        )
    return record


def _index(header: dict[str, Any], records: list[dict[str, Any]]) -> LogFile:
    # An event is recorded when it is known, a step when it has ended, so the order of times may
    # differ a little. The sort is stable.
    records.sort(key=lambda record: record["time"])
    begin = min((r["time"] - r.get("seconds", 0.0) for r in records), default=0.0)
    by_request: dict[str, list[Record]] = defaultdict(list)
    steps = []
    for record in records:
        record["time"] = round(record["time"] - begin, 6)
        if record["event"] == "step":
            values = [record[name] for name in FIELDS["step"][1:-1]]
            start = round(record["time"] - record["seconds"], 6)
            steps.append(Step(record["step"], start, record["time"], *values))
        elif "request" in record:
            by_request[record["request"]].append(record)
    waits = _waits(records)
    return LogFile(header, tuple(records), tuple(steps), tuple(waits), dict(by_request))


def _waits(records: list[dict[str, Any]]) -> list[Wait]:
    """What the first in the queue waited for, from each `waited` event to the end of the wait."""
    waits: list[Wait] = []
    open_wait: dict[str, Any] | None = None
    for record in records:
        kind = record["event"]
        if open_wait is None:
            open_wait = record if kind == "waited" else None
            continue
        same = record.get("request") == open_wait["request"]
        same = same and record.get("sample") == open_wait.get("sample")
        if kind == "waited" or (same and kind in ("admitted", "finished")):
            waits.append(_wait(open_wait, record["time"]))
            open_wait = record if kind == "waited" else None
    if open_wait is not None:
        waits.append(_wait(open_wait, records[-1]["time"]))
    return waits


def _wait(record: dict[str, Any], end: float) -> Wait:
    needed = (record["num_needed"], record["num_available"])
    return Wait(record["time"], end, record["request"], record["reason"], *needed)
