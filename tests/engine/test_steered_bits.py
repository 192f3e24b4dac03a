"""DRY, bad words, allowed tokens: the same answers beside drafts, preempted, after prefix hits."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from invariance_helpers import (
    GREEDY,
    SAMPLED,
    VOCAB,
    alone,
    facts,
    make_engine,
    others,
    run,
    run_preempted,
    subjects,
)
from speculation_helpers import ngram_drafting

from octavo.sampling_params import SamplingParams

FEW = (3, 5, 17, 40, 41, 200)  # so few that words come, and texts are repeated
WORDS = [[5, 17], [40, 3, 40], [200]]
DRY = {"dry_multiplier": 2.0, "dry_allowed_length": 1}
WAYS: dict[str, SamplingParams] = {
    "DRY": replace(GREEDY, **DRY),  # type: ignore[arg-type]
    "bad words": replace(SAMPLED, bad_words=("x",), allowed_token_ids=FEW),
    "allowed tokens": replace(SAMPLED, allowed_token_ids=FEW),
    "all": replace(SAMPLED, bad_words=("x",), allowed_token_ids=FEW, **DRY),  # type: ignore[arg-type]
}


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of the bad word, which this model without a tokenizer cannot make."""
    made = lambda words, tokenizer: WORDS if words else []  # noqa: E731
    monkeypatch.setattr("octavo.engine.engine.tokens_of_words", made)


@cache
def plain(name: str) -> dict[str, Any]:
    """Each answer by itself, without drafts."""
    return facts(run(make_engine(enable_prefix_caching=False), subjects(WAYS[name]), apart=True))


def has_word(answer: tuple[int, ...]) -> bool:
    return any(
        list(answer[i : i + len(word)]) == word for word in WORDS for i in range(len(answer))
    )


def test_each_of_them_does_something() -> None:
    answers = {name: [a[0][0] for a in plain(name).values()] for name in WAYS}
    assert answers["DRY"] != [a[0][0] for a in alone("f32", "greedy").values()]
    assert all(set(answer) <= set(FEW) for answer in answers["allowed tokens"])
    assert any(map(has_word, answers["allowed tokens"]))
    assert not any(map(has_word, answers["bad words"] + answers["all"]))
    assert answers["all"] != answers["bad words"]
    assert max(FEW) < VOCAB


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("overlap", [False, True])
def test_bits(name: str, overlap: bool) -> None:
    expected = plain(name)
    drafter = ngram_drafting(1, 4, adaptive=False)
    engine = make_engine(max_num_batched_tokens=61, overlap_steps=overlap, drafter=drafter)
    assert facts(run(engine, {**others(9), **subjects(WAYS[name])})) == expected
    again = run(engine, subjects(WAYS[name]), apart=True)
    assert facts(again) == expected
    assert sum(output.metrics.num_cached_tokens for output in again.values()) > 300
    stats = engine.stats()
    assert stats.num_draft_tokens > stats.num_accepted_tokens > 0
    small = make_engine(max_num_seqs=1, num_blocks=33, overlap_steps=overlap, drafter=drafter)
    found = run_preempted(small, "subject77", subjects(WAYS[name])["subject77"], (4, 8))
    assert facts(found)["subject77"] == expected["subject77"]
    assert found["subject77"].metrics.num_preemptions == 2
