"""Trees of drafts without a model: their shapes, what a step makes of them, whose blocks stay."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
from engine_helpers import FakeDrafter, check_answers, fake_engine, fake_future, run_to_end
from fake_runtime import draw
from invariance_helpers import crowd
from speculation_helpers import fake_draft_source

from octavo.draft_tree import leaves, most_probable, num_nodes, read_tree, second_guesses
from octavo.engine import branches, scheduler
from octavo.engine.block_manager import BlockManager
from octavo.engine.block_pool import IntegrityError
from octavo.engine.branches import Judged, judge, num_shared
from octavo.engine.engine import Engine
from octavo.engine.request import Sequence, SequenceState
from octavo.engine.schedule import Schedule, ScheduledSequence
from octavo.errors import InvalidArgumentError
from octavo.sampling_params import SamplingParams
from octavo.speculation.costs import StepCosts, choose_branches
from octavo.speculation.ngram import NgramIndex, NgramSource
from octavo.speculation.source import DraftSource
from octavo.speculation.speculator import Speculator
from octavo.speculative_config import SpeculativeConfig

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
ROOMY: dict[str, Any] = {"max_num_seqs": 9, "num_spare_seqs": 20, "max_num_batched_tokens": 64}

# ---- shapes ----


def test_a_tree_is_read_from_its_nodes() -> None:
    chains = read_tree("[(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]", 5)
    assert chains == ((0, 0, 0), (0, 1), (1, 0))
    assert read_tree([[1], [0]], 5) == ((0,), (1,))
    assert num_nodes(chains) == 6
    assert leaves([(0,), (0, 1), (0, 0), (1,)]) == ((0, 0), (0, 1), (1,))
    assert second_guesses(3, 4, 8) == [(0, 0, 1), (0, 1, 0), (1, 0, 0), (2, 0, 0)]
    assert second_guesses(3, 2, 1) == [(1, 0, 0), (2, 0, 0)]
    assert second_guesses(3, 5, 0) == []


WRONG_TREES = {
    "[(0,), (0, 0": "expected the nodes of a tree",
    "[]": "expected the nodes of a tree",
    "7": "expected the nodes of a tree",
    "[(0,), ()]": "expected the nodes of a tree",
    "[(0,), (0, 0, 0, 0)]": "at most 3 ranks long",
    "[(0,), (8,)]": "ranks from 0 to 7, not 8",
    "[(0,), (True,)]": "ranks from 0 to 7, not True",
    "[(0,), (0, 0, 0)]": r"expected \(0, 0\), too, without which there is no \(0, 0, 0\)",
    "[(0,), (2,)]": r"expected \(1,\), too, without which there is no \(2,\)",
    "[(1,), (2,)]": r"expected \(0,\), too",
}


@pytest.mark.parametrize("given", WRONG_TREES)
def test_what_is_no_tree_is_named(given: str) -> None:
    with pytest.raises(InvalidArgumentError, match=WRONG_TREES[given]):
        read_tree(given, 3)


def test_the_option_names_what_does_not_go_together() -> None:
    tree = [[0], [1], [0, 0]]
    config = SpeculativeConfig(model="m", speculative_token_tree=tree)
    assert (config.num_speculative_tokens, config.depth, config.most_chains) == (3, 2, 2)
    assert SpeculativeConfig("ngram", num_branches=4).most_chains == 4
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"method": "ngram", "speculative_token_tree": tree}, "ask for num_branches"),
        ({"model": "m", "speculative_token_tree": tree, "num_branches": 2}, "leave one of them"),
        (
            {"model": "m", "speculative_token_tree": tree, "num_speculative_tokens": 5},
            "is 5; expected 3, the nodes",
        ),
        ({"model": "m", "speculative_token_tree": [[0], [2]]}, "without which there is no"),
        ({"model": "m", "num_branches": 0}, "num_branches is 0; expected an integer from 1 to 16"),
        ({"model": "m", "num_branches": 17}, "from 1 to 16"),
    ]
    for given, message in wrong:
        with pytest.raises(InvalidArgumentError, match=message):
            SpeculativeConfig(**given)
    many = [[i] for i in range(8)] + [[i, j] for i in range(8) for j in range(3)]
    with pytest.raises(InvalidArgumentError, match="at most 16 leaves, not 24"):
        SpeculativeConfig(model="m", speculative_token_tree=many)


def test_the_most_probable_products() -> None:
    """Beside all nodes, sorted: where the number of chains does not bind, they are the same."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        chances = -np.sort(-rng.dirichlet(np.ones(4), 3), axis=1)
        every = [
            (float(np.prod([chances[i, r] for i, r in enumerate(node)])), node)
            for length in (1, 2, 3)
            for node in itertools.product(range(4), repeat=length)
        ]
        best = [node for _, node in sorted(every, reverse=True)[:12]]
        assert most_probable(chances.tolist(), 99, 12) == leaves(best)
        few = most_probable(chances.tolist(), 3, 12)
        assert len(few) == 3 and few[0][0] == 0


