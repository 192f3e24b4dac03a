"""Sequences that outgrow a length beyond which the rope has other frequencies (LongRoPE, dynamic).

The logits of a sequence are those of one forward pass over all of it: where it crosses the length,
all of its keys are computed anew, and blocks of short and long sequences are never mixed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from cuda_helpers import DEVICE, needs_cuda
from engine_helpers import FakeDrafter, fake_engine, fake_future, run_to_end
from invariance_helpers import (
    MODES,
    SPEC,
    VOCAB,
    crowd,
    facts,
    make_engine,
    others,
    prompt_of,
    run,
    run_preempted,
    weights,
)

from octavo.config import RuntimeOptions
from octavo.engine.engine import Engine
from octavo.engine.prefix_cache import extend_block_hashes
from octavo.errors import UnsupportedModelError
from octavo.models.rope import at_length, for_length, longrope
from octavo.models.spec import ModelSpec
from octavo.reference.llama import KVCache, ReferenceModel
from octavo.sampling_params import SamplingParams

SWITCH = 90
LENGTHS = {"below": 40, "crosses": 77, "at": 90, "beyond": 301}  # of prompts; answers have 24


def two_sets(spec: ModelSpec = SPEC) -> ModelSpec:
    """The same with a LongRoPE in all layers but the first, whose rope stays one."""

    def turned(rotated: int) -> Any:
        factors = [1 + 0.6 * i for i in range(rotated // 2)]
        return longrope(5000.0, rotated, [1.0] * len(factors), factors, SWITCH, 8.0, 1.1)

    first, *rest = spec.layers
    ropes = [turned(2 * len(layer.rope.frequencies)) if layer.rope else None for layer in rest]
    layers = [replace(layer, rope=rope) for layer, rope in zip(rest, ropes, strict=True)]
    return for_length(replace(spec, layers=(first, *layers)), 512)


LONG = two_sets()


def engine_of(dtype: Any = "f32", **options: Any) -> Engine:
    return make_engine(dtype, spec=LONG, rope_switch=SWITCH, **options)


def subjects(params: SamplingParams) -> dict[str, tuple[list[int], SamplingParams]]:
    """Prompts that begin alike, so that a wrong name of a block would be a hit."""
    prompt = prompt_of(max(LENGTHS.values()), seed=9)
    return {f"subject {name}": (prompt[:n], params) for name, n in LENGTHS.items()}


@cache
def alone(dtype: str, mode: str) -> dict[str, Any]:
    return facts(
        run(engine_of(dtype, enable_prefix_caching=False), subjects(MODES[mode]), apart=True)
    )


def check_against_forwards(engine: Engine, *names: str) -> None:
    """Each greedy token is the argmax of a forward pass over all before it."""
    requests = subjects(replace(MODES["greedy"], logprobs=None))
    requests = {f"subject {name}": requests[f"subject {name}"] for name in names}
    answers = run(engine, requests)
    model = ReferenceModel(LONG, weights(LONG))
    for name, (prompt, _) in requests.items():
        (answer,) = answers[name].outputs
        assert len(answer.token_ids) == 24
        # The crossing prompt's token 13 is the first of a long sequence.
        for count in {0, 1, 8, 12, 13, 14, 23} if name == "subject crosses" else {0, 23}:
            tokens = [*prompt, *answer.token_ids[:count]]
            logits = model.forward(tokens, logit_rows=[len(tokens) - 1])[0]
            best = logits.max()
            assert logits[answer.token_ids[count]] > best - 1e-3, (name, count)


def test_greedy_tokens_are_those_of_whole_forward_passes() -> None:
    engine = engine_of()
    check_against_forwards(engine, *LENGTHS)
    assert engine.stats().num_preemptions == 2  # "crosses" and "at", each once


@needs_cuda
def test_on_cuda() -> None:
    options = RuntimeOptions("f32", "f32", 16, 512, 8, 64, rope_switch=SWITCH, deterministic=True)
    from octavo import _native

    runtime = _native.Runtime(DEVICE, LONG, options)
    for name, array in weights(LONG).items():
        runtime.load(name, array, "f32")
    runtime.alloc_kv(100)
    engine = Engine(runtime, options, num_kv_blocks=100, vocab_size=VOCAB)
    check_against_forwards(engine, "below", "crosses")


@pytest.mark.parametrize("length", [SWITCH, SWITCH + 1, 200])
def test_the_reference_has_the_frequencies_of_the_length(length: int) -> None:
    tokens = prompt_of(length, seed=3)
    model = ReferenceModel(LONG, weights(LONG))
    plain = ReferenceModel(at_length(LONG, length), weights(LONG))
    expected = plain.forward(tokens)
    np.testing.assert_array_equal(model.forward(tokens), expected)
    cache = KVCache()
    parts = [
        model.forward(tokens[start : start + 64], cache, sequence_length=length)
        for start in range(0, length, 64)
    ]
    np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-4)
    if length == SWITCH:
        with pytest.raises(ValueError, match="at most 90 tokens"):
            model.forward([1], cache)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_neither_chunks_nor_company_change_a_bit(dtype: str, mode: str) -> None:
    for chunk in (1, 7, 64):
        found = run(engine_of(dtype, max_num_batched_tokens=chunk), subjects(MODES[mode]))
        assert facts(found) == alone(dtype, mode), chunk
    requests = {**others(), **subjects(MODES[mode])}
    for overlap in (False, True):
        engine = engine_of(dtype, max_num_batched_tokens=29, overlap_steps=overlap)
        assert facts(run(engine, requests)) == alone(dtype, mode)
        engine.check_integrity()


@pytest.mark.parametrize("caching", [True, False])
def test_preemption_changes_no_bit(caching: bool) -> None:
    """By urgent requests, before the length is crossed and after it."""
    for name, request in subjects(MODES["sampled"]).items():
        engine = engine_of(max_num_seqs=1, num_blocks=33, enable_prefix_caching=caching)
        outputs = run_preempted(engine, name, request, (6, 6, 6))
        crossings = name in ("subject crosses", "subject at")
        assert outputs[name].metrics.num_preemptions >= 3 + crossings
        assert facts(outputs)[name] == alone("f32", "sampled")[name]


def test_short_and_long_sequences_hit_their_own_blocks_only() -> None:
    engine = engine_of()
    subject = subjects(MODES["sampled"])
    for _ in range(2):
        for name in ("subject below", "subject beyond", "subject at"):
            found = run(engine, {name: subject[name]})
            assert facts(found)[name] == alone("f32", "sampled")[name]
    # "at" finds the whole blocks of "below", though "beyond" has more of its tokens.
    engine, hits = engine_of(), []
    for name in ("subject below", "subject beyond", "subject at", "subject beyond"):
        hits.append(run(engine, {name: subject[name]})[name].metrics.num_cached_tokens)
    assert hits == [0, 0, 32, 288]


def test_answers_of_one_request_cross_the_length_one_by_one() -> None:
    three = replace(MODES["sampled"], n=3)
    prompt = prompt_of(77, seed=9)
    expected = run(engine_of(enable_prefix_caching=False), {"subject": (prompt, three)})
    first = run(engine_of(), {"subject": (prompt, replace(three, n=1))})
    assert facts(expected)["subject"][0] == facts(first)["subject"][0]
    crowded = run(engine_of(max_num_seqs=2), {**others(), "subject": (prompt, three)})
    assert facts(crowded)["subject"] == facts(expected)["subject"]


# ---- on the fake runtime, which checks every key and the length of every sequence ----


def fake(**options: Any) -> Engine:
    values = {"rope_switch": 19, "max_num_seqs": 7, "max_num_batched_tokens": 23, **options}
    return fake_engine(60, **values)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("drafts", [0, 3])
def test_a_crowd_crosses_the_length(overlap: bool, caching: bool, drafts: int) -> None:
    drafter = FakeDrafter(fake_future, drafts, right=0.8) if drafts else None
    engine = fake(overlap_steps=overlap, enable_prefix_caching=caching, drafter=drafter)
    crowd(engine)
    assert engine.stats().num_preemptions > 20
    whys = {event[3] for event in engine.events if event[1] == "preempted"}
    assert "rope" in whys


_PATH = "octavo.engine."
PLANTED: dict[str, tuple[str, Callable[..., Any]]] = {
    "sequences go on with the keys of short ones": (
        _PATH + "schedule.SchedulerLimits.outgrown",
        lambda limits, running: [],
    ),
    "only new keys have the long frequencies": (
        _PATH + "schedule.SchedulerLimits.outgrown",
        lambda limits, running: (
            [each.use_rope(limits.rope_set(each.num_tokens)) for each in running] and []
        ),
    ),
    "names of blocks do not say for which frequencies": (
        _PATH + "prefix_cache.extend_block_hashes",
        lambda *values, own=extend_block_hashes: own(*values[:5]),
    ),
    "answers share the blocks of one that is longer": (
        _PATH + "prefix_cache._running_leader",
        lambda sequence: (
            sequence.leader
            if sequence.leader is not None and sequence.leader.state.value == "running"
            else None
        ),
    ),
    "drafts cross the length": (
        _PATH + "schedule.SchedulerLimits.longest",
        lambda limits, rope_set: limits.max_model_len,
    ),
}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fake(drafter=FakeDrafter(fake_future, 3, right=0.8) if "drafts" in error else None)
    monkeypatch.setattr(*PLANTED[error])
    with pytest.raises((AssertionError, RuntimeError)):
        crowd(engine)
        for i in range(12):
            params = SamplingParams(temperature=1.0, seed=i, n=4, max_tokens=9, ignore_eos=True)
            engine.add_request(f"four{i}", [(i * k) % 90 for k in range(15)], params)
        run_to_end(engine)


def test_the_core_refuses_a_batch_of_the_wrong_set() -> None:
    from octavo import _native

    engine: Any = engine_of()
    ids = np.arange(SWITCH + 1, dtype=np.int32)

    def submit(count: int, sets: list[int] | None, runtime: Any = engine.runtime) -> None:
        batch = _native.Batch(
            ids[:count],
            np.array([0, count], np.int32),
            np.array([count], np.int32),
            np.arange(6, dtype=np.int32)[None, None],
            np.zeros(0, np.int32),
            rope_sets=None if sets is None else np.array(sets, np.int32),
        )
        runtime.wait(runtime.submit(batch, sample=True))

    for count, sets in ((SWITCH, None), (SWITCH, [0]), (SWITCH, [1]), (SWITCH + 1, [1])):
        submit(count, sets)
    for count, sets, message in (
        (
            SWITCH + 1,
            None,
            r"rope_sets\[0\] is 0 for a sequence of 91 tokens; expected 1 beyond 90",
        ),
        (4, [2], r"rope_sets\[0\] is 2; expected 0 to 1"),
        (4, [0, 0], "rope_sets has 2 entries; expected 1"),
    ):
        with pytest.raises(ValueError, match=message):
            submit(count, sets)
    with pytest.raises(ValueError, match=r"rope_sets\[0\] is 1; expected 0 to 0"):
        submit(4, [1], make_engine().runtime)


def test_layers_that_switch_at_different_lengths_are_refused() -> None:
    first, second, *_ = (layer.rope for layer in LONG.layers[1:])
    assert first is not None and second is not None
    ropes = (first, replace(second, original_length=70))
    layers = [replace(LONG.layers[1], rope=rope) for rope in ropes]
    with pytest.raises(UnsupportedModelError, match=r"beyond \[70, 90\] tokens"):
        _ = replace(LONG, layers=tuple(layers)).rope_switch
