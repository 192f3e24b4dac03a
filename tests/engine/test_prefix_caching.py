"""Shared beginnings: the same bits as without, less work, and nothing shared by mistake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from engine_helpers import check_answers, fake_engine, run_to_end
from fake_runtime import FakeRuntime
from invariance_helpers import (
    MODES,
    SYSTEM,
    alone,
    crowd,
    facts,
    make_engine,
    prompt_of,
    run,
    subjects,
)

from octavo.engine.engine import Engine
from octavo.engine.outputs import RequestOutput
from octavo.engine.prefix_cache import extend_block_hashes
from octavo.sampling_params import SamplingParams

PARAMS = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=9, logprobs=2)


def ask(engine: Engine, name: str, prompt: list[int], **options: Any) -> RequestOutput:
    """One request by itself; its answer is checked."""
    params = options.pop("params", PARAMS)
    engine.add_request(name, prompt, params, **options)
    output = run_to_end(engine)[name]
    check_answers(output, params)
    return output


def fake_runtime(engine: Engine) -> FakeRuntime:
    assert isinstance(engine.runtime, FakeRuntime)
    return engine.runtime


@pytest.mark.parametrize(
    ("second", "num_cached"),
    [
        ([*SYSTEM, 3, 1], 16),
        ([*SYSTEM[:16], 8], 16),
        (SYSTEM[:16], 15),  # all of it is known: the last token is computed for its logits
        (SYSTEM[:8], 7),
        ([*SYSTEM[:15], 95], 12),
        ([95, *SYSTEM[1:]], 0),
        (SYSTEM[:3], 0),  # less than a block
    ],
)
def test_what_was_computed_is_not_computed_again(second: list[int], num_cached: int) -> None:
    engine = fake_engine()
    assert ask(engine, "first", [*SYSTEM, 90, 91]).metrics.num_cached_tokens == 0
    before = fake_runtime(engine).num_tokens_computed
    output = ask(engine, "second", second)
    assert output.metrics.num_cached_tokens == num_cached
    num_computed = fake_runtime(engine).num_tokens_computed - before
    assert num_computed == len(second) - num_cached + PARAMS.max_tokens - 1
    assert engine.scheduler.prefix_cache.num_hits == num_cached
    assert engine.scheduler.prefix_cache.num_queries == len(SYSTEM) + 2 + len(second)


def test_an_answer_is_found_again_by_the_next_turn() -> None:
    engine = fake_engine()
    answer = ask(engine, "turn 1", SYSTEM).outputs[0].token_ids
    output = ask(engine, "turn 2", [*SYSTEM, *answer, 50, 51])
    # 17 + 9 tokens, the last of which was drawn and never computed.
    assert output.metrics.num_cached_tokens == 24


def test_it_can_be_switched_off() -> None:
    engine = fake_engine(enable_prefix_caching=False)
    for name in ("first", "second"):
        assert ask(engine, name, SYSTEM).metrics.num_cached_tokens == 0
    assert engine.blocks.pool.num_cached == 0


def test_a_salt_keeps_tenants_apart() -> None:
    engine = fake_engine()
    found = {}
    for name, salt in [("a", "x"), ("b", "y"), ("c", None), ("d", "x"), ("e", None), ("f", "")]:
        output = ask(engine, name, SYSTEM, cache_salt=salt)
        found[name] = output.metrics.num_cached_tokens
    assert found == {"a": 0, "b": 0, "c": 0, "d": 16, "e": 16, "f": 0}


def test_several_answers_share_their_prompt() -> None:
    """Without looking anything up: also where prefix caching is off."""
    params = SamplingParams(temperature=1.0, seed=5, n=4, max_tokens=6, ignore_eos=True)
    for caching in (True, False):
        for prompt in (SYSTEM, SYSTEM[:16], SYSTEM[:13], SYSTEM[:1]):
            engine = fake_engine(enable_prefix_caching=caching)
            output = ask(engine, "four", prompt, params=params)
            assert len({answer.token_ids for answer in output.outputs}) == 4
            # The prompt once, its last token for each of the three others, and the answers.
            num_computed = len(prompt) + 3 + 4 * 5
            assert fake_runtime(engine).num_tokens_computed == num_computed
            assert fake_runtime(engine).num_copies == (0 if len(prompt) % 4 == 1 else 3)
            assert output.metrics.num_cached_tokens == 0


def test_answers_that_share_survive_a_tiny_cache() -> None:
    params = SamplingParams(temperature=1.0, seed=5, n=5, max_tokens=20, ignore_eos=True)
    for caching in (True, False):
        engine = fake_engine(num_blocks=10, enable_prefix_caching=caching)
        output = ask(engine, "five", SYSTEM, params=params)
        assert output.metrics.num_preemptions > 0


def test_the_whole_cache_can_be_one_known_prompt() -> None:
    """A prompt that fills the cache, known to its end, still finds room for its last token."""
    engine = fake_engine(num_blocks=8)
    prompt = [(5 * i) % 90 for i in range(32)]
    one = SamplingParams(temperature=0.0, max_tokens=1)
    assert ask(engine, "first", prompt, params=one).metrics.num_cached_tokens == 0
    assert ask(engine, "second", prompt, params=one).metrics.num_cached_tokens == 31


@pytest.mark.parametrize("overlap", [False, True])
def test_of_requests_that_come_together_one_computes_the_beginning(overlap: bool) -> None:
    engine = fake_engine(
        num_blocks=80, max_num_seqs=10, max_num_batched_tokens=200, overlap_steps=overlap
    )
    stranger = [(3 * i + 7) % 90 for i in range(9)]
    for i in range(6):
        engine.add_request(f"{i}", [*SYSTEM, 20 + i, 30], PARAMS)
    engine.add_request("stranger", stranger, PARAMS)
    engine.step()  # the first, and the stranger, who need not wait for them
    assert {key[0] for key in engine.blocks.holders()} >= {"0", "stranger"}
    outputs = run_to_end(engine)
    for output in outputs.values():
        check_answers(output, PARAMS)
    cached = [outputs[f"{i}"].metrics.num_cached_tokens for i in range(6)]
    assert cached == [0, 16, 16, 16, 16, 16]
    num_decoded = 7 * (PARAMS.max_tokens - 1)
    assert fake_runtime(engine).num_tokens_computed == 19 + 5 * 3 + 9 + num_decoded


def test_who_waits_for_a_beginning_does_not_wait_for_ever() -> None:
    """The one who computes it is aborted in its midst: the next one goes on with it."""
    engine = fake_engine(num_blocks=40, max_num_batched_tokens=5)
    for name in ("gone", "next", "last"):
        engine.add_request(name, [*SYSTEM, 1], PARAMS)
    for _ in range(2):
        engine.step()
    assert engine.scheduler.num_running == 1
    assert engine.scheduler.waiting_reason in ("prefix", "token_budget")
    engine.abort("gone")
    outputs = run_to_end(engine)
    assert [outputs[name].metrics.num_cached_tokens for name in ("next", "last")] == [8, 16]
    for output in outputs.values():
        check_answers(output, PARAMS)


def test_a_failed_request_leaves_nothing_behind() -> None:
    from engine_helpers import NAN_TOKEN

    engine = fake_engine()
    engine.add_request("bad", [*SYSTEM, NAN_TOKEN], PARAMS)
    assert run_to_end(engine)["bad"].error is not None
    assert engine.blocks.pool.num_cached == 0


@pytest.mark.parametrize("num_blocks", [12, 20, 200])
@pytest.mark.parametrize("caching", [True, False])
def test_a_crowd_with_common_beginnings(num_blocks: int, caching: bool) -> None:
    engine = fake_engine(
        num_blocks, max_num_seqs=7, max_num_batched_tokens=23, enable_prefix_caching=caching
    )
    crowd(engine)
    assert (engine.scheduler.prefix_cache.num_hits > 100) == caching
    assert engine.blocks.num_free_blocks == num_blocks


def test_kv_groups_have_tables_and_copies_of_their_own() -> None:
    engine = fake_engine(48, (0, 0), max_num_seqs=7, max_num_batched_tokens=23)
    crowd(engine)
    assert engine.runtime.num_copies > 4  # type: ignore[attr-defined]
    assert engine.blocks.num_free_blocks == 48


def _unchained(hashes: Any, tokens: Any, size: int, *salts: Any) -> None:
    for start in range(len(hashes) * size, len(tokens) - size + 1, size):
        extend_block_hashes(found := [], tokens[start : start + size], size, *salts)
        hashes += found


PLANTED: dict[str, tuple[str, Callable[..., Any]]] = {
    "names say nothing of what came before": (
        "octavo.engine.prefix_cache.extend_block_hashes",
        _unchained,
    ),
    "what must be copied is not": (
        "fake_runtime.FakeRuntime.copy_blocks",
        lambda runtime, group, pairs: None,
    ),
    "a block bears the name of the one before it": (
        "octavo.engine.block_manager.BlockManager.publish",
        lambda blocks, key, index, name: blocks.pool.publish(
            blocks.block_table(key)[index - 1], name
        ),
    ),
    "an evicted block keeps its name": (
        "octavo.engine.block_pool.BlockPool._forget",
        lambda pool, block: None,
    ),
    "a block is free while others hold it": (
        "octavo.engine.block_pool.BlockPool.hold",
        lambda pool, block: pool._cached.pop(block, None),
    ),
}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found_by_the_answers(
    error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The books are not looked at: the fake runtime reads back what is really stored."""
    engine = fake_engine(20, max_num_seqs=7, max_num_batched_tokens=23)
    monkeypatch.setattr(engine, "check_integrity", lambda: None)
    monkeypatch.setattr(*PLANTED[error])
    with pytest.raises((AssertionError, RuntimeError)):
        crowd(engine)


