"""Who waits, for how long at most, and who comes first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from engine_helpers import ManualClock, check_answers, fake_engine, run_to_end, solo_answer

from octavo.engine.admission import AdmissionLimits, Deadlines, part_id, whole_id
from octavo.engine.block_pool import IntegrityError
from octavo.engine.engine import Engine
from octavo.errors import InvalidArgumentError, QueueFullError
from octavo.sampling_params import SamplingParams

PARAMS = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=12)


def waiting(engine: Engine) -> tuple[int, int]:
    """Requests that have not started, and their prompt tokens."""
    stats = engine.stats()
    return stats.num_waiting_requests, stats.num_waiting_tokens


def order_of_admission(arrivals: list[tuple[float, int]], **options: Any) -> list[str]:
    """One place only; the arrivals are (time, priority), all before the first step."""
    clock = ManualClock()
    engine = fake_engine(clock=clock, max_num_seqs=1, **options)
    for i, (time, priority) in enumerate(arrivals):
        clock.now = 1000.0 + time
        engine.add_request(f"{i}", [i, 1, 2], PARAMS, priority=priority)
    return list(run_to_end(engine))  # in the order of finishing


def test_lower_priority_numbers_come_first() -> None:
    assert order_of_admission([(0, 5), (0, 0), (0, -3), (0, 0)]) == ["2", "1", "3", "0"]


def test_whoever_waits_grows_more_urgent() -> None:
    """One level is worth ten seconds: 11 s later is too late to overtake, 9 s is not."""
    ageing: dict[str, Any] = {"priority_ageing_seconds": 10.0}
    assert order_of_admission([(0, 1), (11, 0)], **ageing) == ["0", "1"]
    assert order_of_admission([(0, 1), (9, 0)], **ageing) == ["1", "0"]
    assert order_of_admission([(0, 3), (5, -3)], priority_ageing_seconds=0.0) == ["0", "1"]


def test_a_full_queue_refuses_and_names_what_waits() -> None:
    engine = fake_engine(max_num_seqs=1, max_waiting_requests=2, max_waiting_tokens=9)
    engine.add_request("a", [1, 2, 3, 4], PARAMS)
    engine.step()  # a has started: it does not wait any more
    assert waiting(engine) == (0, 0)
    engine.add_request("b", [1] * 4, PARAMS)
    with pytest.raises(QueueFullError, match=r"1 requests of 2 .* 4 prompt tokens of 9 .* 6:") as e:
        engine.add_request("c", [1] * 6, PARAMS)
    assert (e.value.num_requests, e.value.num_tokens) == (1, 4)
    assert (e.value.max_requests, e.value.max_tokens) == (2, 9)
    engine.add_request("d", [1] * 5, PARAMS)
    with pytest.raises(QueueFullError, match="2 requests of 2"):
        engine.add_request("e", [1], PARAMS)
    assert len(engine._requests) == 3
    engine.abort("d")
    assert waiting(engine) == (1, 4)
    engine.add_request("e", [1], PARAMS)
    assert run_to_end(engine).keys() == {"a", "b", "e"}
    assert waiting(engine) == (0, 0)


def test_an_empty_queue_takes_even_a_long_prompt() -> None:
    engine = fake_engine(max_num_seqs=1, max_waiting_tokens=3)
    engine.add_request("first", [1], PARAMS)
    engine.step()
    engine.add_request("long", [1] * 20, PARAMS)
    with pytest.raises(QueueFullError):
        engine.add_request("short", [1], PARAMS)
    assert "long" in run_to_end(engine)


def test_who_finds_a_place_does_not_wait() -> None:
    """An idle engine of four places takes as many at once, and the limit's number behind them."""
    limits = {"max_waiting_requests": 1, "max_waiting_tokens": 9}
    engine = fake_engine(max_num_seqs=4, max_num_batched_tokens=64, **limits)
    for index, name in enumerate("abcd"):
        params = replace(PARAMS, n=2 if name == "b" else 1)
        engine.add_request(name, [index] * 8, params)
    assert waiting(engine) == (4, 32)  # none has started
    with pytest.raises(QueueFullError, match=r"1 requests of 1 .* 8 prompt tokens of 9 "):
        engine.add_request("e", [1], PARAMS)
    engine.step()
    assert waiting(engine) == (0, 0)  # d comes before the second answer of b, which needs the first
    engine.add_request("e", [1], PARAMS)
    with pytest.raises(QueueFullError, match="1 requests of 1"):
        engine.add_request("f", [1], PARAMS)
    assert run_to_end(engine).keys() == set("abcde")


