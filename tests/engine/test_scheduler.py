"""Who computes what, when: order, budget, memory, preemption."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from octavo.engine.block_manager import BlockManager
from octavo.engine.block_pool import IntegrityError
from octavo.engine.request import Sequence, SequenceState
from octavo.engine.schedule import Schedule, SchedulerLimits
from octavo.engine.scheduler import Scheduler
from octavo.errors import InvalidArgumentError
from octavo.sampling_params import SamplingParams


def make_scheduler(
    num_blocks: int = 100,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 10,
    max_model_len: int = 64,
    headroom_blocks: int = 1,
) -> Scheduler:
    limits = SchedulerLimits(
        max_num_seqs, max_num_batched_tokens, max_model_len, headroom_blocks=headroom_blocks
    )
    return Scheduler(limits, BlockManager(num_blocks, block_size))


def add(scheduler: Scheduler, key: str, num_tokens: int, max_tokens: int = 20) -> Sequence:
    prompt = [(7 * i + ord(key[0])) % 50 for i in range(num_tokens)]
    sequence = Sequence(key, prompt, SamplingParams(max_tokens=max_tokens))
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler) -> list[tuple[str, int, int, int]]:
    """Schedule and "compute" a step; a token for each sample."""
    schedule = scheduler.schedule()
    compute(scheduler, schedule)
    return [(str(e.sequence.key), *e[1:4]) for e in schedule.entries]


def compute(scheduler: Scheduler, schedule: Schedule) -> None:
    scheduler.advance(schedule)
    scheduler.complete(schedule, [1] * len(schedule.row_sequences))
    for entry in schedule.entries:
        entry.sequence.token_ids.extend([1] * entry.num_samples)
    scheduler.check_integrity()


def test_prompts_are_cut_into_chunks_behind_the_decodes() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10)
    add(scheduler, "a", 4)
    add(scheduler, "b", 17)
    add(scheduler, "c", 3)
    assert step(scheduler) == [("a", 0, 4, 1), ("b", 0, 6, 0)]
    assert step(scheduler) == [("a", 4, 1, 1), ("b", 6, 9, 0)]
    assert step(scheduler) == [("a", 5, 1, 1), ("b", 15, 2, 1), ("c", 0, 3, 1)]
    assert step(scheduler) == [("a", 6, 1, 1), ("b", 17, 1, 1), ("c", 3, 1, 1)]


def test_budget_of_one_serves_the_earliest_first() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=1)
    first = add(scheduler, "a", 2)
    add(scheduler, "b", 1)
    seen = [step(scheduler) for _ in range(4)]
    assert seen == [[("a", 0, 1, 0)], *[[("a", i, 1, 1)] for i in (1, 2, 3)]]
    scheduler.finish(first, "stop")
    assert step(scheduler) == [("b", 0, 1, 1)]


def test_max_num_seqs_holds_and_a_place_is_filled_at_once() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    first = add(scheduler, "a", 2)
    add(scheduler, "b", 2)
    add(scheduler, "c", 2)
    assert [entry[0] for entry in step(scheduler)] == ["a", "b"]
    scheduler.finish(first, "length")
    assert [entry[0] for entry in step(scheduler)] == ["b", "c"]


def test_the_first_in_the_queue_is_not_overtaken() -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_batched_tokens=100)
    add(scheduler, "a", 20, 9)  # 5 of 8 blocks
    add(scheduler, "large", 12, 9)  # 3 blocks: they are free, but one is kept for a's growth
    add(scheduler, "small", 2, 9)  # would fit
    assert [entry[0] for entry in step(scheduler)] == ["a"]
    assert scheduler.num_waiting == 2


def test_the_latest_is_preempted_and_comes_back_first() -> None:
    scheduler = make_scheduler(num_blocks=4, max_num_batched_tokens=100)
    first = add(scheduler, "a", 7, 10)
    second = add(scheduler, "b", 3, 9)
    add(scheduler, "c", 2, 9)
    assert [entry[0] for entry in step(scheduler)] == ["a", "b"]  # c waits: no spare block
    step(scheduler)  # a and b fill their blocks
    schedule = scheduler.schedule()  # both need one more, and one is left
    assert schedule.preempted == (second,)
    assert [entry.sequence for entry in schedule.entries] == [first]
    assert second.state is SequenceState.WAITING and second.num_computed_tokens == 0
    assert second.num_output_tokens == 2  # what was drawn is kept
    compute(scheduler, schedule)
    while scheduler.num_running == 1 and first.num_output_tokens < 9:
        assert [entry[0] for entry in step(scheduler)] == ["a"]
    scheduler.finish(first, "stop")
    # All of b, prompt and answer so far, is computed anew, and before c.
    assert step(scheduler) == [("b", 0, 5, 1), ("c", 0, 2, 1)]
    assert second.num_preemptions == 1


def test_a_sequence_may_have_to_preempt_itself() -> None:
    scheduler = make_scheduler(num_blocks=5, max_num_batched_tokens=100)
    add(scheduler, "a", 6, 14)
    latest = add(scheduler, "b", 7, 12)
    step(scheduler)
    for _ in range(20):
        schedule = scheduler.schedule()
        if schedule.preempted:
            break
        compute(scheduler, schedule)
    assert schedule.preempted == (latest,)
    assert [str(entry.sequence.key) for entry in schedule.entries] == ["a"]
    assert scheduler.num_waiting == 1


def test_a_step_that_was_not_computed_is_scheduled_again() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 17)
    step(scheduler)
    lost = scheduler.schedule()
    scheduler.advance(lost)
    scheduler.rollback(lost)
    assert scheduler.schedule().entries == lost.entries
    scheduler.check_integrity()


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "message"),
    [
        (0, 5, "the prompt has no tokens"),
        (64, 1, "has 64 tokens; expected at most 63"),
        (1000, 1, "has 1000 tokens; expected at most 63"),
        (30, 20, "may have 50 tokens; the whole KV cache holds 48"),
    ],
)
def test_what_can_never_fit_is_refused(num_tokens: int, max_tokens: int, message: str) -> None:
    scheduler = make_scheduler(num_blocks=12, max_model_len=64)
    with pytest.raises(InvalidArgumentError, match=message):
        add(scheduler, "a", num_tokens, max_tokens)
    assert scheduler.num_waiting == scheduler.num_running == 0


def test_the_last_token_needs_no_place_in_the_cache() -> None:
    scheduler = make_scheduler(num_blocks=12, max_num_batched_tokens=100)
    sequence = add(scheduler, "a", 40, 9)  # 49 tokens, of which 48 are computed
    while sequence.num_output_tokens < 9:
        step(scheduler)
    assert scheduler.blocks.num_free_blocks == 0


def test_finishing_twice_is_found() -> None:
    scheduler = make_scheduler()
    sequence = add(scheduler, "a", 3)
    assert scheduler.num_waiting == 1
    scheduler.finish(sequence, "abort")  # while waiting
    assert scheduler.num_waiting == scheduler.num_running == 0
    with pytest.raises(IntegrityError, match="finished twice"):
        scheduler.finish(sequence, "abort")


def test_integrity_check_finds_a_leak() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 3)
    step(scheduler)
    scheduler.blocks.start("ghost", 2)
    with pytest.raises(IntegrityError, match="ghost"):
        scheduler.check_integrity()


def add_with(scheduler: Scheduler, key: str, num_tokens: int, max_tokens: int, **more: Any) -> Any:
    prompt = [(11 * i + ord(key[0])) % 50 for i in range(num_tokens)]
    sequence = Sequence(key, prompt, SamplingParams(max_tokens=max_tokens), **more)
    scheduler.add(sequence)
    return sequence


def test_an_urgent_arrival_takes_the_place_of_the_least_urgent() -> None:
    scheduler = make_scheduler(max_num_seqs=3, max_num_batched_tokens=100)
    for i, priority in enumerate([0, 5, 5]):
        add_with(scheduler, "abc"[i], 6, 20, priority=priority, arrival_time=float(i))
    assert [entry[0] for entry in step(scheduler)] == ["a", "b", "c"]
    add_with(scheduler, "urgent", 6, 20, priority=1, arrival_time=3.0)
    schedule = scheduler.schedule()
    assert [sequence.key for sequence in schedule.preempted] == ["c"]
    assert [entry.sequence.key for entry in schedule.entries] == ["a", "b", "urgent"]
    compute(scheduler, schedule)
    # An equal comes too late: it waits, and so does c.
    add_with(scheduler, "equal", 6, 20, priority=5, arrival_time=4.0)
    assert [entry[0] for entry in step(scheduler)] == ["a", "urgent", "b"]
    assert scheduler.num_waiting == 2 and scheduler.num_preemptions == 1


def test_nobody_is_preempted_in_vain() -> None:
    """Ten blocks; the urgent one needs eight, and only four can be had of who is less urgent."""
    scheduler = make_scheduler(num_blocks=10, max_num_batched_tokens=100)
    add_with(scheduler, "important", 20, 4, priority=-1)
    add_with(scheduler, "low", 12, 4, priority=9)
    step(scheduler)
    add_with(scheduler, "urgent", 30, 2, priority=0)
    for _ in range(3):
        assert scheduler.schedule().preempted == ()
        assert [entry[0] for entry in step(scheduler)] == ["important", "low"]
    assert scheduler.waiting_reason == "kv_blocks"


def test_headroom_is_what_the_running_may_still_need() -> None:
    scheduler = make_scheduler(num_blocks=30, max_num_batched_tokens=100, headroom_blocks=3)
    for key, num_tokens, max_tokens in (("a", 12, 30), ("b", 8, 6), ("c", 8, 1)):
        add_with(scheduler, key, num_tokens, max_tokens)
    step(scheduler)
    # a may come to need 8 more blocks, b 2, and c none: its last token is never computed.
    assert [scheduler._headroom(n) for n in range(4)] == [0, 3, 5, 5]


def test_a_failed_step_admits_nobody() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 4)
    step(scheduler)
    new = add(scheduler, "b", 3)
    schedule = scheduler.schedule()
    assert schedule.admitted == (new,)
    scheduler.advance(schedule)
    scheduler.rollback(schedule)
    scheduler.check_integrity()
    assert new.state is SequenceState.WAITING and new.num_preemptions == 0
    assert [entry[0] for entry in step(scheduler)] == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_num_seqs": 1}, "max_num_seqs"),
        ({"max_num_batched_tokens": 5}, "token_budget"),
        ({"num_blocks": 6}, "kv_blocks"),
    ],
)
def test_why_the_first_in_the_queue_waits(options: dict[str, int], reason: str) -> None:
    scheduler = make_scheduler(**{"max_num_batched_tokens": 100, **options})
    add(scheduler, "a", 12, 8)
    add(scheduler, "bb", 12, 8)
    step(scheduler)
    assert scheduler.waiting_reason == reason
    waits = [event for event in scheduler.events if event[1] == "waited"]
    assert [(event[2], event[3]) for event in waits] == [("bb", reason)]
    step(scheduler)  # for the same reason: it is not noted again
    assert len([event for event in scheduler.events if event[1] == "waited"]) == 1


def test_scheduling_is_pure_python() -> None:
    program = (
        "import sys, octavo.engine.scheduler, octavo.engine.events\n"
        "print([m for m in ('numpy', 'octavo._native') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
