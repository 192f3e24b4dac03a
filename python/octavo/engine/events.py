"""The event log: every decision about every request, in a ring of bounded size.

An event is a plain tuple (time, kind, key, *values): appending one costs a fraction of a
microsecond, and the values get their names only when the log is read. Decoding is not logged
sequence by sequence; one `step` event covers all of them.

The log holds numbers and ids, no prompts. It tells which blocks of two prompts are equal, so that a
replay has the same shared prefixes.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from octavo.errors import FileError
from octavo.files import writing

Event = tuple[Any, ...]
"""(time in seconds of the engine's clock, kind, key of a sequence or request, *values)."""

LOG_VERSION = 1
_WHAT = "the event log"

FIELDS: dict[str, tuple[str, ...]] = {
    # A request came. blocks: names of its prompt's full blocks (numbers once written to a file).
    # num_beams: of a search, which has n 1; 0: it is none.
    "arrived": (
        "num_prompt_tokens",
        "max_tokens",
        "n",
        "priority",
        "timeout",
        "blocks",
        "num_beams",
    ),
    # A request was refused: the queue was full.
    "refused": ("num_prompt_tokens", "num_waiting_requests", "num_waiting_tokens"),
    # The first in the queue still waits. reason: see WAITING_REASONS; for kv_blocks how many blocks
    # it needs and how many it may have; num_waiting: the length of the queue.
    "waited": ("reason", "num_needed", "num_available", "num_waiting"),
    # A sequence got its blocks; num_cached of its tokens were in the cache (or of another answer).
    "admitted": ("num_tokens", "num_cached_tokens", "num_running", "num_free_blocks"),
    # A search has gone on. parents: for each of its next beams, the one whose tokens it takes over.
    "forked": ("parents",),
    # A part of a prompt is computed in this step, a number.
    "chunk": ("start", "num_tokens", "step"),
    # A sequence lost its blocks to another one; reason: kv_blocks or priority. Or it outgrew the
    # model's rope_switch and is computed anew; reason: rope.
    "preempted": ("reason", "by", "num_computed_tokens"),
    "first_token": (),
    "finished": ("reason", "num_output_tokens"),
    # A step has ended; it began `seconds` before `time`. num_attended: for every token computed
    # the tokens it attends to, summed.
    "step": (
        "seconds",
        "num_decodes",
        "num_tokens",
        "num_attended",
        "num_running",
        "num_waiting",
        "num_free_blocks",
        "step",
    ),
    # The step checked drafts of so many sequences; the first num_accepted_tokens of the drafts of
    # each, added up, were right. Comes right after the step's own event. num_repeated_tokens: what
    # branches of drafts computed that other chains of their sequence did, too.
    "drafts": (
        "num_drafts",
        "num_draft_tokens",
        "num_accepted_tokens",
        "step",
        "num_repeated_tokens",
    ),
}

WAITING_REASONS = {
    "max_num_seqs": "all places in a step (max_num_seqs) were taken",
    "kv_blocks": "too few blocks of the KV cache were free",
    "token_budget": "the step's tokens (max_num_batched_tokens) were used up by others",
    "preemption": "blocks had just been taken from a running sequence",
    "prefix": "what it begins with was just being computed, for another request or answer",
}


class EventLog:
    """The last `capacity` events, and how many there were before them.

    header: facts about the engine, written at the top of the log.
    """

    def __init__(self, capacity: int = 65536, header: dict[str, Any] | None = None) -> None:
        self.header = header or {}
        self.num_recorded = 0
        self._ring: deque[Event] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._ring)

    def __iter__(self) -> Iterator[Event]:
        return iter(self._ring)

    def record(self, event: Event) -> None:
        """Append one event; the oldest falls out of a full ring."""
        self.num_recorded += 1
        self._ring.append(event)

    def since(self, number: int) -> list[Event]:
        """The events from the `number`-th on, counted from 0, as far as the ring still has them."""
        count = min(self.num_recorded - number, len(self._ring))
        # From the newest backwards: a caller that asks often wants few of many.
        return list(itertools.islice(reversed(self._ring), max(0, count)))[::-1]

    def as_jsonl(self) -> Iterator[str]:
        """The header and every event, each as one line of JSON without its line break."""
        numbers: dict[bytes, int] = {}
        yield header_line(self.header, self.num_recorded - len(self._ring))
        for event in tuple(self._ring):
            yield event_line(event, numbers)

    def write(self, path: str | Path) -> None:
        """Write the log as JSON lines; FileError if it cannot be written."""
        with writing(path, _WHAT), Path(path).open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in self.as_jsonl())


class EventLogFile:
    """Writes a log to a file piece by piece, so that a run longer than the ring loses nothing.

    Every method raises a FileError where the file cannot be written.
    """

    def __init__(self, log: EventLog, path: str | Path) -> None:
        self._log = log
        self._path = Path(path)
        self._numbers: dict[bytes, int] = {}
        self._next = max(0, log.num_recorded - len(log))
        with writing(path, _WHAT):
            self._file = self._path.open("w", encoding="utf-8")
        try:
            with writing(path, _WHAT):
                self._file.write(header_line(log.header, self._next) + "\n")
                self._file.flush()  # a full disk is reported at once
        except FileError:
            with suppress(OSError):
                self._file.close()
            raise

    def flush(self) -> None:
        """Write the new events."""
        events = self._log.since(self._next)
        self._next = self._log.num_recorded
        with writing(self._path, _WHAT):
            self._file.writelines(event_line(event, self._numbers) + "\n" for event in events)
            self._file.flush()

    def close(self) -> None:
        """Write the new events and close the file; harmless when it is closed."""
        if not self._file.closed:
            try:
                self.flush()
            finally:
                with writing(self._path, _WHAT):  # closing tries to write once more
                    self._file.close()

    def __enter__(self) -> EventLogFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def header_line(header: dict[str, Any], num_dropped: int) -> str:
    """The first line of a log: format, version, facts about the engine, events lost before it."""
    return json.dumps(
        {"event": "log", "version": LOG_VERSION, **header, "num_dropped": num_dropped}
    )


def event_line(event: Event, numbers: dict[bytes, int]) -> str:
    """One event as JSON. numbers: block name -> number, extended by new names."""
    return json.dumps(as_dict(event, numbers), ensure_ascii=False)


def as_dict(event: Event, numbers: dict[bytes, int] | None = None) -> dict[str, Any]:
    """An event with named values; equal block names become equal small numbers.

    numbers: block name -> number so far, extended by new names; None leaves the blocks out.
    """
    time, kind, key, *values = event
    record: dict[str, Any] = {"time": round(time, 6), "event": kind}
    if key is not None:
        record.update(_name_key(key))
    for name, value in zip(FIELDS[kind], values, strict=True):
        if name == "blocks":
            if numbers is not None:
                record[name] = _number_blocks(value, numbers)
        elif name == "by":
            record[name] = _name_key(value)["request"]
        else:
            record[name] = round(value, 6) if isinstance(value, float) else value
    return record


def _name_key(key: Hashable) -> dict[str, Any]:
    """A sequence's key is (request id, which of its answers); a request's is its id."""
    if isinstance(key, tuple):
        return {"request": key[0], "sample": key[1]}
    return {"request": key}


def _number_blocks(names: Iterable[bytes], numbers: dict[bytes, int]) -> list[int]:
    return [numbers.setdefault(name, len(numbers)) for name in names]
