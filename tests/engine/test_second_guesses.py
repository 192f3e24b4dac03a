"""Where second guesses come from, and how many of them are checked."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
from engine_helpers import check_answers, fake_engine, run_to_end
from fake_runtime import draw
from speculation_helpers import fake_draft_source

from octavo.draft_tree import read_tree
from octavo.engine import branches
from octavo.engine.branches import judge
from octavo.engine.drafter import DraftCounts
from octavo.engine.request import Sequence
from octavo.sampling_params import SamplingParams
from octavo.speculation.costs import StepCosts, choose_branches
from octavo.speculation.ngram import NgramIndex, NgramSource
from octavo.speculation.source import DraftSource
from octavo.speculation.speculator import Speculator

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
ROOMY: dict[str, Any] = {"max_num_seqs": 9, "num_spare_seqs": 20, "max_num_batched_tokens": 64}

# ---- where second guesses come from ----


def test_other_occurrences_go_on_in_other_ways() -> None:
    """Beside a search of all places."""
    rng = random.Random(5)
    for _ in range(60):
        tokens = [rng.randrange(4) for _ in range(rng.randrange(4, 40))]
        index = NgramIndex(2, 16)
        index.extend(tokens)
        last = len(tokens) - 1
        matches = []
        for end in range(last - 1, -1, -1):
            length = 0
            while length <= min(end, 15) and tokens[end - length] == tokens[last - length]:
                length += 1
            if length >= 2:
                matches.append((-length, end + 1))
        begun, expected = {tokens[index.source]} if index.source >= 0 else set(), []
        for _, source in sorted(matches, key=lambda each: each[0]):
            if tokens[source] not in begun:
                begun.add(tokens[source])
                expected.append(tokens[source : source + 3])
        found = index.others(3, 9)
        assert found == (expected if index.source >= 0 else [])
        assert index.others(3, 1) == expected[:1]
        trees = NgramSource(2, 16).draft_trees([(None, index, [(0, 0), (1, 0), (2, 0)])])  # type: ignore[list-item]
        assert [list(c) for c in trees[0]][1:] == [e[:2] for e in (expected + [[]] * 2)[:2]]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_blocks", [9, 100])
@pytest.mark.parametrize("error_every", [0, 3])
def test_trees_of_a_draft_model_over_a_fake(
    num_blocks: int, error_every: int, overlap: bool
) -> None:
    """The fake checks every slot that a chain reads; its cache has two KV groups."""
    source = fake_draft_source(num_blocks, error_every, 2, max_num_batched_tokens=7, max_num_seqs=3)
    tree = read_tree([[0], [1], [2], [0, 0], [0, 1], [0, 0, 0], [1, 0]], 5)
    drafter = Speculator(source, 3, adaptive=False, tree=tree)
    engine = fake_engine(60, drafter=drafter, overlap_steps=overlap, **ROOMY)
    params = {}
    for i in range(8):
        params[f"{i}"] = SamplingParams(
            temperature=0.8 * (i % 2), seed=i, ignore_eos=True, max_tokens=6 + i, n=1 + i % 3
        )
        engine.add_request(f"{i}", [(i * j) % 90 for j in range(1 + 2 * i)], params[f"{i}"])
    for request_id, output in run_to_end(engine).items():
        check_answers(output, params[request_id])
    assert engine.stats().num_draft_branches > (4 if num_blocks == 9 else 40)
    source.begin_step([])
    assert source.blocks.num_free_blocks == num_blocks
    source.blocks.check_integrity()


def test_a_branch_of_a_draft_model_goes_on_from_its_own_tokens() -> None:
    source = fake_draft_source(60)
    runtime: Any = source.loaded.runtime
    sequence = Sequence("a", [1, 2, 3, 4, 6], SamplingParams(**GREEDY))
    paths = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
    chains = [list(chain) for chain in source.draft_trees([(sequence, None, paths)])[0]]
    assert [len(chain) for chain in chains] == [3] * 5
    assert [len(batch.context_lens) for batch in runtime.batches] == [1, 2, 4]

    def best(drafts: list[int]) -> int:
        return draw([*sequence.token_ids, *drafts], (0.0, 0, 1.0, 0.0), 0, 0)[0]

    for path, chain in zip(paths, chains, strict=True):
        for place, rank in enumerate(path):
            assert (chain[place] == best(chain[:place])) == (rank == 0)
    assert len({tuple(chain) for chain in chains}) == 5
    assert chains[1][:2] == chains[0][:2] and chains[4][0] == chains[3][0]


def test_a_draft_model_finds_prompts_of_others() -> None:
    """The second of two requests with one beginning; answers do not change, nor blocks leak."""
    source = fake_draft_source(60)
    engine = fake_engine(60, drafter=Speculator(source, 3, adaptive=False))
    params = SamplingParams(**GREEDY, max_tokens=9)
    prompt = [(7 * j) % 60 for j in range(21)]
    for name, more in (("a", [3]), ("b", [4]), ("again", [3])):
        engine.add_request(name, [*prompt, *more], params)
        check_answers(run_to_end(engine)[name], params)
    runtime: Any = source.loaded.runtime
    assert source.num_cached_tokens >= 2 * 20
    assert runtime.num_tokens_computed < 3 * 22 + 3 * 12 - source.num_cached_tokens + 12
    assert engine.stats().num_accepted_tokens == engine.stats().num_draft_tokens
    source.begin_step([])
    source.blocks.check_integrity()
    assert source.blocks.num_free_blocks == 60


# ---- how many ----


def costs_of(slope: float) -> StepCosts:
    costs = StepCosts()
    for num_tokens in range(1, 40):
        costs.observe(num_tokens, 1.0 + slope * num_tokens)
    return costs


def test_branches_are_chosen_for_the_most_tokens_a_second() -> None:
    """Beside trying all subsets."""
    rng = random.Random(2)
    for _ in range(50):
        offers = [(rng.random(), rng.randrange(2, 6)) for _ in range(5)]
        costs, expected = costs_of(rng.choice([0.01, 0.1, 0.5])), 1 + 2 * rng.random()

        def speed(
            chosen: Any, costs: Any = costs, expected: Any = expected, o: Any = offers
        ) -> Any:
            tokens = expected + sum(o[i][0] for i in chosen)
            return tokens / costs.seconds(3 + sum(o[i][1] for i in chosen))

        chosen = choose_branches(offers, expected, 3, costs, least_gain=1.0)
        every = [set(c) for n in range(6) for c in itertools.combinations(range(5), n)]
        # Rows are taken by what they bring; a better fit of whole chains is rarely missed.
        assert speed(chosen) >= 0.97 * max(map(speed, every))
    assert choose_branches([(0.5, 3)], 1.0, 1, costs_of(0.01)) == {0}
    assert choose_branches([(0.5, 3)], 1.0, 1, costs_of(1.0)) == set()


class Pair(DraftSource):
    """A draft is right with one probability, and else the second guess with another."""

    is_free, num_places = True, 3

    def __init__(self, first: float, second: float) -> None:
        self.rng, self.first, self.second = random.Random(7), first, second

    def draft(self, wanted: Any) -> Any:
        return [self._chain(count) for _, _, count in wanted]

    def _chain(self, count: int) -> list[int]:
        return [int(self.rng.random() < self.first) for _ in range(count)]

    def draft_trees(self, wanted: Any) -> Any:
        trees = []
        for _, _, paths in wanted:
            chains = [self._chain(len(paths[0]))]
            for path in paths[1:]:
                place = next(i for i, rank in enumerate(path) if rank)
                is_right = not chains[0][place] and self.rng.random() < self.second
                rest = self._chain(len(path) - place - 1)
                chains.append([*chains[0][:place], 1 if is_right else 2, *rest])
            trees.append(chains)
        return trees


def simulate(first: float, second: float, slope: float, num_branches: int) -> tuple[float, Any]:
    """Plain seconds over drafted seconds, of one sequence."""
    drafter = Speculator(Pair(first, second), 3, num_branches=num_branches, clock=lambda: 0.0)
    engine_sequence = Sequence(0, [3, 4], SamplingParams(max_tokens=10**6))
    total = plain = 0.0
    for number in range(900):
        engine_sequence.num_computed_tokens = engine_sequence.num_tokens - 1
        step = branches.ScheduleBuilder(number, 512, 0.0, 512, branch_budget=16)
        drafter.begin_step([engine_sequence], step)
        drafts = tuple(drafter.propose(engine_sequence))
        step.add(engine_sequence, 1, 1, drafts)
        if drafts:
            blocks: Any = Freely()
            chains = drafter.branches(engine_sequence)
            branches.Branches(blocks, DraftCounts()).add(step, chains, 99, 0)
        schedule = step.build(1)
        seconds = 1.0 + slope * schedule.num_tokens
        output: Any = type("Output", (), {"token_ids": np.ones(len(schedule.row_sequences), int)})
        drafter.end_step(schedule, output, seconds)
        accepted = judge(schedule, output.token_ids.tolist())[0].num_accepted
        engine_sequence.token_ids += [1] * (accepted + 1)
        total += seconds
        plain += (1.0 + slope) * (accepted + 1)
    return plain / total, drafter


class Freely:
    """Blocks without end."""

    def branch(self, *_: Any) -> list[Any]:
        return []


def test_branches_pay_where_second_guesses_are_good_and_are_left_out_elsewhere() -> None:
    chain, _ = simulate(0.5, 0.6, 0.01, 1)
    tree, drafter = simulate(0.5, 0.6, 0.01, 4)
    assert tree > 1.1 * chain
    assert 0.45 < drafter.second_rates[0] < 0.75
    # Bad second guesses, or dear rows: as fast as chains, but for the time to find out.
    for first, second, slope in ((0.5, 0.0, 0.05), (0.5, 0.6, 0.7), (0.1, 0.1, 0.2)):
        chain, _ = simulate(first, second, slope, 1)
        tree, _ = simulate(first, second, slope, 4)
        assert tree > 0.97 * min(chain, 1.0) and tree > 0.95 * chain
