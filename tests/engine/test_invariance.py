"""The promise about bits, over a tiny random model in the native core.

Who shares the batch, how a prompt is cut, and whether a request was preempted changes nothing,
neither its tokens nor its log-probabilities. Everything here is exact equality of
float32 numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from invariance_helpers import (
    MODES,
    SAMPLED,
    VOCAB,
    alone,
    facts,
    make_engine,
    others,
    prompt_of,
    run,
    run_preempted,
    subjects,
    weights,
)
from reference_helpers import bf16_order

from octavo import _native
from octavo.engine.engine import Engine
from octavo.sampling_params import SamplingParams

every_case = pytest.mark.parametrize(
    ("dtype", "mode"), [(d, m) for d in ("f32", "bf16") for m in MODES]
)


@every_case
@pytest.mark.parametrize("isa", _native.available_isas())
def test_in_a_batch_of_seventeen_others(dtype: str, mode: str, isa: str) -> None:
    company = others()
    names = list(company)
    requests = {name: company[name] for name in names[:9]}
    requests.update(subjects(MODES[mode]))
    requests.update({name: company[name] for name in names[9:]})
    home = "avx512_bf16" if dtype == "bf16" and bf16_order(isa) == "dot" else "scalar"
    alone_there = alone(dtype, mode, home)
    assert facts(run(make_engine(dtype, isa=isa), requests)) == alone_there


@every_case
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_in_chunks(dtype: str, mode: str, chunk: int) -> None:
    engine = make_engine(dtype, max_num_batched_tokens=chunk)
    assert facts(run(engine, subjects(MODES[mode]), apart=True)) == alone(dtype, mode)


@every_case
def test_in_chunks_of_a_crowded_batch(dtype: str, mode: str) -> None:
    engine = make_engine(dtype, max_num_batched_tokens=29)
    assert facts(run(engine, {**others(), **subjects(MODES[mode])})) == alone(dtype, mode)


@every_case
@pytest.mark.parametrize("chunk", [13, 512])
@pytest.mark.parametrize("caching", [True, False])
def test_after_forced_preemption(dtype: str, mode: str, chunk: int, caching: bool) -> None:
    """Urgent requests take each subject's only place, and blocks of its, again and again.

    With prefix caching it finds what is left of its blocks, without it computes all of them anew.
    """
    for name, request in subjects(MODES[mode]).items():
        engine = make_engine(
            dtype,
            num_blocks=33,
            max_num_seqs=1,
            max_num_batched_tokens=chunk,
            enable_prefix_caching=caching,
        )
        outputs = run_preempted(engine, name, request, (2, 5, 8))
        assert outputs[name].metrics.num_preemptions == 3
        assert facts(outputs)[name] == alone(dtype, mode)[name]


@every_case
def test_across_numbers_of_threads(dtype: str, mode: str) -> None:
    for num_threads in (2, 3):
        engine = make_engine(dtype, num_threads=num_threads)
        assert facts(run(engine, {**others(), **subjects(MODES[mode])})) == alone(dtype, mode)


def test_answers_of_one_request_are_those_of_single_requests() -> None:
    """n = 3 draws with sample indices 0, 1, 2; index 0 is what n = 1 draws."""
    prompt = prompt_of(77, seed=77)
    three = SamplingParams(temperature=0.9, seed=8, max_tokens=24, logprobs=0, n=3)
    one = SamplingParams(temperature=0.9, seed=8, max_tokens=24, logprobs=0)
    requests = {"subject3": (prompt, three), "subject1": (prompt, one)}
    found = facts(run(make_engine(), requests))
    assert found["subject3"][0] == found["subject1"][0]
    assert len({answer[0] for answer in found["subject3"]}) == 3


def test_extreme_sampling_parameters_disturb_nobody() -> None:
    """Values that float32 rounds to 0 or infinity would fail the step, and so every request."""
    prompt = prompt_of(77, seed=77)
    extremes = {
        "subject_cold": SamplingParams(temperature=1e-60, seed=1, max_tokens=24, logprobs=3),
        "subject_narrow": SamplingParams(top_p=1e-60, seed=1, max_tokens=24, logprobs=3),
        "subject_first": SamplingParams(top_k=1, seed=1, max_tokens=24, logprobs=3),
        "hot": SamplingParams(temperature=1e300, seed=1, max_tokens=24),
        "wide": SamplingParams(top_k=2**70, min_p=1e-60, seed=1, max_tokens=24),
    }
    outputs = run(make_engine(), {name: (prompt, params) for name, params in extremes.items()})
    assert len(set(outputs["hot"].outputs[0].token_ids)) > 15
    for answers in facts(outputs).values():
        assert answers == alone("f32", "greedy")["subject77"]


def test_a_request_with_nan_leaves_the_others_bits_alone() -> None:
    """Even in blocks that held its keys and values before: the embedding of one token is NaN."""
    poisoned = VOCAB - 1
    assert all(poisoned not in answers[0][0] for answers in alone("f32", "sampled").values())
    engine = make_engine(num_blocks=34)
    table = weights()["embed.weight"].copy()
    table[poisoned] = np.nan
    engine.runtime.load("embed.weight", table, "f32")  # type: ignore[attr-defined]
    requests: dict[str, Any] = {"bad": ([5, 6, poisoned] * 60, SAMPLED)}
    outputs = run(engine, {**requests, **subjects(SAMPLED)})
    outputs.update(run(engine, {**subjects(SAMPLED)}))
    assert outputs["bad"].outputs[0].finish_reason == "error"
    assert "NaN or an infinity at token 180" in (outputs["bad"].error or "")
    assert facts(outputs) == alone("f32", "sampled")


def test_different_requests_do_differ() -> None:
    """The comparisons above could fail: other dtype, other seed, other prompt, other bits."""
    base = alone("f32", "sampled")
    assert base != alone("bf16", "sampled")
    assert base != alone("f32", "greedy")
    prompt = prompt_of(77, seed=77)
    changed = [*prompt[:-1], (prompt[-1] + 1) % VOCAB]
    other = facts(run(make_engine(), {"subject77": (changed, SAMPLED)}))
    assert other["subject77"] != base["subject77"]


@pytest.mark.parametrize("chunk", [1, 13, 512])
def test_with_an_int8_cache(chunk: int) -> None:
    """Keys and values are rounded by themselves, so that neither chunks nor company show."""

    def engine(max_num_batched_tokens: int) -> Engine:
        return make_engine("bf16", kv_dtype="int8", max_num_batched_tokens=max_num_batched_tokens)

    mode = MODES["sampled"]
    expected = facts(run(engine(512), subjects(mode), apart=True))
    assert expected != alone("bf16", "sampled")
    assert facts(run(engine(chunk), {**others(), **subjects(mode)})) == expected
