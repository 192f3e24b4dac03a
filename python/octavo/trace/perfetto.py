"""An event log as a trace for https://ui.perfetto.dev or chrome://tracing.

The Trace Event Format (Google, "Trace Event Format"): a list of JSON objects with a phase "ph",
"X" for a slice with a duration, "C" for a counter, "i" for an instant, "M" for names; times "ts"
and durations "dur" in microseconds. Process 1 is the engine, with a track of its steps and counters
below; process 2 has a track for every answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from octavo.trace.explain import Span, spans_of
from octavo.trace.log_file import LogFile, Record, Step, num_answers

_ENGINE, _REQUESTS = 1, 2
_SPAN_NAMES = {"wait": "waiting", "prefill": "prompt", "decode": "decoding"}
TraceEvent = dict[str, Any]


def perfetto_trace(log: LogFile) -> dict[str, Any]:
    """The whole log as one JSON object, to be written to a file."""
    events = [*_engine_events(log), *_request_events(log)]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": dict(log.header)}


def _engine_events(log: LogFile) -> Iterator[TraceEvent]:
    yield _metadata("process_name", _ENGINE, 0, name="engine")
    yield _metadata("thread_name", _ENGINE, 1, name="steps")
    num_blocks = log.header.get("num_blocks", 0)
    drafts = {record["step"]: record for record in log.records if record["event"] == "drafts"}
    for step in log.steps:
        drafted = drafts.get(step.number, {})
        num_drafts = drafted.get("num_draft_tokens", 0)
        num_prompt = step.num_tokens - step.num_decodes - num_drafts
        num_prompt -= drafted.get("num_repeated_tokens", 0)
        name = f"{step.num_decodes} + {num_prompt}" if num_prompt else f"{step.num_decodes}"
        facts = {
            "decoding answers": step.num_decodes,
            "prompt tokens": num_prompt,
            "attended tokens": step.num_attended,
        }
        if num_drafts:
            facts |= {"drafts": num_drafts, "accepted": drafted["num_accepted_tokens"]}
        yield _slice(_ENGINE, 1, name, "step", step, facts)
        yield _counter("answers", step.end, running=step.num_running, waiting=step.num_waiting)
        held = num_blocks - step.num_free_blocks
        yield _counter("KV blocks", step.end, held=held, free=step.num_free_blocks)


def _request_events(log: LogFile) -> Iterator[TraceEvent]:
    yield _metadata("process_name", _REQUESTS, 0, name="requests")
    thread = 0
    for request_id in log.request_ids:
        records = log.of_request(request_id)
        count = next((num_answers(r) for r in records if r["event"] == "arrived"), 1)
        for sample in range(count):
            thread += 1
            label = request_id if count == 1 else f"{request_id} #{sample + 1}"
            yield _metadata("thread_name", _REQUESTS, thread, name=label)
            yield _metadata("thread_sort_index", _REQUESTS, thread, sort_index=thread)
            for span in spans_of(log, request_id, sample):
                name, facts = _SPAN_NAMES[span.kind], _facts(span.opening)
                yield _slice(_REQUESTS, thread, name, "request", span, facts)
            for record in records:
                if record["event"] in ("first_token", "preempted", "refused", "finished") and (
                    record.get("sample", sample) == sample
                ):
                    yield _instant(record, thread)


def _instant(record: Record, thread: int) -> TraceEvent:
    return {
        "ph": "i",
        "s": "t",
        "pid": _REQUESTS,
        "tid": thread,
        "name": record["event"].replace("_", " "),
        "cat": "request",
        "ts": _microseconds(record["time"]),
        "args": _facts(record),
    }


def _facts(record: Record) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in ("time", "event", "blocks")}


def _counter(name: str, time: float, **values: int) -> TraceEvent:
    return {"ph": "C", "pid": _ENGINE, "name": name, "ts": _microseconds(time), "args": values}


def _metadata(kind: str, process: int, thread: int, **values: str | int) -> TraceEvent:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": values}


def _slice(
    process: int, thread: int, name: str, category: str, span: Step | Span, facts: dict[str, Any]
) -> TraceEvent:
    times = {"ts": _microseconds(span.start), "dur": _microseconds(span.seconds)}
    where = {"pid": process, "tid": thread, "name": name, "cat": category}
    return {"ph": "X", **where, **times, "args": facts}


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)
