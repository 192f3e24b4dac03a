"""Two steps in flight: the same answers, bit for bit, and nothing left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_helpers import (
    ManualClock,
    check_answers,
    fake_engine,
    plain_tokenizer_directory,
    run_to_end,
    solo_answer,
)
from fake_runtime import NAN_TOKEN, FakeBatch, FakeRuntime
from invariance_helpers import (
    MODES,
    SYSTEM,
    alone,
    crowd,
    facts,
    make_engine,
    others,
    prompt_of,
    run,
    subjects,
)

from octavo.engine.block_manager import BlockCopy, BlockManager
from octavo.engine.engine import Engine
from octavo.engine.pipeline import Pipeline
from octavo.engine.schedule import Schedule
from octavo.sampling_params import SamplingParams
from octavo.text.tokenizer import Tokenizer

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


def fake_runtime(engine: Engine) -> FakeRuntime:
    assert isinstance(engine.runtime, FakeRuntime)
    return engine.runtime


def test_the_next_step_is_on_its_way_before_this_one_is_read() -> None:
    for overlap in (True, False):
        engine = fake_engine(overlap_steps=overlap)
        engine.add_request("a", [1, 2, 3], SamplingParams(**GREEDY, max_tokens=6))
        submitted = []
        while engine.has_unfinished_requests:
            engine.step()
            submitted.append(len(fake_runtime(engine).batches))
        # The length is known before: no step is wasted.
        assert submitted == ([2, 3, 4, 5, 6, 6] if overlap else [1, 2, 3, 4, 5, 6])
        assert fake_runtime(engine).max_in_flight == 1 + overlap


@pytest.mark.parametrize("num_blocks", [12, 20, 200])
@pytest.mark.parametrize("caching", [True, False])
def test_a_crowd(num_blocks: int, caching: bool) -> None:
    engine = fake_engine(
        num_blocks,
        max_num_seqs=7,
        max_num_batched_tokens=23,
        enable_prefix_caching=caching,
        overlap_steps=True,
    )
    crowd(engine)
    assert fake_runtime(engine).max_in_flight == 2
    assert engine.blocks.num_free_blocks == num_blocks


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(plain_tokenizer_directory(tmp_path_factory.mktemp("plain")))


def test_every_way_to_end(tokenizer: Tokenizer) -> None:
    """Stop tokens and strings, end of text, min_tokens, length, a NaN: as without overlap."""
    whole = solo_answer([4, 9, 2], SamplingParams(**GREEDY, max_tokens=20)).token_ids
    text = "".join(chr(33 + token) for token in whole)
    wanted = {
        "length": ([4, 9, 2], SamplingParams(**GREEDY, max_tokens=9, logprobs=2)),
        "one": ([4, 9, 2], SamplingParams(**GREEDY, max_tokens=1)),
        "token": ([4, 9, 2], SamplingParams(**GREEDY, stop_token_ids=(whole[6],))),
        "string": ([4, 9, 2], SamplingParams(**GREEDY, stop=(text[7:10],))),
        "minimum": ([4, 9, 2], SamplingParams(**GREEDY, min_tokens=6, stop_token_ids=whole[2:4])),
        "context": ([1] * 40, SamplingParams(**GREEDY)),
        "nan": ([1, 2, NAN_TOKEN], SamplingParams(**GREEDY, n=2)),
        **{
            f"eos{i}": ([i, i + 1], SamplingParams(temperature=1.0, seed=i, max_tokens=40))
            for i in range(20)
        },
    }
    found = []
    for overlap in (False, True):
        engine = fake_engine(tokenizer=tokenizer, overlap_steps=overlap)
        for name, (prompt, params) in wanted.items():
            engine.add_request(name, prompt, params, stream=name == "string")
        outputs = run_to_end(engine)
        found.append({name: output.outputs for name, output in outputs.items()})
        assert engine.blocks.num_free_blocks == engine.blocks.num_blocks
        # Nothing is in flight any more: the runtime can be stopped.
        assert not fake_runtime(engine)._open
    assert found[0] == found[1]
    reasons = {answer.finish_reason for outputs in found[0].values() for answer in outputs}
    assert reasons == {"length", "stop", "error"}


def test_a_token_drawn_after_the_end_is_dropped() -> None:
    """The step that was on its way when the stop token came has computed one token in vain."""
    whole = solo_answer([4, 9, 2], SamplingParams(**GREEDY)).token_ids
    params = SamplingParams(**GREEDY, stop_token_ids=(whole[6],))
    engine = fake_engine(overlap_steps=True)
    engine.add_request("a", [4, 9, 2], params)
    engine.add_request("b", [4, 9, 3], SamplingParams(**GREEDY, max_tokens=20))
    outputs = run_to_end(engine)
    check_answers(outputs["a"], params)
    num_needed = 3 + 6 + 3 + 19
    assert fake_runtime(engine).num_tokens_computed == num_needed + 1
    assert engine.num_sampled_tokens == 7 + 20


@pytest.mark.parametrize("when", ["fail_next", "fail_wait"])
def test_a_step_that_fails_with_another_in_flight(when: str) -> None:
    engine = fake_engine(overlap_steps=True)
    params = SamplingParams(temperature=1.0, seed=3, ignore_eos=True, max_tokens=12, n=3)
    engine.add_request("a", SYSTEM, params)
    for num_steps in (1, 3, 1, 2):
        for _ in range(num_steps):
            engine.step()
        setattr(fake_runtime(engine), when, RuntimeError("out of luck"))
        with pytest.raises(RuntimeError, match="out of luck"):
            engine.step()
        engine.check_integrity()
        assert not fake_runtime(engine)._open
    check_answers(run_to_end(engine)["a"], params)


def test_aborts_and_deadlines_with_two_steps_in_flight() -> None:
    clock = ManualClock()
    engine = fake_engine(clock=clock, overlap_steps=True, max_num_seqs=2)
    params = SamplingParams(**GREEDY, max_tokens=12)
    for name, prompt in {"gone": [4, 9, 2], "late": [4, 9, 3], "next": [4, 9, 4]}.items():
        engine.add_request(name, prompt, params, timeout=2.0 if name == "late" else None)
    for _ in range(3):
        engine.step()
    assert engine.abort("gone") is not None
    engine.check_integrity()
    clock.now += 2
    ended = [chunk for chunk in engine.step() if chunk.result is not None]
    assert [(chunk.request_id, chunk.finish_reason) for chunk in ended] == [("late", "timeout")]
    outputs = run_to_end(engine)
    check_answers(outputs["next"], params)
    # The last one goes while its step is in flight; the engine is used again afterwards.
    engine.add_request("last", [1, 2], params)
    engine.step()
    engine.abort("last")
    assert not engine.has_unfinished_requests
    engine.add_request("again", [1, 2], params)
    check_answers(run_to_end(engine)["again"], params)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("chunk", [29, 512])
def test_bits(dtype: str, mode: str, chunk: int) -> None:
    """The native core resolves the tokens that Python did not know."""
    engine = make_engine(dtype, max_num_batched_tokens=chunk, overlap_steps=True)
    assert facts(run(engine, {**others(), **subjects(MODES[mode])})) == alone(dtype, mode)
    assert facts(run(engine, subjects(MODES[mode]), apart=True)) == alone(dtype, mode)


def test_bits_in_a_tiny_cache_with_forks() -> None:
    several = SamplingParams(temperature=0.9, seed=8, max_tokens=90, logprobs=1, n=4)
    one = SamplingParams(**GREEDY, max_tokens=110, logprobs=3)
    requests = {
        f"subject{i}": (prompt_of(50 + 13 * i, seed=i), several if i % 2 else one) for i in range(6)
    }
    expected = facts(run(make_engine(), requests, apart=True))
    for overlap in (False, True):
        engine = make_engine(num_blocks=33, overlap_steps=overlap)
        outputs = run(engine, requests)
        assert facts(outputs) == expected
        assert sum(output.metrics.num_preemptions for output in outputs.values()) > 0


def test_the_llm_takes_the_option(tmp_path: Path) -> None:
    from text_helpers import tiny_model

    from octavo.llm import LLM

    path = tiny_model(tmp_path / "tiny")
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    texts = set()
    for overlap in (None, False, True):
        llm = LLM(path, load_format="dummy", overlap_steps=overlap)
        assert llm.engine.options.overlap_steps == bool(overlap)  # not on the CPU, unless asked
        texts.add(llm.generate("Hello fox", params, progress=False)[0].text)
    assert len(texts) == 1


def test_penalties_wait_for_the_tokens_they_count() -> None:
    """What a step may draw depends on what the last one drew: such steps are not overlapped."""
    penalized = SamplingParams(
        temperature=0.8, seed=4, max_tokens=40, frequency_penalty=1.5, repetition_penalty=1.3
    )
    biased = SamplingParams(temperature=0.8, seed=4, max_tokens=40, logit_bias=((7, 2.5),))
    requests = {
        "subject1": (prompt_of(40, seed=1), penalized),
        "subject2": (prompt_of(33, seed=2), biased),
        "subject3": (prompt_of(20, seed=3), SamplingParams(**GREEDY, max_tokens=60)),
    }
    expected = facts(run(make_engine(), requests, apart=True))
    plain = facts(run(make_engine(), {"subject1": (requests["subject1"][0], MODES["greedy"])}))
    assert expected["subject1"] != plain["subject1"]
    assert facts(run(make_engine(overlap_steps=True), requests)) == expected


def test_the_step_behind_the_last_answer_is_not_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its failure would take the answer along, which is whole."""
    engine = make_engine(overlap_steps=True)
    right = Pipeline.sample

    def sample(self: Pipeline, *arrays: Any) -> None:
        if not engine.has_unfinished_requests:
            raise RuntimeError("out of luck")
        right(self, *arrays)

    monkeypatch.setattr(Pipeline, "sample", sample)
    params = SamplingParams(**GREEDY, max_tokens=9, frequency_penalty=0.5)
    prompt = prompt_of(20, seed=1)
    tokens = run(engine, {"a": (prompt, params)})["a"].outputs[0].token_ids
    ended = replace(params, stop_token_ids=(tokens[4],))  # which nobody knows in advance
    (answer,) = run(engine, {"a": (prompt, ended)})["a"].outputs
    assert answer.token_ids == tokens[: tokens.index(tokens[4]) + 1]


def test_blocks_are_copied_in_the_order_of_the_list_across_groups() -> None:
    """Groups share the blocks: one may be copied to for a beam, and after it for another group."""
    copies = [(2, 5, 7), (2, 5, 8), (0, 9, 7), (0, 7, 3), (1, 3, 9), (0, 1, 2)]

    done: list[tuple[int, int, int]] = []

    class Copying:
        def copy_blocks(self, kv_group: int, pairs: Any) -> None:
            assert pairs.dtype == np.int32
            done.extend([(kv_group, *pair) for pair in pairs.tolist()])

        def submit(self, batch: Any, sample: bool) -> int:
            raise RuntimeError("no step")

    runtime: Any = Copying()
    blocks = BlockManager(20, 4, (0, 6, 1), 0)
    pipeline = Pipeline(runtime, blocks, FakeBatch, vocab_size=97, depth=1)
    schedule = Schedule((), copies=tuple(BlockCopy(*copy) for copy in copies))
    with pytest.raises(ValueError, match="the schedule is empty"):  # after the copies
        pipeline.submit(schedule, 0.0, sample=True)
    assert done == copies