# ---- what a step makes of them ----


def judged_by_search(tree: list[tuple[int, ...]], truth: dict[Any, int]) -> tuple[int, list[int]]:
    """The chain that is right for longest, and the tokens: by following the truth."""
    best = max(range(len(tree)), key=lambda i: (right(tree[i], truth), -i))
    length = right(tree[best], truth)
    return best, [truth[tree[best][:place]] for place in range(length + 1)]


def right(chain: tuple[int, ...], truth: dict[Any, int]) -> int:
    length = 0
    while length < len(chain) and truth[chain[:length]] == chain[length]:
        length += 1
    return length


@pytest.mark.parametrize("in_order", [True, False])
def test_the_longest_right_chain_is_found(in_order: bool) -> None:
    """Of random trees over two letters, several sequences in a step, in any order of chains."""
    rng = random.Random(8)
    for _ in range(200):
        entries, sampled, expected = [], [], []
        for number in range(rng.randrange(1, 4)):
            sequence = Sequence(number, [1, 2, 3], SamplingParams())
            chains = {
                tuple(rng.randrange(2) for _ in range(rng.randrange(1, 5)))
                for _ in range(rng.randrange(1, 5))
            }
            tree = list(leaves(chains)) if in_order else sorted(chains, key=hash)
            truth = {c[:n]: rng.randrange(2) for c in tree for n in range(len(c) + 1)}
            kept, before = [], tuple[int, ...]()
            for chain in tree:
                shared = num_shared(before, chain)
                if kept and shared == len(chain):
                    continue
                first = shared + 1 if kept else 0
                entries.append(
                    ScheduledSequence(
                        *(sequence, 2, len(chain) + 1, len(chain) + 1 - first, chain),
                        branch=("b", len(kept)) if kept else None,
                    )
                )
                sampled += [truth[chain[:place]] for place in range(first, len(chain) + 1)]
                kept.append(chain)
                before = chain
            best, tokens = judged_by_search(kept, truth)
            expected.append((len(entries) - len(kept) + best, tokens))
        found = judge(Schedule(tuple(entries)), sampled)
        assert [(j.entry, [sampled[row] for row in j.rows]) for j in found] == expected
        assert [j.num_accepted for j in found] == [len(tokens) - 1 for _, tokens in expected]
        every = [row for j in found for row in (*j.rows, *j.other_rows)]
        assert sorted(every) == list(range(len(sampled)))
        assert all(j.rows == sorted(j.rows) for j in found)


def engine_with_branches(num_blocks: int = 60, share: float = 0.5, **options: Any) -> Engine:
    drafter = FakeDrafter(fake_future, 5, share, num_branches=4)
    return fake_engine(num_blocks, drafter=drafter, **{**ROOMY, **options})


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("num_blocks", "windows"), [(13, (0,)), (200, (0,)), (90, (0, 6, 1)), (36, (0, 9))]
)
def test_a_crowd(num_blocks: int, windows: tuple[int, ...], overlap: bool) -> None:
    engine = engine_with_branches(num_blocks, kv_windows=windows, overlap_steps=overlap)
    crowd(engine)
    stats = engine.stats()
    assert engine.blocks.num_free_blocks == num_blocks
    assert stats.num_draft_branches > 60 and stats.num_draft_branch_wins > 15
    assert stats.num_accepted_tokens < stats.num_draft_tokens
    if num_blocks == 13:
        assert stats.num_preemptions > 0
    if num_blocks == 200:
        assert engine.runtime.num_copies > 100  # type: ignore[attr-defined]


def test_branches_save_steps() -> None:
    params = SamplingParams(**GREEDY, max_tokens=40)
    steps = []
    for num_branches in (0, 4):
        drafter = FakeDrafter(fake_future, 5, 0.5, num_branches=num_branches)
        engine = fake_engine(60, drafter=drafter, max_num_seqs=8)
        engine.add_request("a", [1, 2, 3], params)
        check_answers(run_to_end(engine)["a"], params)
        steps.append(engine.num_steps)
    assert steps[1] < 0.8 * steps[0]