# ---- with real arithmetic: exact equality of tokens and float32 log-probabilities ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("chunk", [29, 512])
def test_a_hit_gives_the_bits_of_a_miss(dtype: str, mode: str, chunk: int) -> None:
    engine = make_engine(dtype, max_num_batched_tokens=chunk)
    params = MODES[mode]
    expected = alone(dtype, mode)
    for length in (77, 301):
        prompt = prompt_of(length, seed=length)
        for kept in (length, length - length % 16, 33, 16):
            # Somebody else with the same beginning comes first, and leaves.
            run(engine, {"before": ([*prompt[:kept], 7, 7, 7], params)})
            found = run(engine, {f"subject{length}": (prompt, params)})
            assert found[f"subject{length}"].metrics.num_cached_tokens >= kept // 16 * 16
            assert facts(found)[f"subject{length}"] == expected[f"subject{length}"]
    again = run(engine, subjects(params))
    assert facts(again) == expected
    assert again["subject301"].metrics.num_cached_tokens == 288


def test_a_prompt_known_to_its_end_gives_the_same_bits() -> None:
    """A multiple of the block size: its last token is computed in a copied block."""
    prompt = prompt_of(96, seed=96)
    params = MODES["sampled"]
    first = make_engine()
    expected = facts(run(first, {"subject": (prompt, params)}))
    assert facts(run(first, {"subject": (prompt, params)})) == expected  # nobody else holds it
    first.add_request("subject", prompt, params)
    first.step()  # it holds its last block while the next one comes
    both = run(first, {"subject2": (prompt, params)})
    found = facts(both)
    assert found["subject"] == found["subject2"] == expected["subject"]
    assert [output.metrics.num_cached_tokens for output in both.values()] == [95, 95]


def test_answers_of_one_request_give_the_bits_of_their_own() -> None:
    """Each of four answers equals the one of a request whose prompt nobody shares."""
    engine = make_engine()
    prompt = prompt_of(77, seed=77)
    several = SamplingParams(temperature=0.9, seed=8, max_tokens=24, logprobs=1, n=4)
    together = facts(run(engine, {"subject": (prompt, several)}))["subject"]
    shared = make_engine(enable_prefix_caching=False)
    assert facts(run(shared, {"subject": (prompt, several)}))["subject"] == together
    # Preempted in a cache that is too small for all of them.
    tight = run(
        make_engine(num_blocks=32),
        {"crowd": (prompt_of(240, 3), MODES["greedy"])} | {"subject": (prompt, several)},
    )
    assert facts(tight)["subject"] == together
    assert np.unique([answer[0][-1] for answer in together]).size > 1
