"""Every decision is noted, and what is told of it afterwards is true."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import FakeDrafter, ManualClock, fake_engine, fake_future, run_to_end
from text_helpers import tiny_model

from octavo.cli import main
from octavo.engine.engine import Engine
from octavo.engine.events import FIELDS, EventLog, EventLogFile, as_dict
from octavo.errors import InvalidArgumentError, QueueFullError
from octavo.sampling_params import SamplingParams
from octavo.search.beam import BeamSearch
from octavo.search.params import BeamSearchParams
from octavo.trace.explain import explain, one_line, spans_of
from octavo.trace.log_file import LogFile, log_of, parse_log, read_log
from octavo.trace.perfetto import perfetto_trace


class StepClock(ManualClock):
    """Each look at it takes a millisecond."""

    def __call__(self) -> float:
        self.now = round(self.now + 0.001, 6)
        return self.now


def ask(engine: Engine, name: str, num_prompt: int, max_tokens: int, **more: Any) -> None:
    prompt = [(7 * i + len(name) * 3 + ord(name[0])) % 90 for i in range(num_prompt)]
    params = SamplingParams(
        temperature=0.0, ignore_eos=True, max_tokens=max_tokens, n=more.pop("n", 1)
    )
    engine.add_request(name, prompt, params, **more)


def kinds(log: LogFile, name: str) -> list[str]:
    return [record["event"] for record in log.of_request(name)]


def busy_log() -> LogFile:
    """A small engine with too much to do: waits, preemptions, a hit, a refusal, a timeout."""
    engine = fake_engine(13, clock=StepClock(), max_num_seqs=3, max_waiting_requests=4)
    ask(engine, "a", 20, 20)
    ask(engine, "bb", 9, 24, priority=1)
    for _ in range(2):
        engine.step()
    ask(engine, "ccc", 17, 8, n=2)
    ask(engine, "late", 5, 20, timeout=0.004)
    ask(engine, "dddd", 6, 9, stream=True)
    ask(engine, "gone", 6, 9)
    with pytest.raises(QueueFullError):
        ask(engine, "refused", 5, 5)
    engine.step()
    engine.abort("gone")
    run_to_end(engine)
    for name in ("x", "hit"):
        prompt = [(5 * i + 1) % 90 for i in range(20)]
        engine.add_request(name, prompt, SamplingParams(temperature=0.0, max_tokens=3))
        run_to_end(engine)
    return log_of(engine.events)


@pytest.fixture(scope="module")
def log() -> LogFile:
    return busy_log()


def test_every_decision_is_noted(log: LogFile) -> None:
    # Drafts: tests/tools/test_speculation_use.py. Searches: tests/tools/test_replay.py.
    assert {record["event"] for record in log.records} == FIELDS.keys() - {"drafts", "forked"}
    assert kinds(log, "refused") == ["refused"]
    assert kinds(log, "gone")[-1] == "finished" and "admitted" not in kinds(log, "gone")
    assert [r["reason"] for r in log.of_request("late") if r["event"] == "finished"] == ["timeout"]
    assert log.header["num_blocks"] == 13 and log.header["num_dropped"] == 0
    for name in log.request_ids:
        records = log.of_request(name)
        num_answers = records[0].get("n", 0)
        assert kinds(log, name).count("finished") == num_answers
        for sample in range(num_answers):
            own = [r for r in records if r.get("sample") == sample]
            admitted = sum(r["event"] == "admitted" for r in own)
            preempted = sum(r["event"] == "preempted" for r in own)
            assert preempted <= admitted <= preempted + 1


def test_an_undisturbed_request_reads_as_it_was() -> None:
    engine = fake_engine(clock=StepClock())
    ask(engine, "a", 14, 3)
    run_to_end(engine)
    log = log_of(engine.events)
    assert kinds(log, "a") == [
        *("arrived", "admitted", "chunk", "chunk", "first_token", "finished"),
    ]
    chunks = [r for r in log.of_request("a") if r["event"] == "chunk"]
    assert [(r["start"], r["num_tokens"]) for r in chunks] == [(0, 11), (11, 3)]
    assert [(step.num_decodes, step.num_tokens, step.num_attended) for step in log.steps] == [
        (0, 11, 66),
        (0, 3, 39),
        (1, 1, 15),
        (1, 1, 16),
    ]
    # The steps of a span end within it, the last one at its very end.
    assert any(line.startswith("It decoded 2 tokens in 6") for line in explain(log, "a"))


def test_spans_have_no_gaps_and_fill_a_life(log: LogFile) -> None:
    for name in log.request_ids:
        records = log.of_request(name)
        arrived = records[0]
        for sample in range(arrived.get("n", 0)):
            spans = spans_of(log, name, sample)
            end = next(
                r["time"] for r in records if r["event"] == "finished" and r["sample"] == sample
            )
            assert spans[0].start == arrived["time"] and spans[-1].end == end
            for before, after in itertools.pairwise(spans):
                assert before.end == after.start
            assert all(span.end >= span.start for span in spans)


def test_sentences(log: LogFile) -> None:
    texts = {name: "\n".join(explain(log, name)) for name in log.request_ids}
    assert "queue was full, with 4 requests and " in texts["refused"]
    assert "(timeout) with 0 tokens" in texts["late"]
    assert "a timeout of 4.0 ms" in texts["late"]
    assert "priority 1" in texts["bb"]
    assert "Of 20 tokens the cache held 19; the rest was computed in 1 step" in texts["hit"]
    assert "Answer 2 of 2:" in texts["ccc"]
    preempted = [name for name in log.request_ids if "preempted" in kinds(log, name)]
    assert preempted
    for name in preempted:
        assert "needed a block of the KV cache and none was free" in texts[name]
    assert any("all places in a step (max_num_seqs) were taken" in text for text in texts.values())
    for name in log.request_ids:
        assert "\n" not in one_line(log, name)
    assert one_line(log, "refused") == "refused: refused"


def test_the_parts_of_a_wait_add_up(log: LogFile) -> None:
    """Waits of the first in the queue do not overlap, and each has an end."""
    for before, after in zip(log.waits, log.waits[1:], strict=False):
        assert before.start <= before.end <= after.start


def test_whom_a_request_stood_behind() -> None:
    """Up to four are named; of more, the first four and that there are others."""
    engine = fake_engine(clock=StepClock(), max_num_seqs=1)
    for name in "abcdefg":
        ask(engine, name, 5, 2)
    run_to_end(engine)
    log = log_of(engine.events)
    assert any(line.endswith("stood behind request b.") for line in explain(log, "c"))
    assert any(line.endswith("behind 4 others: b, c, d, e.") for line in explain(log, "f"))
    assert any(line.endswith("behind 5 others: b, c, d, e, ….") for line in explain(log, "g"))


def test_an_answer_waits_for_the_prompt_of_its_sibling() -> None:
    engine = fake_engine(clock=StepClock())
    ask(engine, "two", 14, 3, n=2)
    run_to_end(engine)
    lines = list(explain(log_of(engine.events), "two"))
    second = lines[lines.index("Answer 2 of 2:") :]
    assert "because what it begins with was just being computed" in second[1]
    assert "Of 14 tokens the cache held 13" in second[2]


def test_steps_with_drafts_are_not_called_tokens() -> None:
    drafter = FakeDrafter(fake_future, 4)
    engine = fake_engine(60, clock=StepClock(), drafter=drafter, max_num_seqs=8)
    ask(engine, "fast", 5, 40)
    run_to_end(engine)
    log = log_of(engine.events)
    num_steps = len(log.steps) - 1  # the first one computes the prompt
    (line,) = (each for each in explain(log, "fast") if each.startswith("It decoded"))
    assert num_steps < 39 and line.startswith(f"It decoded for {num_steps} steps, ")
    assert f"; {len(log.drafted_steps)} of them checked drafts" in line


def test_beams_are_told_together() -> None:
    engine = fake_engine(60, clock=StepClock(), max_num_seqs=8)
    params = BeamSearchParams(beam_width=3, max_tokens=6)
    search = BeamSearch(params, (), params.max_tokens)
    engine.add_request("beams", [4, 9, 2], params.sampling_params(), search=search)
    run_to_end(engine)
    lines = list(explain(log_of(engine.events), "beams"))
    first, second = lines.index("Answer 1 of 3:"), lines.index("Answer 2 of 3:")
    assert any(line.startswith("It decoded 5 tokens") for line in lines[first:second])
    assert not any("waited" in line or "decoded" in line for line in lines[second:])
    ends = [line for line in lines if line.startswith("It ended")]
    assert len(ends) == 3 and not any("waiting 100 %" in line for line in ends)


def test_an_unknown_request_is_named(log: LogFile) -> None:
    with pytest.raises(InvalidArgumentError, match="no request 'nobody'; it has 9, "):
        list(explain(log, "nobody"))


def test_the_ring_forgets_the_oldest_and_says_so() -> None:
    events = EventLog(capacity=5)
    for i in range(12):
        events.record((float(i), "first_token", (f"r{i}", 0)))
    assert len(events) == 5 and events.num_recorded == 12
    assert [event[0] for event in events.since(9)] == [9.0, 10.0, 11.0]
    assert [event[0] for event in events.since(0)] == [7.0, 8.0, 9.0, 10.0, 11.0]
    assert events.since(12) == []
    log = log_of(events)
    assert log.header["num_dropped"] == 7 and len(log.records) == 5
    assert list(explain(log, "r11")) == ["Its arrival has fallen out of the log's ring."]


def test_a_file_written_bit_by_bit_holds_everything(tmp_path: Path) -> None:
    """Though the ring is too small for the whole run; blocks keep their numbers."""
    engine = fake_engine(clock=StepClock(), event_log_capacity=30)
    with EventLogFile(engine.events, tmp_path / "log.jsonl") as file:
        for i in range(12):
            ask(engine, f"a{i}", 9, 4)
            run_to_end(engine)
            file.flush()
    whole = fake_engine(clock=StepClock())
    for i in range(12):
        ask(whole, f"a{i}", 9, 4)
        run_to_end(whole)
    whole.events.write(tmp_path / "whole.jsonl")
    assert (tmp_path / "log.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    arrivals = [r for r in read_log(tmp_path / "log.jsonl").records if r["event"] == "arrived"]
    assert arrivals[0]["blocks"] == arrivals[9]["blocks"] == [0, 1]
    assert arrivals[10]["blocks"] == [2, 3]


def test_a_torn_last_line_is_forgiven() -> None:
    engine = fake_engine(clock=StepClock())
    ask(engine, "a", 9, 4)
    run_to_end(engine)
    lines = list(engine.events.as_jsonl())
    torn = parse_log([*lines, lines[-1][:20]], "x")
    assert torn.records == parse_log(lines, "x").records


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "x is empty"),
        (["{}"], "x does not begin as an event log of version 1"),
        (['{"event": "log", "version": 2}'], "does not begin"),
        (["hello", "{}"], "line 1 of x is 'hello'; expected an object in JSON"),
        (['{"event": "log", "version": 1}', "[1]", "{}"], r"line 2 of x is '\[1\]'"),
        (['{"event": "log", "version": 1}', '{"event": "tea", "time": 1}'], "'tea'; expected"),
        (['{"event": "log", "version": 1}', '{"event": "step"}'], "'step'; expected an event"),
        (
            ['{"event": "log", "version": 1}', '{"event": "chunk", "time": 1, "start": 0}'],
            "line 2 of x is a 'chunk' without num_tokens, step",
        ),
    ],
)
def test_what_is_no_log_is_refused(lines: list[str], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        parse_log(lines, "x")


def test_a_trace_has_what_perfetto_needs(log: LogFile) -> None:
    trace = json.loads(json.dumps(perfetto_trace(log)))
    events = trace["traceEvents"]
    steps = [e for e in events if e.get("cat") == "step"]
    assert len(steps) == len(log.steps)
    for event, step in zip(steps, log.steps, strict=True):
        shown = event["args"]["decoding answers"], event["args"]["prompt tokens"]
        assert sum(shown) == step.num_tokens and shown[0] == step.num_decodes
        assert event["name"] == ("{} + {}".format(*shown) if shown[1] else str(shown[0]))
    counters = [e["args"] for e in events if e["name"] == "KV blocks"]
    assert [each["held"] + each["free"] for each in counters] == [13] * len(steps)
    for event in events:
        assert event["ph"] in "XCiM" and isinstance(event["pid"], int)
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0
    # Slices of one track do not overlap: Perfetto would nest or drop them.
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["dur"]))
    for slices in tracks.values():
        slices.sort()
        for (start, duration), (following, _) in itertools.pairwise(slices):
            assert start + duration <= following + 1e-3
    names = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {"steps", "a", "ccc #1", "ccc #2", "hit"} <= names


def test_prompts_are_not_in_the_log() -> None:
    engine = fake_engine(clock=StepClock())
    ask(engine, "a", 9, 4, cache_salt="secret")
    run_to_end(engine)
    text = "\n".join(engine.events.as_jsonl())
    assert "secret" not in text and "prompt_token_ids" not in text
    assert '"blocks": [0, 1]' in text


def test_times_are_told_in_whole_microseconds() -> None:
    told = as_dict((1.23456789, "step", None, 0.0123456789, 1, 2, 3, 4, 5, 6, 7))
    assert (told["time"], told["seconds"], told["num_decodes"]) == (1.234568, 0.012346, 1)


def test_a_log_that_nobody_named_is_found_again(tmp_path, monkeypatch, capsys) -> None:
    """`--event-log auto` writes into octavo's folder, where explain, trace and replay look."""
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for verb in ("explain", "trace", "replay"):
        assert main([verb]) == 2
        assert "no event log is named" in capsys.readouterr().err
    model = str(tiny_model(tmp_path / "model"))
    (tmp_path / "in.txt").write_text("fox\ndog\n")
    words = ["batch", "in.txt", "out.jsonl", "-m", model, "--load-format", "dummy", "-n", "2"]
    assert main([*words, "-q", "--event-log", "auto"]) == 0
    assert capsys.readouterr() == ("", "")  # -q: nothing but errors
    (log,) = (tmp_path / "home" / "logs").iterdir()
    old = log.with_name("old.jsonl")
    old.write_text("{}")
    os.utime(old, (0, 0))  # not the newest
    assert main(["explain"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("came at") == 2 and str(log) in shown.err
    assert main(["trace"]) == 0
    assert json.loads((tmp_path / f"{log.stem}.trace.json").read_text())["traceEvents"]
    assert main(["replay", "--fixed", "1", "--per-token", "1", "--per-attended", "0"]) == 0
