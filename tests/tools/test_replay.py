"""Simulated runs: deterministic, true to the log, and sensitive to the policy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octavo.cli.app import run
from octavo.config import RuntimeOptions
from octavo.errors import InvalidArgumentError
from octavo.trace.log_file import LogFile, Step, log_of, parse_log, read_log
from octavo.trace.replay import Quantiles, arrivals_of, options_of, summarize
from octavo.trace.simulation import Arrival, CostModel, End, Simulation, fit_costs

COSTS = CostModel(fixed=4e-3, per_token=1.5e-4, per_attended=3e-8)


def options(**changes: Any) -> RuntimeOptions:
    values: dict[str, Any] = {
        "block_size": 16,
        "max_model_len": 512,
        "max_num_seqs": 12,
        "max_num_batched_tokens": 96,
        "event_log_capacity": 10**6,
    }
    return RuntimeOptions("f32", "f32", **{**values, **changes})


def traffic(count: int = 60) -> list[Arrival]:
    """Odd lengths, some beginnings in common, n, priorities, timeouts, clients that leave."""
    arrivals = []
    time = 0.0
    for i in range(count):
        time += (i * 37 % 11) * 0.004
        length = 5 + i * i * 7 % 211
        common = [1000, 1001, 1002][: length // 16] if i % 3 == 0 else []
        own = [10 * i + 2000 + k for k in range(length // 16 - len(common))]
        arrivals.append(
            Arrival(
                time,
                f"r{i}",
                length,
                1 + i * 13 % 150,
                n=2 if i % 9 == 4 else 1,
                priority=i % 2 if i % 5 == 0 else 0,
                timeout=0.3 if i % 8 == 7 else None,
                blocks=(*common, *own),
                abort_after=0.05 if i % 10 == 6 else None,
            )
        )
    return arrivals


def simulate(arrivals: list[Arrival], options: RuntimeOptions, num_blocks: int) -> Simulation:
    simulation = Simulation(options, num_blocks, COSTS)
    simulation.run(arrivals)
    return simulation


def simulated(num_blocks: int = 120, **changes: Any) -> LogFile:
    return log_of(simulate(traffic(), options(**changes), num_blocks).engine.events)


@pytest.fixture(scope="module")
def log() -> LogFile:
    return simulated(36)


def test_the_same_run_gives_the_same_log(log: LogFile) -> None:
    assert simulated(36).records == log.records
    assert simulated(37).records != log.records


def test_a_replay_of_a_simulated_log_gives_that_log(log: LogFile) -> None:
    """Costs measured from its steps, arrivals and options read from it: all comes out again."""
    costs = fit_costs(log.steps)
    for name, value in vars(COSTS).items():
        assert getattr(costs, name) == pytest.approx(value, rel=2e-2)
    same_options, num_blocks = options_of(log, {})
    result = simulate(arrivals_of(log), same_options, num_blocks)
    again = summarize(log_of(result.engine.events))
    first = summarize(log)
    assert first.num_preemptions > 0 and first.num_cached_tokens > 0
    assert first.finished.keys() == {"length", "timeout", "abort"}
    assert again.finished == first.finished
    assert again.num_preemptions == first.num_preemptions
    assert again.num_cached_tokens == first.num_cached_tokens
    assert again.num_steps == first.num_steps
    for name in ("waiting", "time_to_first_token", "time_per_token", "total_time"):
        one, other = getattr(first, name), getattr(again, name)
        assert other.mean == pytest.approx(one.mean, rel=1e-3)
        assert other.p99 == pytest.approx(one.p99, rel=1e-3)


def forking_traffic(count: int = 24) -> list[Arrival]:
    """Answers of one prompt that end at different lengths, and searches, among plain requests."""
    arrivals = []
    for i, plain in enumerate(traffic(count)):
        lengths = [1 + (i * 7 + 11 * k) % 40 for k in range(3)]
        ends = tuple(End(length, "stop" if length % 4 else "length") for length in lengths)
        changes: dict[str, Any] = {"timeout": None, "abort_after": None, "priority": 0}
        if i % 3 == 1:
            # An answer that ends by its length has as many tokens as it may have.
            ends = tuple(End(end.num_output_tokens, "stop") for end in ends)
            changes |= {"n": 3, "ends": ends, "num_output_tokens": max(lengths) + 7}
        elif i % 3 == 2:
            forks = [tuple(min(k * (i + step) % 3, step) for k in range(3)) for step in range(25)]
            changes |= {"n": 1, "num_beams": 3, "forks": tuple(forks), "ends": ends}
            changes["num_output_tokens"] = 40
        arrivals.append(replace(plain, **changes))
    return arrivals


@pytest.mark.parametrize("num_blocks", [36, 120])
def test_a_replay_forks_as_the_log_does(num_blocks: int) -> None:
    """Every event comes out again: who was copied, preempted, admitted, and when."""
    first = simulate(forking_traffic(), options(), num_blocks)
    log = log_of(first.engine.events)
    count = summarize(log)
    assert (count.num_preemptions > 0) == (num_blocks == 36)
    assert count.finished["stop"] > 10 and count.num_requests == 24
    arrivals = arrivals_of(log)
    assert [a.forks for a in arrivals] == [a.forks for a in forking_traffic()]
    assert [a.ends for a in arrivals if a.ends] != []
    again = log_of(simulate(arrivals, options(), num_blocks).engine.events)
    assert len(again.records) == len(log.records)
    for one, other in zip(log.records, again.records, strict=True):
        assert other.keys() == one.keys()
        for name, value in one.items():
            close = name in ("time", "seconds")  # arrival times are rounded in the log
            assert other[name] == (pytest.approx(value, abs=1e-4) if close else value)


def test_planted_errors_in_forks_are_seen() -> None:
    right = log_of(simulate(forking_traffic(), options(), 36).engine.events)
    lone = [
        replace(a, forks=tuple((0, 1, 2)[: len(f)] for f in a.forks)) for a in forking_traffic()
    ]
    longest = [replace(a, ends=()) for a in forking_traffic()]
    for planted in (lone, longest):
        wrong = summarize(log_of(simulate(planted, options(), 36).engine.events))
        assert wrong.num_steps != summarize(right).num_steps


def test_an_unfinished_search_goes_on_by_itself() -> None:
    (arrival,) = [replace(a, forks=a.forks[:4], ends=()) for a in forking_traffic()[2:3]]
    simulation = simulate([arrival], options(), 120)
    (output,) = simulation.outputs.values()
    assert len(output.outputs) == 3 and simulation.engine.blocks.num_free_blocks == 120
    kinds = [event[1] for event in simulation.engine.events]
    assert kinds.count("forked") == 39  # it may have 40 tokens


def test_logs_from_before_searches_were_noted_are_read() -> None:
    lines = list(simulate(traffic(9), options(), 120).engine.events.as_jsonl())
    old = [json.dumps({k: v for k, v in json.loads(x).items() if k != "num_beams"}) for x in lines]
    assert arrivals_of(parse_log(old, "old")) == arrivals_of(parse_log(lines, "new"))


def test_every_request_has_an_end(log: LogFile) -> None:
    summary = summarize(log)
    num_answers = sum(arrival.n for arrival in traffic())
    assert summary.num_requests == 60 and sum(summary.finished.values()) == num_answers
    result = simulate(traffic(), options(), 36)
    assert len(result.outputs) == 60 and not result.refused
    result.engine.check_integrity()
    assert result.engine.blocks.num_free_blocks == 36


def test_prompts_that_are_computed_alone_are_replayed_so() -> None:
    """Those that were scored, or embedded: no token is sampled."""
    prompts = [replace(each, num_output_tokens=0, abort_after=None) for each in traffic()]
    first = simulate(prompts, options(), 120)
    log = log_of(first.engine.events)
    assert first.engine.stats().num_sampled_tokens == 0
    assert summarize(log).finished == {"length": sum(each.n for each in prompts)}
    again = simulate(arrivals_of(log), options(), 120)
    assert again.engine.num_steps == first.engine.num_steps
    assert again.engine.stats().num_sampled_tokens == 0


def test_policies_can_be_told_apart(log: LogFile) -> None:
    base = summarize(simulated(400))
    alone = summarize(simulated(400, max_num_seqs=1))
    without = summarize(simulated(400, enable_prefix_caching=False))
    assert base.waiting and alone.waiting and without.waiting
    assert alone.waiting.mean > 5 * base.waiting.mean
    assert base.num_cached_tokens > 0 == without.num_cached_tokens
    assert without.seconds >= base.seconds
    assert base.num_preemptions < summarize(log).num_preemptions
    small = simulate(traffic(), options(max_waiting_requests=2), 36)
    assert small.refused and len(small.outputs) == 60 - len(small.refused)
    assert summarize(log_of(small.engine.events)).num_refused == len(small.refused)


def test_arrivals_twice_as_fast(log: LogFile) -> None:
    slow, fast = arrivals_of(log), arrivals_of(log, speed=2.0)
    assert [a.time for a in fast] == [a.time / 2 for a in slow]
    assert [replace(a, time=0.0) for a in fast] == [replace(a, time=0.0) for a in slow]


@pytest.mark.parametrize(
    "planted",
    [
        CostModel(5e-3, 0.0, 0.0),
        CostModel(0.0, 2e-4, 0.0),
        CostModel(1e-3, 0.0, 7e-8),
        CostModel(2e-2, 3e-6, 1e-9),
    ],
)
def test_costs_are_measured(planted: CostModel) -> None:
    steps = []
    for i in range(50):
        num_tokens, num_attended = 1 + i * 17 % 97, 10 + i * i * 31 % 5003
        seconds = planted.seconds(num_tokens, num_attended)
        steps.append(Step(i, 0.0, seconds, 1, num_tokens, num_attended, 1, 0, 1))
    found = fit_costs(steps)
    for name, value in vars(planted).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6, abs=1e-12)
    with pytest.raises(InvalidArgumentError, match="has 7 steps; expected at least 8"):
        fit_costs(steps[:7])
    assert fit_costs(steps[:8]).seconds(50, 100) == pytest.approx(planted.seconds(50, 100))


def test_quantiles_by_nearest_rank() -> None:
    assert Quantiles.of([]) is None
    assert Quantiles.of([3.0]) == Quantiles(3.0, 3.0, 3.0, 3.0)
    hundred = Quantiles.of(float(i) for i in range(100, 0, -1))
    assert hundred == Quantiles(50.5, 50.0, 90.0, 99.0)


@pytest.fixture
def log_path(log: LogFile, tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    simulate(traffic(), options(), 36).engine.events.write(path)
    return path


Output = Callable[[], tuple[str, str]]


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Output:
    return lambda: tuple(capsys.readouterr())  # type: ignore[return-value]


def test_explain_on_the_command_line(log_path: Path, output: Output) -> None:
    assert run(["explain", "r12", "--log", str(log_path)]) == 0
    assert output()[0].startswith("Request r12 came at ")
    assert run(["explain", "--log", str(log_path)]) == 0
    assert len(output()[0].splitlines()) == 60
    assert run(["explain", "nobody", "--log", str(log_path)]) == 2
    assert "no request 'nobody'; it has 60, beginning with r0" in output()[1]
    assert run(["explain", "r1", "--log", str(log_path.parent / "none")]) == 2
    assert "none does not exist; expected an event log" in output()[1]


def test_trace_on_the_command_line(log_path: Path, output: Output) -> None:
    target = log_path.parent / "trace.json"
    assert run(["trace", str(log_path), "--perfetto", str(target)]) == 0
    assert len(json.loads(target.read_text())["traceEvents"]) > 500
    assert "60 requests and " in output()[1]


def test_replay_on_the_command_line(log_path: Path, output: Output) -> None:
    assert run(["replay", str(log_path)]) == 0
    table = output()[0]
    assert run(["replay", str(log_path)]) == 0
    assert output()[0] == table
    for row in ("preemptions", "waiting to start", "time to first token", "A step costs 4 ms"):
        assert row in table
    events = log_path.parent / "replayed.jsonl"
    arguments = ["--max-num-seqs", "2", "--num-kv-blocks", "400", "--json"]
    arguments += ["--event-log", str(events), "--fixed", "0.01", "--speed", "0.5"]
    assert run(["replay", str(log_path), *arguments]) == 0
    record = json.loads(output()[0])
    assert record["costs"]["fixed"] == 0.01
    assert record["replay"]["num_preemptions"] < record["log"]["num_preemptions"]
    assert read_log(events).header["max_num_seqs"] == 2
    assert summarize(read_log(events)).as_dict() == record["replay"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speed", "0"], "--speed is 0.0; expected a number above 0"),
        (["--fixed", "-1"], "--fixed is -1.0; expected seconds, 0 or more"),
        (["--per-token", "nan"], "--per-token is nan; expected seconds"),
        (["--per-attended", "inf"], "--per-attended is inf; expected seconds"),
        (["--max-num-seqs", "0"], "max_num_seqs is 0; expected an integer, 1 or more"),
        (["--max-num-seqs", "-3"], "max_num_seqs is -3"),
        (["--max-num-batched-tokens", "0"], "max_num_batched_tokens is 0"),
        (["--max-waiting-requests", "0"], "max_waiting_requests is 0"),
        (["--priority-ageing-seconds", "-1"], "priority_ageing_seconds is -1.0"),
        (["--num-kv-blocks", "0"], "num_kv_blocks is 0"),
        (["--num-kv-blocks", "2"], "the whole KV cache holds 32"),
    ],
)
def test_mistakes(log_path: Path, output: Output, arguments: list[str], message: str) -> None:
    assert run(["replay", str(log_path), *arguments]) == 2
    assert message in output()[1]