def test_who_was_left_by_a_step_waits_whatever_places_there_are() -> None:
    engine = fake_engine(6, max_num_seqs=4, max_waiting_requests=2)
    for index, name in enumerate("abc"):  # of which the cache has room for one
        engine.add_request(name, [index] * 11, PARAMS)
    engine.step()
    assert (engine.scheduler.num_running, engine.scheduler.num_places) == (1, 3)
    with pytest.raises(QueueFullError, match="2 requests of 2"):
        engine.add_request("d", [1], PARAMS)
    for name in "abc":
        engine.abort(name)
    for index in range(6):  # as many as an engine takes that has done nothing yet
        engine.add_request(f"{index}", [1], PARAMS)
    with pytest.raises(QueueFullError):
        engine.add_request("6", [1], PARAMS)
    run_to_end(engine)


def admit(limits: AdmissionLimits, name: str, num_tokens: int) -> None:
    limits.admit(name, num_tokens, 1, whole_id(name))


def busy_limits(**limits: int) -> AdmissionLimits:
    """Of an engine whose only place is taken."""
    engine = fake_engine(max_num_seqs=1, **limits)
    engine.add_request("first", [1], PARAMS)
    engine.step()
    return engine._admission


def test_parts_of_one_request_are_admitted_as_one() -> None:
    limits = busy_limits(max_waiting_requests=2, max_waiting_tokens=9)
    for index in range(5):
        admit(limits, part_id("a", index), 3 + index)
    assert (limits.num_requests, limits.num_tokens) == (5, 25)
    for name in ("b", part_id("b", 0), part_id("b", 1)):
        with pytest.raises(QueueFullError):
            admit(limits, name, 1)
    limits.remove(part_id("a", 0))  # it has started: its brothers may still come
    admit(limits, part_id("a", 5), 2)
    for index in range(1, 6):
        limits.remove(part_id("a", index))
    admit(limits, "c", 4)
    with pytest.raises(QueueFullError):  # c waited before it
        admit(limits, part_id("d", 0), 6)
    admit(limits, part_id("d", 0), 5)
    admit(limits, part_id("d", 1), 6)
    with pytest.raises(QueueFullError):  # by now it stands behind another
        admit(limits, part_id("a", 6), 1)
    assert (limits.num_requests, limits.num_tokens) == (3, 15)
    assert [whole_id(name) for name in (part_id("d", 11), "d-1", "d")] == ["d", "", ""]


def test_a_name_alone_makes_no_part() -> None:
    engine = fake_engine(max_num_seqs=1, max_waiting_requests=2)
    for index in range(3):
        engine.add_request(f"job#{index}", [1, 2], PARAMS)
    with pytest.raises(QueueFullError):
        engine.add_request("job#3", [1, 2], PARAMS)


@pytest.mark.parametrize("name", ["a", "a-0", part_id("a", 0)])
def test_a_name_that_comes_again_is_admitted_anew(name: str) -> None:
    limits = busy_limits(max_waiting_requests=2)
    admit(limits, name, 4)
    limits.remove(name)
    for other in ("b", "c"):
        admit(limits, other, 5)
    with pytest.raises(QueueFullError):
        admit(limits, name, 4)


@pytest.mark.parametrize("stream", [False, True])
def test_deadlines_in_the_queue_and_in_the_midst(stream: bool) -> None:
    clock = ManualClock()
    engine = fake_engine(clock=clock, max_num_seqs=1)
    engine.add_request("runs", [4, 9, 2], PARAMS, timeout=10.0, stream=stream)
    engine.add_request("waits", [4, 9, 3], PARAMS, timeout=4, stream=stream)
    engine.add_request("stays", [4, 9, 4], PARAMS, timeout=1e9, stream=stream)
    chunks = []
    for _ in range(5):
        clock.now += 1.5
        chunks += engine.step()
        engine.check_integrity()
    ended = {c.request_id: c.result for c in chunks if c.result is not None}
    assert ended.keys() == {"waits"}
    assert ended["waits"].outputs[0].finish_reason == "timeout"
    assert ended["waits"].outputs[0].token_ids == ()
    assert ended["waits"].metrics.first_scheduled_time is None
    clock.now = 1010.0
    [*_, chunk] = [c for c in engine.step() if c.request_id == "runs"]
    assert chunk.result is not None and chunk.finish_reason == "timeout"
    whole = solo_answer([4, 9, 2], PARAMS).token_ids
    assert chunk.result.outputs[0].token_ids == whole[:5]
    # Its blocks were free, and its place taken, within that step.
    assert engine.scheduler.num_running == 1
    assert engine.blocks.holders() == {("stays", 0)}
    check_answers(run_to_end(engine)["stays"], PARAMS)


