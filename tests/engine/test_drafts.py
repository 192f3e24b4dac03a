"""Draft tokens, right and wrong: the same answers, bit for bit, in fewer steps."""

from __future__ import annotations

from typing import Any

import pytest
from engine_helpers import (
    FakeDrafter,
    check_answers,
    check_published,
    fake_engine,
    fake_future,
    plain_tokenizer_directory,
    run_to_end,
    solo_answer,
)
from fake_runtime import NAN_TOKEN, FakeRuntime
from invariance_helpers import (
    MODES,
    alone,
    crowd,
    facts,
    make_engine,
    others,
    prompt_of,
    run,
    subjects,
)

from octavo.engine.block_manager import BlockManager
from octavo.engine.drafter import Drafter
from octavo.engine.engine import Engine
from octavo.engine.outputs import OutputChunk
from octavo.engine.request import Sequence, SequenceState
from octavo.engine.schedule import SchedulerLimits
from octavo.engine.scheduler import Scheduler
from octavo.sampling_params import SamplingParams
from octavo.text.tokenizer import Tokenizer

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
SHARES = [1.0, 0.5, 0.0]


def num_steps_alone(right: float | None, overlap: bool = False) -> int:
    drafter = None if right is None else FakeDrafter(fake_future, 4, right)
    engine = fake_engine(drafter=drafter, overlap_steps=overlap)
    params = SamplingParams(temperature=0.8, seed=4, max_tokens=40, ignore_eos=True, logprobs=2)
    engine.add_request("a", [1, 2, 3], params)
    check_answers(run_to_end(engine)["a"], params)
    assert engine.num_sampled_tokens == 40
    return engine.num_steps


def test_right_drafts_save_steps_and_wrong_ones_cost_none() -> None:
    assert num_steps_alone(None) == num_steps_alone(0.0) == 40
    assert num_steps_alone(1.0) < num_steps_alone(0.5) < 40
    assert num_steps_alone(1.0, overlap=True) == num_steps_alone(1.0)


