"""N-grams, the number of drafts, and what they cost: each by itself, without a model."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine_helpers import check_answers, fake_engine, run_to_end
from fake_runtime import NAN_TOKEN, VOCAB, draw
from speculation_helpers import fake_draft_source, ngram_drafting

from octavo.engine.request import Sequence
from octavo.engine.schedule import ScheduleBuilder, ScheduledSequence
from octavo.sampling_params import SamplingParams
from octavo.speculation import speculator
from octavo.speculation.costs import Depths, StepCosts, choose_depths
from octavo.speculation.ngram import LONGEST_MATCH, NgramIndex
from octavo.speculation.source import DraftSource
from octavo.speculation.speculator import Speculator


def longest_earlier(tokens: list[int], shortest: int) -> int:
    """The length of the longest match of the last tokens anywhere before, by plain search."""
    last, best = len(tokens) - 1, 0
    for end in range(last):
        length = 0
        while length <= end and tokens[end - length] == tokens[last - length]:
            length += 1
        best = max(best, min(length, LONGEST_MATCH))
    return best if best >= shortest else 0


@pytest.mark.parametrize("shortest", [1, 2, 3])
def test_an_index_finds_what_a_search_finds(shortest: int) -> None:
    """Fed one token, or several at a time. A chain is short enough here to see all positions."""
    rng = random.Random(shortest)
    for trial in range(30):
        index, tokens = NgramIndex(shortest, LONGEST_MATCH), list[int]()
        while len(tokens) < 60:
            if len(tokens) > 8 and rng.random() < 0.2:  # a quotation
                start = rng.randrange(len(tokens) - 4)
                tokens += tokens[start : start + rng.randrange(1, 9)]
            else:
                tokens += [rng.randrange(40) for _ in range(rng.choice([1, 1, 2, 5]))]
            index.extend(tokens)
            expected = longest_earlier(tokens, shortest)
            assert (index.source >= 0) == (expected > 0), (trial, tokens)
            assert index.length == expected
            if index.source >= 0:
                matched = tokens[index.source - index.length : index.source]
                assert matched == tokens[len(tokens) - index.length :]


def test_an_occurrence_is_kept_as_long_as_it_comes_true() -> None:
    """Of two with the same beginning, the later one first; then the one that was right."""
    index, tokens = NgramIndex(2, 2), [1, 2, 3, 4, 5, 6, 9, 1, 2, 7, 8, 5, 0, 1, 2]
    index.extend(tokens)
    assert index.draft(3) == [7, 8, 5]
    tokens.append(3)  # it was the first one
    index.extend(tokens)
    assert index.draft(3) == [4, 5, 6] and index.length == 3
    tokens += [4, 5]
    index.extend(tokens)
    assert index.draft(2) == [6, 9] and index.length == 5


def test_drafts_go_on_where_the_occurrence_meets_the_end() -> None:
    index, tokens = NgramIndex(2, 4), [7, 1, 2, 3, 1, 2, 3, 1, 2]
    index.extend(tokens)
    assert index.draft(8) == [3, 1, 2, 3, 1, 2, 3, 1]
    assert tokens == [7, 1, 2, 3, 1, 2, 3, 1, 2]
    assert NgramIndex(2, 4).draft(3) == []


def test_an_index_takes_constant_time_a_token_and_bounded_memory() -> None:
    index, tokens = NgramIndex(2, 4), [0] * 3000  # the worst case: one chain of everything
    index.extend(tokens)
    calls = 0

    class Counting(list[int]):
        def __getitem__(self, place: Any) -> Any:
            nonlocal calls
            calls += 1
            return super().__getitem__(place)

    counted = Counting(tokens)
    index._tokens = counted
    for token in range(100):
        counted.append(token % 3 * 50)
        index.extend(counted)
    assert calls < 100 * 2 * 16 * (LONGEST_MATCH + 2)
    assert len(index._table) <= 4 * len(tokens) and index._previous.itemsize == 4


def measured(times: dict[int, float]) -> StepCosts:
    costs = StepCosts()
    for num_tokens, seconds in times.items():
        costs.observe(num_tokens, seconds)
    return costs


def test_costs_are_measured_interpolated_and_guessed() -> None:
    costs = measured({1: 10.0, 5: 14.0})
    assert costs.seconds(1) == 10 and costs.seconds(3) == 12
    assert costs.seconds(19) == pytest.approx(14 * (9 + 19) / (9 + 5))
    for _ in range(200):
        costs.observe(5, 20.0)
    assert costs.seconds(5) == pytest.approx(20, rel=1e-6)
    for num_tokens in range(1000):
        costs.observe(num_tokens, 1.0 + num_tokens)
    assert len(costs._measured) == len(costs._sizes) <= 256
    assert costs._sizes == sorted(costs._measured)


def test_load_is_told_apart_from_size() -> None:
    """The machine becomes three times slower: known of steps that were not measured since."""
    costs = StepCosts()
    for _ in range(5):
        costs.observe(1, 1.0)
        costs.observe(5, 1.2)
    for _ in range(30):
        costs.observe(5, 3.6)
    assert costs.seconds(1) == pytest.approx(3.0) and costs.seconds(5) == pytest.approx(3.6)
    costs.observe(5, 50.0)  # it stumbles
    assert costs.seconds(1) == pytest.approx(3.0)


def test_without_a_plain_step_to_compare_with_there_are_no_drafts() -> None:
    _, _, drafter = simulate(lambda _: 1.0, TIMES["flat"], 3)
    assert drafter.costs.is_known(1) and len(drafter.costs._sizes) == 1


def test_plain_steps_are_measured_again() -> None:
    counts = []
    for chance in (0.3, 0.9):
        seen: list[int] = []

        def time_of(num_tokens: int, seen: list[int] = seen) -> float:
            seen.append(num_tokens)
            return 1 + 0.05 * num_tokens

        simulate(lambda _, chance=chance: chance, time_of, 400)
        counts.append(len([n for n in seen if n == 1]) - 400)  # `simulate` asks once a step
    assert counts[0] > 30 and 10 < counts[1] < 40, counts


def best_by_trying_all(chances: list[list[float]], num_decodes: int, times: StepCosts) -> float:
    """The most tokens a second, over all numbers of drafts for every sequence."""
    options = [[]]  # type: list[list[int]]
    for of_one in chances:
        options = [[*chosen, depth] for chosen in options for depth in range(len(of_one) + 1)]
    return max(
        (num_decodes + sum(sum(c[:d]) for c, d in zip(chances, depths, strict=True)))
        / times.seconds(num_decodes + sum(depths))
        for depths in options
    )


def test_depths_give_the_most_tokens_a_second() -> None:
    rng = random.Random(4)
    for _ in range(60):
        count = rng.randrange(1, 4)
        rates = [rng.random() for _ in range(count)]
        chances = [[rate ** (j + 1) for j in range(4)] for rate in rates]
        chances = [[c for c in of_one if c >= 0.02] for of_one in chances]
        num_decodes = count + rng.randrange(3)
        slope = rng.choice([0.02, 0.2, 0.7])
        costs = measured({n: 1 + slope * n + rng.random() / 9 for n in range(1, 30)})
        depths, extra, gain = choose_depths(chances, num_decodes, 99, costs, least_gain=1.0)
        tokens = num_decodes + sum(sum(c[:d]) for c, d in zip(chances, depths, strict=True))
        seconds = costs.seconds(num_decodes + sum(depths))
        assert tokens / seconds == pytest.approx(best_by_trying_all(chances, num_decodes, costs))
        assert gain == pytest.approx(tokens / num_decodes * costs.seconds(num_decodes) / seconds)
        assert extra == pytest.approx(seconds - costs.seconds(num_decodes) if any(depths) else 0)


def test_depths_know_the_price_of_drafts_and_the_budget() -> None:
    flat = measured({n: 1.0 for n in range(1, 40)})
    chances = [[0.9**j for j in range(1, 8)]] * 3
    assert choose_depths(chances, 3, 99, flat)[0] == [7, 7, 7]
    assert sum(choose_depths(chances, 3, 5, flat)[0]) == 5
    assert max(choose_depths(chances, 3, 99, flat, round_seconds=0.5)[0]) < 7
    assert choose_depths(chances, 3, 99, flat, round_seconds=3.0)[0] == [0, 0, 0]
    assert sum(choose_depths(chances, 3, 99, flat, round_seconds=3.0, least_gain=0.0)[0]) > 0
    busy = measured({n: float(n) for n in range(1, 40)})  # full of arithmetic
    assert choose_depths(chances, 3, 99, busy)[0] == [0, 0, 0]


class Coin(DraftSource):
    """A draft is right with a probability; a token of the truth is 1.

    price: seconds of drafts for one place, of all sequences together; 0: it is free.
    """

    def __init__(self, chance: float, price: float = 0.0) -> None:
        self.rng, self.chance = random.Random(7), chance
        self.price, self.now, self.is_free = price, 0.0, not price

    def draft(self, wanted: Any) -> Any:
        self.now += self.price * max(count for _, _, count in wanted)
        return [[int(self.rng.random() < self.chance) for _ in range(n)] for _, _, n in wanted]


def simulate(
    chance: Any,
    time_of: Any,
    num_steps: int = 600,
    batch: int = 1,
    price: float = 0.0,
    noise: Any = lambda number: (1.0, 1.0),
) -> tuple[float, float, Speculator]:
    """Seconds that a stream of steps takes, those that it takes without drafts, and the drafter.

    noise: of a step, the machine's load and a factor of chance, which only the drafter sees.
    """
    source = Coin(0.0, price)
    drafter = Speculator(source, 5, clock=lambda: source.now)
    params = SamplingParams(max_tokens=10**6)
    sequences = [Sequence(i, [3, 4 + i], params) for i in range(batch)]
    total = plain = 0.0
    for number in range(num_steps):
        source.chance = chance(number)
        for sequence in sequences:
            sequence.num_computed_tokens = sequence.num_tokens - 1
        step, started = ScheduleBuilder(number, 512, 0.0, 512), source.now
        drafter.begin_step(sequences, step)
        for sequence in sequences:
            step.add(sequence, 1, 1, tuple(drafter.propose(sequence)))
        schedule = step.build(batch)
        load, luck = noise(number)
        spent = source.now - started
        seconds = load * luck * time_of(schedule.num_tokens) + spent
        tokens = np.ones(len(schedule.row_sequences), np.int32)
        drafter.end_step(schedule, SimpleNamespace(token_ids=tokens), seconds)
        emitted = 0
        for entry in schedule.entries:
            right = 0
            while right < len(entry.draft_token_ids) and entry.draft_token_ids[right] == 1:
                right += 1
            entry.sequence.token_ids += [1] * (right + 1)
            emitted += right + 1
        total += load * time_of(schedule.num_tokens) + spent
        plain += load * time_of(batch) * emitted / batch
    return total, plain, drafter


TIMES = {
    "flat": lambda n: 1.0 + 0.01 * n,
    "steep": lambda n: 0.3 + 0.7 * n,
    "stairs": lambda n: 1.0 + 0.5 * (n // 4),
    "cliff": lambda n: 1.0 if n % 7 == 1 else 3.0,
}


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("chance", [0.0, 0.1, 0.4])
def test_drafts_never_cost_much(times: str, batch: int, chance: float) -> None:
    """Whatever steps cost and however bad drafts are: at least 0.97 times as fast."""
    total, plain, _ = simulate(lambda _: chance, TIMES[times], batch=batch)
    assert plain / total > 0.97


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("price", [0.02, 0.3, 0.9])
def test_drafts_that_cost_time_never_cost_much(chance: float, price: float) -> None:
    """A draft model: what is not drafted teaches nothing, and is tried again at times."""
    total, plain, _ = simulate(lambda _: chance, TIMES["flat"], price=price)
    assert plain / total > 0.97
    tokens = [sum(chance**i for i in range(k + 1)) for k in range(6)]
    foretold = max(t / (1.02 + k * (0.01 + price)) * 1.01 for k, t in enumerate(tokens))
    assert plain / total > 0.85 * foretold


def test_the_account_stops_what_is_chosen_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice that always promises much: the losses are seen, and bounded."""
    monkeypatch.setattr(speculator, "choose_depths", lambda *_, **__: Depths([5], 0.0, 2.0))
    total, plain, _ = simulate(lambda _: 0.0, lambda n: 0.5 + 0.5 * n, 1200)
    assert plain / total > 0.97


