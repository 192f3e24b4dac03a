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
        if len(books.branches.keys) > 2:
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
    assert not books.branches.keys and engine.blocks.num_free_blocks > before
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
