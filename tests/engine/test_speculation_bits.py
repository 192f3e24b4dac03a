"""Speculation on the native core: the same answers to the bit, from every source of drafts.

OCTAVO_TEST_EXPLORE asks for a thousand prompts in place of some.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from typing import Any

import pytest
from invariance_helpers import (
    MODES,
    VOCAB,
    WINDOWED,
    alone,
    facts,
    first_layers,
    make_engine,
    others,
    prompt_of,
    run,
    subjects,
)

from octavo.draft_tree import read_tree
from octavo.engine.engine import Engine
from octavo.sampling_params import SamplingParams
from octavo.speculation.ngram import NgramSource
from octavo.speculation.speculator import Speculator

NUM_PROMPTS = 1000 if os.environ.get("OCTAVO_TEST_EXPLORE") else 60


SOURCES = {
    "ngram": lambda: NgramSource(1, 3),
    "itself": lambda: first_layers(None),
    "layers": lambda: first_layers(4),
}
TREE = read_tree([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 1, 0]], 5)
ROOM: dict[str, Any] = {"num_spare_seqs": 16, "max_num_seqs": 8}


def drafting(
    source: str, depth: int = 5, adaptive: bool = False, num_branches: int = 1, tree: Any = ()
) -> Speculator:
    return Speculator(
        SOURCES[source](), depth, adaptive=adaptive, num_branches=num_branches, tree=tree
    )


def branching(source: str, adaptive: bool = False) -> Speculator:
    """With trees: of a given shape, or of several occurrences."""
    if source == "ngram":
        return drafting(source, 5, adaptive, num_branches=4)
    return drafting(source, 3, adaptive, tree=TREE)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("chunk", [29, 512])
def test_bits_among_others(source: str, mode: str, overlap: bool, chunk: int) -> None:
    """Beside 17 others, in chunks, with steps that overlap."""
    engine = make_engine(
        max_num_batched_tokens=chunk, overlap_steps=overlap, drafter=drafting(source)
    )
    assert facts(run(engine, {**others(), **subjects(MODES[mode])})) == alone("f32", mode)
    assert engine.stats().num_draft_tokens > 50
    if source == "itself":
        assert engine.stats().num_accepted_tokens > 0.9 * engine.stats().num_draft_tokens


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("overlap", [False, True])
def test_bits_with_trees(source: str, overlap: bool) -> None:
    """Chains of a sequence side by side in a step, greedy and sampled, among others, in chunks."""
    engine = make_engine(
        max_num_batched_tokens=64, overlap_steps=overlap, drafter=branching(source), **ROOM
    )
    for mode in MODES:
        requests = {**others(9), **subjects(MODES[mode])}
        assert facts(run(engine, requests)) == alone("f32", mode)
    stats = engine.stats()
    assert stats.num_draft_branches > 20
    assert stats.num_draft_branch_wins > (0 if source == "layers" else -1)
    assert engine.blocks.num_free_blocks == engine.blocks.num_blocks
    engine.check_integrity()


def shared_beginnings(count: int, max_tokens: int) -> dict[str, tuple[list[int], SamplingParams]]:
    """Prompts that begin alike: every other one with three sampled answers, the others greedy."""
    several = SamplingParams(temperature=0.9, seed=8, max_tokens=60, logprobs=1, n=3)
    one = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=3, ignore_eos=True)
    return {
        f"subject{i}": (
            [*prompt_of(33, seed=1), *prompt_of(10 + i, seed=i)],
            several if i % 2 else one,
        )
        for i in range(count)
    }


@pytest.mark.parametrize("source", ["ngram", "layers"])
def test_bits_with_trees_windows_preemption_and_prefix_hits(source: str) -> None:
    """Tables of several KV groups are adopted; branches give way to sequences."""
    requests = shared_beginnings(4, max_tokens=110)
    expected = facts(run(make_engine(spec=WINDOWED), requests, apart=True))
    engine = make_engine(spec=WINDOWED, num_blocks=48, drafter=branching(source), **ROOM)
    assert facts(run(engine, requests)) == expected
    assert engine.scheduler.num_preemptions > 0
    stats = engine.stats()
    assert stats.num_prefix_hits > 0 and stats.num_draft_branches > 20


@pytest.mark.parametrize("source", ["ngram", "itself"])
def test_bits_with_windows_preemption_and_prefix_hits(source: str) -> None:
    """KV groups that let blocks go; a cache that is too small; beginnings that are cached."""
    requests = shared_beginnings(6, max_tokens=80)
    expected = facts(run(make_engine(spec=WINDOWED), requests, apart=True))
    engine = make_engine(spec=WINDOWED, num_blocks=60, drafter=drafting(source))
    outputs = run(engine, requests)
    assert facts(outputs) == expected
    assert engine.scheduler.num_preemptions > 0
    assert engine.stats().num_prefix_hits > 0
    assert engine.stats().num_drafts > 50


def quotation(rng: random.Random) -> list[int]:
    """A prompt that repeats parts of itself, as texts that are quoted do."""
    tokens = [rng.randrange(VOCAB - 1) for _ in range(rng.randrange(3, 40))]
    while len(tokens) < 60 and rng.random() < 0.7:
        start = rng.randrange(len(tokens))
        tokens += tokens[start : start + rng.randrange(1, 12)]
    return tokens


def thousand(count: int) -> dict[str, tuple[list[int], SamplingParams]]:
    """Prompts of all kinds; of three one is greedy, one is sampled, one has it all."""
    rng, requests = random.Random(6), {}
    for i in range(count):
        kinds: list[dict[str, Any]] = [
            {"temperature": 0.0, "logprobs": 1},
            {"temperature": 0.2 + rng.random(), "top_p": 0.9, "n": 1 + i % 2},
            {
                "temperature": rng.choice([0.0, 0.7]),
                "frequency_penalty": rng.choice([0.0, 0.0, 0.4]),
                "min_tokens": rng.randrange(9),
                "stop_token_ids": tuple(rng.sample(range(VOCAB), 9)),
                "logit_bias": ((rng.randrange(VOCAB), 1.5),),
            },
        ]
        params = SamplingParams(seed=i, max_tokens=rng.randrange(8, 60), **kinds[i % 3])
        requests[f"subject{i}"] = (quotation(rng), params)
    return requests


@pytest.mark.parametrize("source", SOURCES)
def test_a_thousand_prompts(source: str) -> None:
    """Greedy, sampled and steered answers, with log-probabilities: what drafts do is invisible."""
    requests = thousand(NUM_PROMPTS)
    expected = facts(run(make_engine(), requests))
    engine = make_engine(num_blocks=300, drafter=drafting(source, 7))
    assert facts(run(engine, requests)) == expected
    stats = engine.stats()
    assert stats.num_accepted_tokens > (2 if source == "layers" else 5) * NUM_PROMPTS / 10
    trees = make_engine(num_blocks=300, drafter=branching(source), **ROOM)
    assert facts(run(trees, requests)) == expected
    assert trees.stats().num_draft_branch_wins > (0 if source == "itself" else NUM_PROMPTS / 20)
    if source == "ngram":
        adaptive = make_engine(num_blocks=300, drafter=branching(source, adaptive=True), **ROOM)
        assert facts(run(adaptive, requests)) == expected


def test_planted_a_token_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong draft taken for right in a thousand prompts is seen."""
    requests = thousand(60)
    expected = facts(run(make_engine(), requests))
    from octavo.engine import branches

    def one_more(drafts: Any, sampled: Any) -> int:
        right = real(drafts, sampled)
        return min(right + 1, len(drafts))

    real = branches.num_agreeing
    monkeypatch.setattr(branches, "num_agreeing", one_more)
    engine = make_engine(num_blocks=300, drafter=drafting("ngram"))
    assert facts(run(engine, requests)) != expected


def test_a_drafted_answer_follows_its_seed() -> None:
    """The noise belongs to seed and position: drafts neither use it up nor replace it."""
    prompt = quotation(random.Random(2))
    params = SamplingParams(temperature=1.2, seed=3, max_tokens=40)

    def answer(engine: Engine, seed: int) -> Any:
        return facts(run(engine, {"subject": (prompt, replace(params, seed=seed))}))

    drafted = make_engine(drafter=drafting("itself"))
    assert answer(drafted, 3) == answer(make_engine(), 3) != answer(make_engine(), 4)