def test_good_drafts_pay_and_are_found_again() -> None:
    total, plain, drafter = simulate(lambda _: 0.9, TIMES["flat"])
    assert plain / total > 3.5
    assert drafter.rates[0] > 0.7
    # Bad for a long time, then good: noticed, though no draft was checked meanwhile.
    total, plain, _ = simulate(lambda n: 0.0 if n < 900 else 0.95, TIMES["flat"], 1000)
    assert plain / total > 1.15


@pytest.mark.parametrize("slope", [0.01, 0.15, 0.7])
@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("chance", [0.1, 0.4])
def test_noise_and_load_do_not_break_the_promise(slope: float, batch: int, chance: float) -> None:
    """Steps of a machine whose speed jumps, and which stumbles at times."""
    rng, loads = random.Random(9), [1.0, 1.5, 3.0, 1.0, 2.0, 1.2, 2.5, 1.0]

    def noise(number: int) -> tuple[float, float]:
        load = loads[number // 70 % len(loads)]
        return load, 3.0 if rng.random() < 0.03 else rng.uniform(0.9, 1.2)

    total, plain, _ = simulate(lambda _: chance, lambda n: 1 + slope * n, 1200, batch, noise=noise)
    assert plain / total > 0.97


def test_sequences_in_prefill_stop_drafts_of_others() -> None:
    drafter = Speculator(Coin(1.0), 4, clock=lambda: 0.0)
    for _ in range(3):
        drafter.costs.observe(1, 1.0)
    params = SamplingParams(max_tokens=50)
    decoding, prompt = Sequence("a", [1, 2, 3], params), Sequence("b", [1] * 30, params)
    decoding.num_computed_tokens = 2
    drafter.begin_step([decoding], ScheduleBuilder(0, 64, 0.0, 512))
    assert len(drafter.propose(decoding)) > 1
    drafter.begin_step([decoding, prompt], ScheduleBuilder(1, 64, 0.0, 512))
    assert not drafter.propose(decoding)


def test_what_is_not_decoded_alone_is_not_measured() -> None:
    drafter = Speculator(Coin(1.0), 4, clock=lambda: 0.0)
    sequence = Sequence("a", [1] * 9, SamplingParams())
    entry = ScheduledSequence(sequence, 0, 9, 1)
    step = ScheduleBuilder(0, 64, 0.0, 512)
    step.entries.append(entry)
    step.num_tokens = 9
    drafter.end_step(step.build(0), SimpleNamespace(token_ids=np.ones(1, np.int32)), 5.0)
    assert not drafter.costs.is_known(9) and not drafter.costs.is_known(1)


GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("error_every", [0, 3])
@pytest.mark.parametrize("num_blocks", [8, 100])
def test_a_draft_model_over_a_fake(overlap: bool, error_every: int, num_blocks: int) -> None:
    """Chunks of prompts, rejects, sequences that end: the fake checks every slot that is read."""
    source = fake_draft_source(num_blocks, error_every, 2, max_num_batched_tokens=7, max_num_seqs=3)
    drafter = Speculator(source, 4, adaptive=False)
    engine = fake_engine(60, drafter=drafter, overlap_steps=overlap)
    params = {}
    for i in range(12):
        temperature = 0.8 * (i % 2)
        params[f"{i}"] = SamplingParams(
            temperature=temperature, seed=i, ignore_eos=True, max_tokens=6 + i, n=1 + i % 3
        )
        engine.add_request(f"{i}", [(i * j) % 90 for j in range(1 + 2 * i)], params[f"{i}"])
    outputs = run_to_end(engine)
    for request_id, output in outputs.items():
        check_answers(output, params[request_id])
    stats = engine.stats()
    assert stats.num_draft_tokens > (20 if num_blocks == 8 else 120)
    if not error_every:
        assert stats.num_accepted_tokens == stats.num_draft_tokens
    else:
        assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    source.begin_step([])
    assert source.blocks.num_free_blocks == num_blocks
    source.blocks.check_integrity()


def test_after_rejects_a_draft_model_goes_on_from_the_answer() -> None:
    """Its drafts are those of the fake model for the answer's own tokens, whatever was rejected."""
    source = fake_draft_source(60, 3)
    drafter = Speculator(source, 4, adaptive=False)
    engine = fake_engine(60, drafter=drafter)
    made, seen = source.draft, []

    def draft(wanted: Any) -> Any:
        if engine.num_steps % 3 == 1:  # now and then the answer goes on without drafts
            return [()] * len(wanted)
        found = made(wanted)
        seen.extend(
            (list(s.token_ids), list(d)) for (s, _, _), d in zip(wanted, found, strict=True)
        )
        return found

    source.draft = draft  # type: ignore[method-assign]
    engine.add_request("a", [1, 2, 3], SamplingParams(**GREEDY, max_tokens=40))
    run_to_end(engine)
    assert len(seen) > 10
    for token_ids, drafts in seen:
        for place, token in enumerate(drafts):
            right = draw([*token_ids, *drafts[:place]], (0.0, 0, 1.0, 0.0), 0, 0)[0]
            assert token == ((right + 1) % (VOCAB - 1) if right % 3 == 0 else right)


def test_a_draft_model_computes_no_token_twice() -> None:
    """After right drafts only what it has not seen: the bonus token, and the last draft."""
    source = fake_draft_source()
    engine = fake_engine(60, drafter=Speculator(source, 3, adaptive=False))
    engine.add_request("a", [1, 2, 3, 4, 6], SamplingParams(**GREEDY, max_tokens=32))
    run_to_end(engine)
    runtime: Any = source.loaded.runtime
    assert runtime.num_tokens_computed <= 5 + 32
    lengths = [len(batch.token_ids) for batch in runtime.batches]
    assert lengths[:3] == [6, 1, 1] and max(lengths[3:]) == 2


def test_a_draft_model_whose_logits_are_not_finite_drafts_nothing() -> None:
    source = fake_draft_source()
    sequence = Sequence("a", [1, NAN_TOKEN, 2], SamplingParams(**GREEDY))
    assert [list(drafts) for drafts in source.draft([(sequence, None, 3)])] == [[]]


def test_repetitive_answers_need_fewer_steps_with_n_grams() -> None:
    engine = fake_engine(100, drafter=ngram_drafting(1, 4, False), max_model_len=48)
    prompt = [1, 2, 3, 4] * 6
    engine.add_request("a", prompt, SamplingParams(**GREEDY, max_tokens=20, logprobs=1))
    check_answers(run_to_end(engine)["a"], SamplingParams(**GREEDY, max_tokens=20, logprobs=1))
    assert engine.stats().num_drafts > 0
