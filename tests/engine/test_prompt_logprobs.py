"""Log-probabilities of prompts: the right token's, once each, with the same bits in any batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda_helpers import DEVICE, needs_cuda
from engine_helpers import check_answers, fake_engine, run_to_end
from fake_runtime import NAN_TOKEN, FakeRuntime, rank_of, target_logprob, top_tokens
from invariance_helpers import GREEDY, SPEC, make_engine, others, prompt_of, run, weights
from runtime_helpers import random_weights, tiny_spec

from octavo import _native
from octavo.config import RuntimeOptions
from octavo.engine.engine import Engine
from octavo.engine.outputs import RequestOutput, TokenLogprob
from octavo.engine.prompt_logprobs import RowPlaces
from octavo.errors import InvalidArgumentError
from octavo.reference.llama import ReferenceModel
from octavo.reference.sampling import log_softmax
from octavo.sampling_params import SamplingParams

SCORED = replace(GREEDY, prompt_logprobs=2)
Entries = tuple[TokenLogprob | None, ...]


def fake_entries(prompt: list[int], params: SamplingParams) -> Entries:
    """What the fake model says of a prompt, computed with no engine."""
    first = max(params.prompt_logprobs_start, 1)
    count = params.prompt_logprobs or 0
    scored = [
        TokenLogprob(
            token,
            target_logprob(prompt[:i], token),
            *top_tokens(prompt[:i], count),
            rank_of(prompt[:i], token),
        )
        for i, token in enumerate(prompt)
        if i >= first
    ]
    return (*[None] * (len(prompt) - len(scored)), *scored)


def limited(engine: Engine, max_prompt_rows: int) -> Engine:
    engine.scheduler.limits = replace(engine.scheduler.limits, max_prompt_rows=max_prompt_rows)
    return engine


def crowd(engine: Engine) -> int:
    """Requests with and without log-probabilities, in a cache too small; returns preemptions."""
    asked: dict[str, tuple[list[int], SamplingParams]] = {}
    outputs: dict[str, RequestOutput] = {}
    for i in range(30):
        prompt = [(7 * i + k * k) % 90 for k in range(1 + (i * 5) % 23)]
        params = SamplingParams(
            temperature=i % 2,
            seed=i,
            max_tokens=0 if i % 5 == 1 else 3 + i % 20,
            ignore_eos=True,
            n=2 if i % 7 == 3 else 1,
            min_tokens=2 if i % 5 == 2 else 0,
            prompt_logprobs=None if i % 5 == 4 else i % 3,
            prompt_logprobs_start=i % 4 * 3 if i % 2 else 0,
        )
        asked[f"{i}"] = prompt, params
        engine.add_request(f"{i}", prompt, params, priority=-(i % 3))
        outputs |= {chunk.request_id: chunk.result for chunk in engine.step() if chunk.result}
    outputs |= run_to_end(engine)
    for name, output in outputs.items():
        prompt, params = asked[name]
        check_answers(output, params)
        expected = None if params.prompt_logprobs is None else fake_entries(prompt, params)
        assert output.prompt_logprobs == expected, name
    assert len(outputs) == 30
    return engine.scheduler.num_preemptions


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("windows", [(0,), (0, 7)])
def test_a_crowd(windows: tuple[int, ...], caching: bool, overlap: bool) -> None:
    preemptions = 0
    for num_blocks, budget in ((18, 11), (14, 3), (200, 48)):
        engine = fake_engine(
            num_blocks + (len(windows) > 1) * 8,
            windows,
            enable_prefix_caching=caching,
            max_num_batched_tokens=budget,
            overlap_steps=overlap,
        )
        preemptions += crowd(limited(engine, 5))
        runtime = engine.runtime
        assert isinstance(runtime, FakeRuntime)
        rows = [int((batch.sampling["target"] >= 0).sum()) for batch in runtime.batches]
        assert max(rows) <= 5 and sum(rows) > 150
    assert preemptions > 2


def test_planted_errors_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets shifted by one; results given to the wrong rows."""
    from octavo.engine import pipeline, prompt_logprobs

    right = prompt_logprobs.add_prompt_rows

    def shifted_targets(arrays: Any, schedule: Any) -> Any:
        arrays, places = right(arrays, schedule)
        arrays.sampling["target"][places.prompts] = arrays.sampling["target"][
            np.roll(places.prompts, 1)
        ]
        return arrays, places

    def shifted_places(arrays: Any, schedule: Any) -> Any:
        arrays, places = right(arrays, schedule)
        return arrays, RowPlaces(places.sampled, np.roll(places.prompts, 1))

    for wrong in (shifted_targets, shifted_places):
        monkeypatch.setattr(pipeline, "add_prompt_rows", wrong)
        with pytest.raises(AssertionError):
            crowd(limited(fake_engine(), 5))