@pytest.mark.parametrize("right", SHARES)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("num_blocks", "caching"), [(12, True), (20, False), (200, True)])
def test_a_crowd(right: float, overlap: bool, num_blocks: int, caching: bool) -> None:
    drafter = FakeDrafter(fake_future, 5, right)
    engine = fake_engine(
        num_blocks,
        max_num_seqs=7,
        max_num_batched_tokens=23,
        enable_prefix_caching=caching,
        overlap_steps=overlap,
        drafter=drafter,
    )
    crowd(engine)
    assert drafter.num_proposed > 100
    assert engine.blocks.num_free_blocks == num_blocks
    if num_blocks != 20:
        assert (engine.scheduler.num_preemptions > 0) == (num_blocks == 12)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(plain_tokenizer_directory(tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize("right", [None, *SHARES])
@pytest.mark.parametrize("overlap", [False, True])
def test_every_way_to_end(tokenizer: Tokenizer, right: float | None, overlap: bool) -> None:
    """In the midst of accepted drafts, too, and streamed token by token all the same."""
    whole = solo_answer([4, 9, 2], SamplingParams(**GREEDY, max_tokens=20)).token_ids
    text = "".join(chr(33 + token) for token in whole)
    wanted = {
        "length": ([4, 9, 2], SamplingParams(**GREEDY, max_tokens=9, logprobs=2)),
        "one": ([4, 9, 2], SamplingParams(**GREEDY, max_tokens=1)),
        "two": ([4, 9, 2], SamplingParams(**GREEDY, max_tokens=2)),
        **{
            f"token{i}": ([4, 9, 2], SamplingParams(**GREEDY, stop_token_ids=(whole[i],)))
            for i in range(12)
        },
        **{
            f"string{i}": ([4, 9, 2], SamplingParams(**GREEDY, stop=(text[i : i + 3],), logprobs=1))
            for i in range(12)
        },
        "minimum": ([4, 9, 2], SamplingParams(**GREEDY, min_tokens=6, stop_token_ids=whole[2:4])),
        "context": ([1] * 40, SamplingParams(**GREEDY)),
        "nan": ([1, 2, NAN_TOKEN], SamplingParams(**GREEDY, n=2)),
    }
    runs = []
    for drafter in (None, None if right is None else FakeDrafter(fake_future, 6, right)):
        engine = fake_engine(tokenizer=tokenizer, overlap_steps=overlap, drafter=drafter)
        chunks: dict[tuple[str, int], list[tuple[Any, ...]]] = {}

        def take(chunk: OutputChunk, chunks: Any = chunks) -> None:
            facts = (chunk.text, chunk.token_ids, chunk.logprobs, chunk.finish_reason)
            chunks.setdefault((chunk.request_id, chunk.index), []).append(facts)

        for name, (prompt, params) in wanted.items():
            engine.add_request(name, prompt, params, stream=True)
        outputs = run_to_end(engine, on_chunk=take)
        runs.append(({name: output.outputs for name, output in outputs.items()}, chunks))
        assert engine.blocks.num_free_blocks == engine.blocks.num_blocks
    assert runs[0] == runs[1]


def test_blocks_of_right_and_wrong_drafts_are_named_for_what_they_hold() -> None:
    for right in SHARES:
        engine = fake_engine(200, drafter=FakeDrafter(fake_future, 6, right))
        params = SamplingParams(**GREEDY, max_tokens=40)
        engine.add_request("a", [1, 2, 3], params)
        engine.add_request("b", [4, 2, 3], params)
        outputs = {}
        while engine.has_unfinished_requests:
            for chunk in engine.step():
                outputs[chunk.request_id] = chunk.result
            check_published(engine)
        # What the next turn of a talk finds is what was said in this one.
        assert outputs["a"] is not None
        turn = [1, 2, 3, *outputs["a"].outputs[0].token_ids]
        engine.add_request("next", turn, SamplingParams(**GREEDY, max_tokens=4))
        again = run_to_end(engine)["next"]
        check_answers(again, SamplingParams(**GREEDY, max_tokens=4))
        assert again.metrics.num_cached_tokens >= 36


def test_a_failed_step_leaves_its_drafts_behind() -> None:
    params = SamplingParams(temperature=1.0, seed=3, ignore_eos=True, max_tokens=30, n=3)
    for overlap in (False, True):
        drafter = FakeDrafter(fake_future, 4, 0.7)
        engine = fake_engine(overlap_steps=overlap, drafter=drafter)
        engine.add_request("a", [1, 2, 3, 4, 5], params)
        runtime = engine.runtime
        assert isinstance(runtime, FakeRuntime)
        for when in ("fail_next", "fail_wait", "fail_next", "fail_wait"):
            engine.step()
            setattr(runtime, when, RuntimeError("out of luck"))
            with pytest.raises(RuntimeError, match="out of luck"):
                engine.step()
            engine.check_integrity()
        check_answers(run_to_end(engine)["a"], params)


class Prophet:
    """Drafts from answers that are known, by request and sample."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers

    def __call__(self, sequence: Sequence, count: int) -> list[int]:
        assert isinstance(sequence.key, tuple)
        request_id, index = sequence.key
        known = self.answers[request_id][index][0] if request_id in self.answers else (7,) * 40
        return list(known[sequence.num_output_tokens :][:count])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("right", SHARES)
def test_bits(dtype: str, mode: str, overlap: bool, right: float) -> None:
    """The native core checks drafts with the bits of one token at a time."""
    expected = alone(dtype, mode)
    for chunk in (29, 512):
        engine = make_engine(
            dtype,
            max_num_batched_tokens=chunk,
            overlap_steps=overlap,
            drafter=FakeDrafter(Prophet(expected), 6, right, wrong=3),
        )
        assert facts(run(engine, {**others(), **subjects(MODES[mode])})) == expected
        num_steps = engine.num_steps
        assert facts(run(engine, subjects(MODES[mode]), apart=True)) == expected
        if chunk == 512:
            assert (engine.num_steps - num_steps < 3 * 23) == (right > 0)


@pytest.mark.parametrize("overlap", [False, True])
def test_bits_in_a_tiny_cache_with_forks(overlap: bool) -> None:
    several = SamplingParams(temperature=0.9, seed=8, max_tokens=90, logprobs=1, n=4)
    one = SamplingParams(**GREEDY, max_tokens=110, logprobs=3)
    requests = {
        f"subject{i}": (prompt_of(50 + 13 * i, seed=i), several if i % 2 else one) for i in range(6)
    }
    expected = facts(run(make_engine(), requests, apart=True))
    drafter = FakeDrafter(Prophet(expected), 5, 0.7, wrong=3)
    engine = make_engine(num_blocks=33, overlap_steps=overlap, drafter=drafter)
    outputs = run(engine, requests)
    assert facts(outputs) == expected
    assert sum(output.metrics.num_preemptions for output in outputs.values()) > 0
    assert drafter.num_proposed > 500


class Nines(FakeDrafter):
    """Always as many nines as there is room for, and more."""

    def __init__(self, num_drafts: int = 50) -> None:
        super().__init__(lambda sequence, count: [9] * num_drafts)

    def propose(self, sequence: Sequence) -> list[int]:
        self.num_proposed += 1
        return list(self.future(sequence, 0))


def draft_scheduler(
    drafter: Drafter, budget: int = 12, num_blocks: int = 40, rows: int = 128
) -> Scheduler:
    limits = SchedulerLimits(8, budget, 64, headroom_blocks=1, max_prompt_rows=rows)
    return Scheduler(limits, BlockManager(num_blocks, 4), drafter=drafter)


def add(scheduler: Scheduler, key: str, num_tokens: int, **params: Any) -> Sequence:
    sequence = Sequence(key, [ord(key[0]), *range(num_tokens - 1)], SamplingParams(**params))
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler, sampled: int = 1) -> list[tuple[Any, int, int, int]]:
    schedule = scheduler.schedule()
    scheduler.advance(schedule)
    rejected = scheduler.complete(schedule, [sampled] * len(schedule.row_sequences))
    for row, sequence in enumerate(schedule.row_sequences):
        if row not in rejected:
            sequence.token_ids.append(sampled)
    scheduler.check_integrity()
    return [(e.sequence.key, e.start, e.num_new_tokens, e.num_samples) for e in schedule.entries]


def test_drafts_take_what_the_budget_leaves_when_all_have_a_token() -> None:
    scheduler = draft_scheduler(Nines(), budget=12)
    for key, num_tokens in (("a", 4), ("b", 3), ("c", 2)):
        add(scheduler, key, num_tokens, max_tokens=20)
    assert step(scheduler) == [("a", 0, 4, 1), ("b", 0, 3, 1), ("c", 0, 2, 1)]
    assert step(scheduler) == [("a", 4, 10, 10), ("b", 3, 1, 1), ("c", 2, 1, 1)]
    # All nine drafts were wrong, and a goes on behind the one token that it got.
    assert step(scheduler) == [("a", 5, 10, 10), ("b", 4, 1, 1), ("c", 3, 1, 1)]
    # Nines come true: ten tokens at once, and then as many as a may still have.
    assert step(scheduler, 9)[0] == ("a", 6, 10, 10)
    assert step(scheduler)[0] == ("a", 16, 7, 7)


def test_the_logit_rows_of_drafts_are_bounded() -> None:
    """A step never has more rows of logits than memory was set aside for."""
    scheduler = draft_scheduler(Nines(4), budget=60, rows=7)
    for key in "abc":
        add(scheduler, key, 3, max_tokens=20)
    step(scheduler)
    assert [entry[3] for entry in step(scheduler)] == [5, 4, 1]


def test_nobody_is_preempted_for_a_guess() -> None:
    scheduler = draft_scheduler(Nines(6), num_blocks=5, budget=100)
    add(scheduler, "a", 7, max_tokens=12)
    add(scheduler, "b", 7, max_tokens=12)
    step(scheduler)
    # One block is free: too few for six drafts.
    assert step(scheduler) == [("a", 7, 1, 1), ("b", 7, 1, 1)]
    assert scheduler.num_preemptions == 0 and scheduler.blocks.num_free_blocks == 1
    scheduler = draft_scheduler(Nines(2), num_blocks=5, budget=100)
    for key in "ab":
        add(scheduler, key, 7, max_tokens=12)
    step(scheduler)
    # Enough for two, but b may need it; with nobody behind, b itself has it.
    assert step(scheduler) == [("a", 7, 1, 1), ("b", 7, 3, 3)]


def test_who_takes_no_drafts() -> None:
    """Penalties count tokens, min_tokens forbids by their number: no drafts meanwhile."""
    drafter = Nines(2)
    scheduler = draft_scheduler(drafter, budget=64)
    for name in ("frequency_penalty", "presence_penalty"):
        add(scheduler, name, 3, max_tokens=20, **{name: 0.5})
    add(scheduler, "repetition_penalty", 3, max_tokens=20, repetition_penalty=1.5)
    add(scheduler, "min_tokens", 3, max_tokens=20, min_tokens=3)
    add(scheduler, "plain", 3, max_tokens=20, logit_bias=((7, 2.0),))
    found = [[entry[3] for entry in step(scheduler)] for _ in range(5)]
    assert found == [[1] * 5, *[[1, 1, 1, 1, 3]] * 2, *[[1, 1, 1, 3, 3]] * 2]
    assert drafter.num_proposed == 4 + 2


def test_a_sequence_preempted_with_drafts_in_flight() -> None:
    """It loses everything computed, and no more; what was sampled for it counts."""
    scheduler = draft_scheduler(Nines(3))
    sequence = add(scheduler, "a", 5, max_tokens=20)
    step(scheduler)
    schedule = scheduler.schedule()
    scheduler.advance(schedule)
    assert sequence.num_computed_tokens == 9 and sequence.num_pending_tokens == 4
    scheduler.requeue(sequence)
    assert scheduler.schedule().entries == ()  # not before its step has ended
    assert scheduler.complete(schedule, [9, 1, 2, 3]) == {2, 3}
    assert sequence.state is SequenceState.WAITING
    assert sequence.num_computed_tokens == sequence.num_pending_tokens == 0
    scheduler.check_integrity()


def test_penalties_and_biases_beside_drafts() -> None:
    """Rows of biases and masks stay with their sequences when others bring several rows."""
    penalized = SamplingParams(temperature=0.8, seed=4, max_tokens=40, frequency_penalty=1.5)
    biased = SamplingParams(temperature=0.8, seed=4, max_tokens=40, logit_bias=((7, 2.5), (9, 2)))
    late = SamplingParams(
        temperature=0.8, seed=4, max_tokens=40, min_tokens=9, stop_token_ids=tuple(range(60))
    )
    requests = {
        "subject0": (prompt_of(20, seed=3), SamplingParams(**GREEDY, max_tokens=60)),
        "subject1": (prompt_of(40, seed=1), penalized),
        "subject2": (prompt_of(33, seed=2), biased),
        "subject3": (prompt_of(31, seed=4), late),
        "subject4": (prompt_of(30, seed=5), SamplingParams(**GREEDY, max_tokens=50)),
    }
    expected = facts(run(make_engine(), requests, apart=True))
    assert len(expected["subject3"][0][0]) < 40
    for overlap in (False, True):
        drafter = FakeDrafter(Prophet(expected), 5, 0.8, wrong=3)
        engine = make_engine(overlap_steps=overlap, drafter=drafter)
        assert facts(run(engine, requests)) == expected
        assert isinstance(engine, Engine) and drafter.num_proposed > 50
