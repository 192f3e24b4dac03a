"""Where a request's time went, and what it waited for, in plain sentences from an event log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from octavo.engine.events import WAITING_REASONS
from octavo.trace.log_file import LogFile, Record, first, num_answers

_NEXT_STEP = "until the next step began"


@dataclass(frozen=True)
class Span:
    """A part of an answer's time, from start to end: "wait", "prefill" or "decode".

    opening: the event at its start.
    """

    kind: str
    start: float
    end: float
    opening: Record

    @property
    def seconds(self) -> float:
        """How long it lasted."""
        return self.end - self.start


def spans_of(log: LogFile, request_id: str, sample: int = 0) -> list[Span]:
    """One answer's whole time without gaps: waiting, computing its prompt, decoding.

    A preempted answer waits and computes again; "prefill" ends when a token is sampled.
    """
    spans: list[Span] = []
    opening: Record | None = None
    kind = "wait"
    filled_until: float | None = None
    for record in log.of_request(request_id):
        if record.get("sample", sample) != sample:
            continue
        time, event = record["time"], record["event"]
        if event == "arrived":
            kind, opening = "wait", record
        elif event == "chunk":
            step = log.step(record["step"])
            total = opening["num_tokens"] if opening and opening["event"] == "admitted" else 0
            if record["start"] + record["num_tokens"] >= total and step is not None:
                filled_until = step.end
        elif opening is not None and event in ("admitted", "preempted", "finished"):
            if kind == "prefill" and filled_until is not None and filled_until <= time:
                spans.append(Span("prefill", opening["time"], filled_until, opening))
                spans.append(Span("decode", filled_until, time, opening))
            else:
                spans.append(Span(kind, opening["time"], time, opening))
            kind = {"admitted": "prefill", "preempted": "wait"}.get(event, "end")
            opening, filled_until = record, None
    return spans


def explain(log: LogFile, request_id: str) -> Iterator[str]:
    """Sentences, one a line, about the request; InvalidArgumentError if it is not in the log."""
    records = log.of_request(request_id)
    arrival = first(records, "arrived")
    if arrival is None:
        refused = first(records, "refused")
        yield _refusal(refused) if refused else "Its arrival has fallen out of the log's ring."
        return
    yield _arrival(request_id, arrival)
    count = num_answers(arrival)
    for sample in range(count):
        is_later_beam = sample > 0 and arrival["num_beams"]  # beams run together from the first on
        spans = spans_of(log, request_id, 0 if is_later_beam else sample)
        if count > 1:
            yield f"Answer {sample + 1} of {count}:"
        for span in () if is_later_beam else spans:
            yield from _sentences(log, request_id, sample, span)
        yield from _ending(log, request_id, sample, arrival, spans)


def _arrival(request_id: str, arrival: Record) -> str:
    parts = [_count(arrival["num_prompt_tokens"], "prompt token")]
    parts.append(f"at most {_count(arrival['max_tokens'], 'new token')}")
    if arrival["num_beams"]:
        parts.append(_count(arrival["num_beams"], "beam"))
    elif arrival["n"] > 1:
        parts.append(_count(arrival["n"], "answer"))
    if arrival["priority"]:
        parts.append(f"priority {arrival['priority']}")
    if arrival["timeout"] is not None:
        parts.append(f"a timeout of {_seconds(arrival['timeout'])}")
    return f"Request {request_id} came at {arrival['time']:.3f} s: {', '.join(parts)}."


def _refusal(record: Record) -> str:
    waiting = _count(record["num_waiting_requests"], "request")
    return (
        f"It was refused at {record['time']:.3f} s: the queue was full, with {waiting} and "
        f"{_count(record['num_waiting_tokens'], 'prompt token')}."
    )


def _sentences(log: LogFile, request_id: str, sample: int, span: Span) -> Iterator[str]:
    if span.kind == "wait":
        if span.opening["event"] == "preempted":
            yield _preemption(span.opening)
        yield from _waiting(log, request_id, span)
    elif span.kind == "prefill":
        yield _prefill(log, request_id, sample, span)
    else:
        yield from _decoding(log, span)


def _preemption(record: Record) -> str:
    why = {
        "kv_blocks": f"request {record['by']} needed a block of the KV cache and none was free",
        "priority": f"request {record['by']} is more urgent",
        "rope": "with more tokens the model has other rope frequencies, so that all keys change",
    }[record["reason"]]
    lost = _count(record["num_computed_tokens"], "computed token")
    return f"At {record['time']:.3f} s it was preempted, with {lost}: {why}."


def _waiting(log: LogFile, request_id: str, span: Span) -> Iterator[str]:
    """How long it waited, for what, and behind which requests."""
    by_reason: dict[str, float] = defaultdict(float)
    behind: dict[str, float] = defaultdict(float)
    shortage = None
    for wait in log.waits:
        overlap = min(wait.end, span.end) - max(wait.start, span.start)
        if overlap <= 0:
            continue
        by_reason[f"because {WAITING_REASONS[wait.reason]}"] += overlap
        if wait.head != request_id:
            behind[wait.head] += overlap
        elif wait.reason == "kv_blocks":
            shortage = wait
    rest = span.seconds - sum(by_reason.values())
    if rest > 1e-5:
        by_reason[_NEXT_STEP] += rest
    reasons = sorted(by_reason.items(), key=lambda item: -item[1])
    if len(reasons) == 1:
        yield f"It waited {_seconds(span.seconds)}, {reasons[0][0]}."
    else:
        parts = "; ".join(f"{_seconds(time)} {reason}" for reason, time in reasons)
        yield f"It waited {_seconds(span.seconds)}: {parts}."
    if shortage is not None:
        yield (
            f"When it came first in the queue it needed {_count(shortage.num_needed, 'block')} "
            f"(less what the cache held of it) and {shortage.num_available} were free."
        )
    if behind:
        names = ", ".join(list(behind)[:4]) + (", …" if len(behind) > 4 else "")
        what = "request" if len(behind) == 1 else f"{len(behind)} others:"
        yield f"For {_seconds(sum(behind.values()))} of that it stood behind {what} {names}."


def _prefill(log: LogFile, request_id: str, sample: int, span: Span) -> str:
    chunks = [
        record
        for record in log.of_request(request_id)
        if record["event"] == "chunk"
        and record["sample"] == sample
        and span.start - 1e-6 <= record["time"] <= span.end
    ]
    steps = [step for chunk in chunks if (step := log.step(chunk["step"])) is not None]
    num_own = sum(chunk["num_tokens"] for chunk in chunks)
    num_others = sum(step.num_tokens for step in steps) - num_own
    total, cached = span.opening["num_tokens"], span.opening["num_cached_tokens"]
    found = f"Of {_count(total, 'token')} the cache held {cached:,}; " if cached else ""
    what = "the rest" if cached else f"Its {_count(total, 'token')}"
    verb = "were" if total > 1 and not cached else "was"
    text = f"{found}{what} {verb} computed in {_count(len(chunks), 'step')}"
    text += f" and {_seconds(span.seconds)}"
    if num_others > 0:
        text += f", which it shared with {_count(num_others, 'token')} of others"
    return text + "."


def _decoding(log: LogFile, span: Span) -> Iterator[str]:
    steps = log.steps_between(span.start, span.end)
    if not steps:
        return
    mean = span.seconds / len(steps)
    num_answers = round(sum(step.num_decodes for step in steps) / len(steps))
    num_drafted = len(log.drafted_steps.intersection(step.number for step in steps))
    decoded = f"{_count(len(steps), 'token')} in" if not num_drafted else f"for {len(steps)} steps,"
    drafts = f"; {num_drafted} of them checked drafts, which may be several tokens a step"
    yield (
        f"It decoded {decoded} {_seconds(span.seconds)}, {_seconds(mean)} each, with "
        f"{_count(num_answers, 'answer')} in a step{drafts if num_drafted else ''}."
    )
    slowest = max(steps, key=lambda step: step.seconds)
    if len(steps) > 3 and slowest.seconds > 2 * mean:
        prompts = slowest.num_tokens - slowest.num_decodes
        why = f", with {_count(prompts, 'token')} of prompts in it" if prompts else ""
        yield f"Its slowest step, at {slowest.start:.3f} s, took {_seconds(slowest.seconds)}{why}."


def _ending(
    log: LogFile, request_id: str, sample: int, arrival: Record, spans: list[Span]
) -> Iterator[str]:
    records = [r for r in log.of_request(request_id) if r.get("sample", sample) == sample]
    finished = first(records, "finished")
    token = first(records, "first_token")
    if token is not None:
        yield f"Its first token came {_seconds(token['time'] - arrival['time'])} after its arrival."
    if finished is None:
        yield "It had not ended when the log was written."
        return
    total = max(finished["time"] - arrival["time"], 1e-9)
    parts = []
    for kind, name in (("wait", "waiting"), ("prefill", "prompt"), ("decode", "decoding")):
        seconds = sum(span.seconds for span in spans if span.kind == kind)
        parts.append(f"{name} {100 * seconds / total:.0f} %")
    yield (
        f"It ended at {finished['time']:.3f} s ({finished['reason']}) with "
        f"{_count(finished['num_output_tokens'], 'token')}, {_seconds(total)} after its arrival: "
        f"{', '.join(parts)}."
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _seconds(seconds: float) -> str:
    """0.0123 -> "12.3 ms", 1.5 -> "1.50 s"."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def one_line(log: LogFile, request_id: str) -> str:
    """A request in one line: what it was, and its three parts of time."""
    records = log.of_request(request_id)
    arrival = first(records, "arrived")
    if arrival is None:
        return f"{request_id}: {records[0]['event']}"
    ends = [r for r in records if r["event"] == "finished"]
    reasons = ", ".join(sorted({r["reason"] for r in ends})) or "not ended"
    num_tokens = sum(r["num_output_tokens"] for r in ends)
    times = dict.fromkeys(("wait", "prefill", "decode"), 0.0)
    for span in spans_of(log, request_id):
        times[span.kind] += span.seconds
    return (
        f"{request_id}: came at {arrival['time']:.3f} s, {arrival['num_prompt_tokens']:,} + "
        f"{num_tokens:,} tokens, waited {_seconds(times['wait'])}, prompt "
        f"{_seconds(times['prefill'])}, decoded {_seconds(times['decode'])}, {reasons}"
    )