def test_the_cache_is_used_up_to_the_first_row_that_is_needed() -> None:
    engine = fake_engine(max_num_batched_tokens=48)
    prompt = [(3 * k * k) % 90 for k in range(30)]
    one = SamplingParams(max_tokens=1, seed=1)

    def cached(params: SamplingParams) -> int:
        engine.add_request("request", prompt, params)
        output = run_to_end(engine)["request"]
        if params.prompt_logprobs is not None:
            assert output.prompt_logprobs == fake_entries(prompt, params)
        return output.metrics.num_cached_tokens

    assert cached(replace(one, prompt_logprobs=0)) == 0
    assert cached(replace(one, prompt_logprobs=0)) == 0  # the cache holds no logits
    assert cached(one) == 28  # but what was computed for them serves others
    for start, num_cached in ((9, 8), (10, 9), (16, 15), (30, 28), (99, 28)):
        scored = replace(one, prompt_logprobs=1, prompt_logprobs_start=start)
        assert cached(scored) == num_cached
        assert cached(replace(scored, max_tokens=0)) == num_cached


def test_nothing_is_sampled_with_max_tokens_0() -> None:
    engine = fake_engine()
    params = SamplingParams(max_tokens=0, prompt_logprobs=1, n=2)
    for length in (1, 2, 12, 47):
        prompt = [(k * k) % 90 for k in range(length)]
        engine.add_request("r", prompt, params, stream=True)
        chunks: list[Any] = []
        output = run_to_end(engine, on_chunk=chunks.append)["r"]
        assert [(chunk.text, chunk.finish_reason) for chunk in chunks] == [("", "length")] * 2
        assert [answer.token_ids for answer in output.outputs] == [(), ()]
        assert output.prompt_logprobs == fake_entries(prompt, params)
    assert engine.num_sampled_tokens == 0
    runtime = engine.runtime
    assert isinstance(runtime, FakeRuntime)
    assert all((batch.sampling["target"] >= 0).all() for batch in runtime.batches)


def test_what_cannot_be_done() -> None:
    with pytest.raises(InvalidArgumentError, match="max_tokens is 0; expected 1 or more, or"):
        SamplingParams(max_tokens=0)
    with pytest.raises(InvalidArgumentError, match="prompt_logprobs is 21; expected an integer, 0"):
        SamplingParams(prompt_logprobs=21)
    engine = fake_engine()
    engine.add_request("bad", [3, NAN_TOKEN, *[4] * 20], SamplingParams(prompt_logprobs=0))
    engine.add_request("good", [3, 4, 5], SamplingParams(prompt_logprobs=0, max_tokens=2, seed=1))
    outputs = run_to_end(engine)
    assert "NaN or an infinity" in (outputs["bad"].error or "")
    assert outputs["good"].error is None
    engine.add_request("left", [4] * 40, SamplingParams(prompt_logprobs=0))
    engine.step()
    left = engine.abort("left")
    assert left is not None and left.prompt_logprobs is not None
    assert len(left.prompt_logprobs) == 40 and left.prompt_logprobs[-1] is None
    run_to_end(engine)