def test_each_answer_of_a_stream_is_closed_by_its_deadline() -> None:
    clock = ManualClock()
    engine = fake_engine(clock=clock)
    params = SamplingParams(temperature=1.0, seed=1, ignore_eos=True, max_tokens=12, n=3)
    engine.add_request("three", [1, 2], params, stream=True, timeout=2.0)
    engine.step()
    clock.now += 2.0
    chunks = engine.step()
    assert [(c.index, c.finish_reason) for c in chunks] == [(i, "timeout") for i in range(3)]
    assert [c.result is not None for c in chunks] == [False, False, True]
    assert not engine.has_unfinished_requests


def test_a_step_that_fails_does_not_swallow_a_timeout() -> None:
    clock = ManualClock()
    engine = fake_engine(clock=clock)
    engine.add_request("late", [1, 2], PARAMS, timeout=1.0)
    engine.add_request("other", [1, 2], PARAMS)
    clock.now += 1.0
    engine.runtime.fail_next = RuntimeError("out of luck")  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="out of luck"):
        engine.step()
    assert [c.request_id for c in engine.step() if c.result is not None] == ["late"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": 1.5}, "priority is 1.5; expected an integer"),
        ({"priority": True}, "priority is True"),
        ({"priority": 2**31}, "priority is 2147483648; expected an integer from"),
        ({"timeout": 0}, "timeout is 0; expected a number of seconds above 0"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"timeout": "5"}, "timeout is '5'"),
    ],
)
def test_refusals_change_nothing(options: dict[str, Any], message: str) -> None:
    engine = fake_engine(max_waiting_requests=1)
    with pytest.raises(InvalidArgumentError, match=message):
        engine.add_request("bad", [1], PARAMS, **options)
    assert waiting(engine)[0] == 0 and not engine.has_unfinished_requests


def test_deadlines_of_the_ended_do_not_pile_up() -> None:
    deadlines = Deadlines()
    for i in range(10_000):
        deadlines.add(f"{i}", 1e6 + i)
        if i % 100:
            deadlines.remove(f"{i}")
    assert len(deadlines._heap) <= 400
    assert deadlines.expired(1e6 + 299) == ["0", "100", "200"]
    assert deadlines.expired(1e6 + 299) == []
    deadlines.remove("0")


def test_the_books_are_checked_when_there_is_nothing_else_to_do() -> None:
    clock = ManualClock()
    engine = fake_engine(clock=clock)
    engine.add_request("a", [1, 2], PARAMS)
    run_to_end(engine)
    engine.blocks.start("leak", 3)
    engine.add_request("b", [1, 2], PARAMS)
    while engine.has_unfinished_requests:
        engine.step()  # too soon after the last check
    clock.now += 11.0
    engine.add_request("c", [1, 2], PARAMS)
    with pytest.raises(IntegrityError, match="leak"):
        for _ in range(100):
            engine.step()
    # What the last step had drawn is not lost.
    assert [chunk.request_id for chunk in engine.step()] == ["c"]


def test_stats_and_live_tokens() -> None:
    engine = fake_engine(num_blocks=20, max_num_seqs=2)
    prompt = [7, 8, 9, 1, 2, 3, 4, 5, 6]
    engine.add_request("a", prompt, PARAMS)
    engine.step()
    engine.add_request("b", [*prompt[:8], 50], PARAMS)
    engine.add_request("c", [3, 4], PARAMS)
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.waiting_reason) == (2, 1, "max_num_seqs")
    assert (stats.num_waiting_requests, stats.num_waiting_tokens) == (1, 2)
    assert (stats.num_blocks, stats.num_free_blocks) == (20, 16)  # two are shared
    assert stats.kv_cache_usage == pytest.approx(0.2)
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (18, 8)
    assert stats.num_sampled_tokens == 3 and stats.num_steps == 2
    assert engine.scheduler.num_live_tokens == 8 + 2 + 1
    run_to_end(engine)
    assert engine.scheduler.num_live_tokens == 0
    assert engine.stats().num_cached_blocks > 0


def test_a_long_prompt_does_not_stall_running_answers() -> None:
    """Every step still draws a token for each of them, and no step is larger than the budget."""
    engine = fake_engine(num_blocks=60, max_num_seqs=4, max_num_batched_tokens=10)
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=30)
    for name in "abc":
        engine.add_request(name, [ord(name) % 90, 1], params)
    engine.step()
    engine.add_request("long", [(3 * i) % 90 for i in range(44)], PARAMS)
    drawn = []
    for _ in range(8):
        before = engine.num_sampled_tokens
        engine.step()
        drawn.append(engine.num_sampled_tokens - before)
    assert drawn == [3, 3, 3, 3, 3, 3, 4, 4]
    assert engine.runtime.max_tokens_seen == 10  # type: ignore[attr-defined]