def test_a_failed_step_gives_branches_back() -> None:
    params = SamplingParams(temperature=1.0, seed=3, ignore_eos=True, max_tokens=30, n=3)
    for overlap in (False, True):
        engine = engine_with_branches(overlap_steps=overlap)
        engine.add_request("a", [1, 2, 3, 4, 5], params)
        for when in ("fail_next", "fail_wait", "fail_next", "fail_wait"):
            engine.step()
            setattr(engine.runtime, when, RuntimeError("out of luck"))
            with pytest.raises(RuntimeError, match="out of luck"):
                engine.step()
            engine.check_integrity()
        check_answers(run_to_end(engine)["a"], params)
        assert engine.blocks.num_free_blocks == 60


@pytest.mark.parametrize("how", ["finish", "preempt", "rollback"])
def test_what_ends_with_branches_in_flight_gives_all_back(how: str) -> None:
    """Their blocks are freed when the step ends, or is undone; others go on."""
    engine = engine_with_branches()
    params = SamplingParams(**GREEDY, max_tokens=30)
    engine.add_request("a", [1, 2, 3], params)
    engine.add_request("b", [4, 2, 3], params)
    books = engine.scheduler
    for _ in range(20):
        engine.step()
        schedule = books.schedule()
        books.advance(schedule)
        if len(books._branches) > 2:
            break
        books.rollback(schedule)
    first = schedule.entries[0].sequence
    before = engine.blocks.num_free_blocks
    if how == "rollback":
        books.rollback(schedule)
    else:
        if how == "finish":
            engine.abort("a")
        else:
            books._preempt(first, "kv_blocks", first, 0.0)
        engine.check_integrity()
        tokens = [7] * len(schedule.row_sequences)
        rejected = books.complete(schedule, tokens)
        assert len(rejected) < len(tokens)
        for row, sequence in enumerate(schedule.row_sequences):
            if row not in rejected and sequence.state is not SequenceState.FINISHED:
                sequence.token_ids.append(draw(sequence.token_ids, (0.0, 0, 1.0, 0.0), 0, 0)[0])
    assert not books._branches and engine.blocks.num_free_blocks > before
    engine.check_integrity()
    engine.abort("a")
    engine.abort("b")
    assert engine.blocks.num_free_blocks == 60


def test_branches_leave_tokens_rows_places_and_blocks_to_others() -> None:
    params = SamplingParams(**GREEDY, max_tokens=40)
    for options in (
        {"max_num_seqs": 2, "num_spare_seqs": 0},  # two sequences fill a step
        {"max_num_batched_tokens": 9},
        {"num_blocks": 12, "max_num_seqs": 2},
    ):
        engine = engine_with_branches(**{"num_blocks": 60, **options})
        for name in "ab":
            engine.add_request(name, [ord(name) % 50, 2, 3], params)
        outputs = run_to_end(engine)
        for output in outputs.values():
            check_answers(output, params)
        if "num_blocks" not in options:
            stats = engine.stats()
            assert stats.num_preemptions == 0
            assert (stats.num_draft_branches > 5) == (options.get("num_spare_seqs") != 0)


def test_planted_errors_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loser's table kept, a copy forgotten, the second-best chain, a leaked branch."""

    errors = (AssertionError, IntegrityError)

    def run() -> None:
        crowd(engine_with_branches(60))

    run()
    real_judge, real_branch = branches.judge, BlockManager.branch
    real_free = BlockManager.free

    def late(schedule: Schedule, token_ids: Any) -> list[Judged]:
        """The right tokens, and the table of the first chain."""
        first = [i for i, entry in enumerate(schedule.entries) if entry.branch is None]
        found = real_judge(schedule, token_ids)
        return [j._replace(entry=index) for j, index in zip(found, first, strict=True)]

    def no_copies(self: BlockManager, *arguments: Any) -> Any:
        found = real_branch(self, *arguments)
        return None if found is None else []

    def lose(self: BlockManager, key: Any, **options: Any) -> None:
        if not isinstance(key, branches.BranchKey):
            real_free(self, key, **options)

    with monkeypatch.context() as patch, pytest.raises(errors):
        patch.setattr(scheduler, "judge", late)
        run()
    with monkeypatch.context() as patch, pytest.raises(errors):
        patch.setattr(BlockManager, "branch", no_copies)
        run()
    with monkeypatch.context() as patch, pytest.raises(errors):
        patch.setattr(BlockManager, "free", lose)
        run()


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
    assert source.num_batches == 3 and max(len(b.context_lens) for b in runtime.batches) == 4

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
            branches.add_branches(step, blocks, engine_sequence, chains, 99, 0)
        schedule = step.schedule(1)
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