# ---- with real arithmetic ----


def entries_of(outputs: dict[str, RequestOutput]) -> dict[str, Any]:
    subjects = {name: output for name, output in outputs.items() if name[0] == "s"}
    return {name: (o.prompt_logprobs, o.outputs[0].logprobs) for name, o in subjects.items()}


def test_values_are_those_of_the_reference() -> None:
    prompt = prompt_of(77, seed=77)
    output = run(make_engine(), {"s": (prompt, SCORED)})["s"]
    logits = ReferenceModel(SPEC, weights()).forward(np.array(prompt))
    expected = log_softmax(logits)
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    found = [entry for entry in output.prompt_logprobs if entry is not None]
    assert [entry.token_id for entry in found] == prompt[1:]
    own = np.array([entry.logprob for entry in found])
    np.testing.assert_allclose(own, expected[np.arange(76), prompt[1:]], atol=1e-4)
    best = np.array([entry.top_logprobs for entry in found])
    np.testing.assert_allclose(best, np.sort(expected[:-1])[:, :-3:-1], atol=1e-4)
    shifted = expected[np.arange(76), prompt[:-1]]
    assert np.abs(own - shifted).max() > 0.1


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_bits_do_not_depend_on_chunks_company_or_preemption(dtype: str) -> None:
    subjects = {f"s{n}": (prompt_of(n, seed=n), SCORED) for n in (2, 77, 301)}
    expected = entries_of(run(make_engine(dtype), subjects, apart=True))
    for chunk, max_rows in ((7, 3), (29, 100), (64, 1)):
        engine = limited(make_engine(dtype, max_num_batched_tokens=chunk), max_rows)
        assert entries_of(run(engine, {**others(), **subjects})) == expected
    penalized = {"p": (prompt_of(9, seed=3), SamplingParams(repetition_penalty=1.3, logprobs=1))}
    assert entries_of(run(make_engine(dtype), {**penalized, **subjects})) == expected
    engine = limited(
        make_engine(dtype, num_blocks=33, max_num_seqs=1, max_num_batched_tokens=50), 40
    )
    engine.add_request("s301", *subjects["s301"], priority=1)
    for i in range(3):
        for _ in range(2 + 3 * i):
            engine.step()
        engine.add_request(f"u{i}", prompt_of(200, seed=50 + i), SamplingParams(max_tokens=3))
    outputs = run_to_end(engine)
    assert outputs["s301"].metrics.num_preemptions > 1
    assert entries_of(outputs) == {"s301": expected["s301"]}


@needs_cuda
def test_on_a_cuda_device() -> None:
    spec = tiny_spec(64, num_heads=4, num_kv_heads=2, head_dim=64, intermediate_size=96)
    options = RuntimeOptions("f32", "f32", 16, 128, 4, 64, deterministic=True)
    prompt = [(k * k + 3) % spec.vocab_size for k in range(37)]
    found = []
    for device, max_rows in (("cpu", 100), (DEVICE, 100), (DEVICE, 9)):
        runtime = _native.Runtime(device, spec, options)
        for name, array in random_weights(spec).items():
            runtime.load(name, array, "f32")
        runtime.alloc_kv(16)
        engine = Engine(runtime, options, num_kv_blocks=16, vocab_size=spec.vocab_size)
        output = run(limited(engine, max_rows), {"s": (prompt, replace(SCORED, max_tokens=2))})["s"]
        assert output.prompt_logprobs is not None
        found.append([entry for entry in output.prompt_logprobs if entry is not None])
    on_cpu, on_device, in_pieces = found
    assert on_device == in_pieces and len(on_device) == 36
    for a, b in zip(on_cpu, on_device, strict=True):
        assert a.token_id == b.token_id and abs(a.logprob - b.logprob) < 1e-4
