"""Beam search on the engine: the reference's tokens, whatever the cache and the company; blocks."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from engine_helpers import fake_engine, run_to_end
from fake_runtime import EOS, NAN_TOKEN, VOCAB, FakeRuntime, top_tokens
from invariance_helpers import SPEC, make_engine, prompt_of, weights

from octavo.engine.engine import Engine
from octavo.engine.outputs import CompletionOutput, RequestOutput
from octavo.errors import InvalidArgumentError
from octavo.reference.llama import ReferenceModel
from octavo.reference.sampling import log_softmax
from octavo.reference.search import beam_search
from octavo.sampling_params import SamplingParams
from octavo.search.beam import BeamSearch
from octavo.search.params import BeamSearchParams

STOPS = (5, 17, 40, 61)
Answers = list[tuple[list[int], float]]


def fake_row(history: list[int]) -> np.ndarray:
    """The fake model's log-probabilities of all tokens."""
    tokens, logprobs = top_tokens(history, VOCAB)
    row = np.zeros(VOCAB, np.float32)
    row[list(tokens)] = logprobs
    return row


def ask(engine: Engine, name: str, prompt: list[int], params: BeamSearchParams) -> None:
    stops = params.stop_token_ids
    search = BeamSearch(params, stops, params.max_tokens)
    engine.add_request(name, prompt, params.sampling_params(), search=search)


def expected(
    model: Any, prompt: list[int], params: BeamSearchParams
) -> list[tuple[list[int], float]]:
    return beam_search(
        model,
        prompt,
        params.beam_width,
        params.max_tokens,
        params.stop_token_ids,
        params.length_penalty,
        params.early_stopping,
        params.num_beam_groups,
        params.diversity_penalty,
    )


def tokens_of(output: RequestOutput) -> list[list[int]]:
    return [list(answer.token_ids) for answer in output.outputs]


def searches() -> list[BeamSearchParams]:
    found = []
    for index, early in enumerate((False, True, "never")):
        for penalty in (1.0, 0.0, -0.7, 2.0):
            groups = (1, 1, 2, 4)[index + int(penalty) & 3]
            found.append(
                BeamSearchParams(
                    beam_width=4 if groups > 1 else 2 + index,
                    max_tokens=6 + index,
                    length_penalty=penalty,
                    early_stopping=early,  # type: ignore[arg-type]
                    num_beam_groups=groups,
                    diversity_penalty=0.6 if groups > 1 else 0.0,
                    ignore_eos=True,
                    stop_token_ids=STOPS[: 1 + index],
                )
            )
    return found


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("windows", [(0,), (0, 7)])
def test_tokens_are_the_references(windows: tuple[int, ...], caching: bool, overlap: bool) -> None:
    """In a cache so small that beams are preempted, among ordinary requests."""
    num_preemptions = num_ended_early = 0
    for num_blocks in (26, 200):
        engine = fake_engine(
            num_blocks * len(windows), windows, enable_prefix_caching=caching, overlap_steps=overlap
        )
        want, outputs = {}, {}
        for index, params in enumerate(searches()):
            prompt = [(7 * index + k * k) % 90 for k in range(1 + (index * 5) % 14)]
            ask(engine, f"s{index}", prompt, params)
            want[f"s{index}"] = expected(fake_row, prompt, params)
            plain = SamplingParams(temperature=1, seed=index, max_tokens=9, ignore_eos=True)
            engine.add_request(f"p{index}", prompt, plain, priority=-(index % 2))
            outputs |= {c.request_id: c.result for c in engine.step() if c.result}
            engine.check_integrity()
        outputs |= run_to_end(engine)
        for name, answers in want.items():
            assert tokens_of(outputs[name]) == [tokens for tokens, _ in answers], name
            reasons = [answer.finish_reason for answer in outputs[name].outputs]
            num_ended_early += reasons.count("stop")
            assert set(reasons) <= {"stop", "length"}
        num_preemptions += engine.scheduler.num_preemptions
        assert engine.blocks.num_free_blocks == engine.blocks.num_blocks
    assert num_preemptions > 3 and num_ended_early > 5


def test_one_beam_is_greedy_decoding() -> None:
    engine = fake_engine()
    ask(engine, "s", [3, 4, 5], BeamSearchParams(1, 9, ignore_eos=True))
    history = [3, 4, 5]
    for _ in range(9):
        history.append(int(fake_row(history).argmax()))
    (answer,) = run_to_end(engine)["s"].outputs
    assert list(answer.token_ids) == history[3:] and answer.finish_reason == "length"


def test_why_a_beam_ended_is_told_as_of_any_answer() -> None:
    stops = tuple(range(20, 30))
    params = BeamSearchParams(4, 5, stop_token_ids=stops)
    engine = fake_engine()
    reasons: set[tuple[str | None, bool]] = set()
    for seed in range(20):
        search = BeamSearch(params, {EOS, *stops}, params.max_tokens)
        engine.add_request("s", [seed, 3], params.sampling_params(), search=search)
        output = run_to_end(engine)["s"]
        for answer in () if output.error else output.outputs:  # the fake model has its NaN
            last = answer.token_ids[-1]
            assert answer.stop_reason == (last if last in stops else None)
            assert answer.finish_reason == ("stop" if last in {EOS, *stops} else "length")
            reasons.add((answer.finish_reason, answer.stop_reason is None))
    assert reasons == {("stop", False), ("stop", True), ("length", True)}


def test_four_beams_hold_few_more_blocks_than_one_sequence() -> None:
    """At most 1.3 times those of one sequence of that length, and each beam's own new tokens."""
    engine = fake_engine(num_blocks=100, max_model_len=400, max_num_batched_tokens=64)
    prompt, new = [(k * k + 3) % 90 for k in range(201)], 24
    params = BeamSearchParams(4, new, ignore_eos=True)
    ask(engine, "s", prompt, params)
    most = 0
    while engine.has_unfinished_requests:
        engine.step()
        most = max(most, engine.blocks.num_blocks - engine.blocks.num_free_blocks)
    size = engine.blocks.block_size
    alone = -(-(len(prompt) + new) // size)
    assert most <= 1.3 * alone + 3 * -(-new // size)
    assert most < 1.5 * alone < 4 * alone
    runtime = engine.runtime
    assert isinstance(runtime, FakeRuntime)
    assert runtime.num_tokens_computed < len(prompt) + 4 * new


def test_planted_errors_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is not copied, copied from the wrong beam; a beam with the wrong parent."""
    from octavo.engine import block_manager, search

    fork, right = block_manager.BlockManager.fork, search.BeamGroup._fork

    def no_copies(self: Any, *arguments: Any) -> Any:
        fork(self, *arguments)
        return []

    def wrong_source(self: Any, *arguments: Any) -> Any:
        copies = fork(self, *arguments)
        return [copy._replace(source=copies[-1].source) for copy in copies]

    def wrong_parent(self: Any, moves: Any, scheduler: Any) -> None:
        last = self._num_alive - 1
        right(self, [move._replace(parent=last - move.parent) for move in moves], scheduler)

    for target, name, wrong in (
        (block_manager.BlockManager, "fork", no_copies),
        (block_manager.BlockManager, "fork", wrong_source),
        (search.BeamGroup, "_fork", wrong_parent),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, wrong)
            with pytest.raises(AssertionError):
                test_tokens_are_the_references((0,), False, True)


def test_a_failed_step_and_an_aborted_search_leave_nothing_behind() -> None:
    engine = fake_engine()
    params = BeamSearchParams(3, 8, ignore_eos=True)
    prompt = [9, 8, 7, 6, 5]
    runtime = engine.runtime
    assert isinstance(runtime, FakeRuntime)
    for fail_at in range(1, 8):
        ask(engine, "s", prompt, params)
        for _ in range(fail_at):
            engine.step()
        runtime.fail_wait = RuntimeError("no memory")
        with pytest.raises(RuntimeError, match="no memory"):
            engine.step()
        engine.check_integrity()
        output = run_to_end(engine)["s"]
        assert tokens_of(output) == [tokens for tokens, _ in expected(fake_row, prompt, params)]
        ask(engine, "s", prompt, params)
        for _ in range(fail_at):
            engine.step()
        aborted = engine.abort("s")
        assert aborted is not None and len(aborted.outputs) == 3
        run_to_end(engine)
        assert engine.blocks.num_free_blocks == engine.blocks.num_blocks


def test_what_cannot_be_done() -> None:
    engine = fake_engine()
    search = BeamSearch(BeamSearchParams(3, 8), (), 8)

    def refused(params: SamplingParams, search: BeamSearch = search, **more: Any) -> str:
        with pytest.raises(InvalidArgumentError) as error:
            engine.add_request("s", [1, 2, 3], params, search=search, **more)
        assert not engine.has_unfinished_requests
        return str(error.value)

    assert "cannot be streamed" in refused(SamplingParams(), stream=True)
    assert "n or prompt_logprobs" in refused(SamplingParams(n=2))
    assert "max_num_seqs" in refused(SamplingParams(), BeamSearch(BeamSearchParams(6), (), 8))
    many = BeamSearch(BeamSearchParams(5), range(20), 8)
    assert "105 most probable tokens" in refused(SamplingParams(), many)
    small = fake_engine(num_blocks=20)
    with pytest.raises(InvalidArgumentError, match="may need 26 blocks; the KV cache has 20"):
        small.add_request("s", [1] * 9, SamplingParams(max_tokens=30), search=search)
    for wrong, message in (
        ({"beam_width": 0}, "beam_width is 0"),
        ({"beam_width": 3, "num_beam_groups": 2}, "beam_width is 3; expected a multiple"),
        ({"beam_width": 3, "diversity_penalty": 1.0}, "diversity_penalty is 1, which needs groups"),
        (
            {"beam_width": 3, "early_stopping": "always"},
            "early_stopping is 'always'",
        ),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            BeamSearchParams(**wrong)  # type: ignore[arg-type]
    engine.add_request("nan", [3, NAN_TOKEN], SamplingParams(max_tokens=4), search=search)
    assert "NaN" in (run_to_end(engine)["nan"].error or "")


def test_with_real_arithmetic() -> None:
    model = ReferenceModel(SPEC, weights())

    def row(tokens: list[int]) -> np.ndarray:
        return log_softmax(model.forward(np.array(tokens))[-1:])[0]

    for early in (False, "never"):
        params = BeamSearchParams(4, 7, 0.8, early, ignore_eos=True, stop_token_ids=(7, 9))  # type: ignore[arg-type]
        prompt = prompt_of(35, seed=8)
        engine = make_engine()
        ask(engine, "s", prompt, params)
        output = run_to_end(engine)["s"]
        found = expected(row, prompt, params)
        assert tokens_of(output) == [tokens for tokens, _ in found]
        for answer, (tokens, score) in zip(output.outputs, found, strict=True):
            assert answer.cumulative_logprob == pytest.approx(score * len(tokens) ** 0.8, abs=1e-4)


@pytest.mark.parametrize("seed", [1646, *range(12)])
def test_beams_that_are_preempted_report_for_the_tokens_that_they_have(seed: int) -> None:
    """Urgent requests take the beams' places; what a beam was computed for may be old then."""
    rng = random.Random(seed)
    prompt = [rng.randrange(90) for _ in range(rng.randint(1, 14))]
    width, max_tokens = rng.choice([2, 3, 4]), rng.randint(6, 20)
    params = BeamSearchParams(beam_width=width, max_tokens=max_tokens)
    others = []
    for index in range(14):
        tokens = [rng.randrange(90) for _ in range(rng.randint(1, 20))]
        sampling = SamplingParams(temperature=1, seed=index, max_tokens=rng.randint(1, 8))
        others.append((f"o{index}", tokens, sampling))

    def add(engine: Engine) -> None:
        search = BeamSearch(params, {EOS}, max_tokens)
        engine.add_request("b", prompt, params.sampling_params(), search=search, priority=1)

    alone = fake_engine(200, max_num_batched_tokens=64, max_num_seqs=8)
    add(alone)
    expected = run_to_end(alone)["b"].outputs
    crowded = fake_engine(
        rng.randint(8, 24),
        max_num_batched_tokens=rng.choice([3, 5, 11]),
        max_num_seqs=rng.choice([3, 4, 5]),
        overlap_steps=rng.random() < 0.5,
        enable_prefix_caching=rng.random() < 0.7,
    )
    with suppress(InvalidArgumentError):  # the beams would not fit
        add(crowded)
        found = None
        while crowded.has_unfinished_requests:
            if others and rng.random() < 0.3:
                crowded.add_request(*others.pop(), priority=rng.choice([-1, 0, 0, 1, 2]))
            for chunk in crowded.step():
                found = chunk.result if chunk.request_id == "b" and chunk.result else found
            crowded.check_integrity()
        assert found is not None and [answer_of(each) for each in found.outputs] == [
            answer_of(each) for each in expected
        ]


def test_searches_of_one_time_do_not_wait_for_each_other() -> None:
    """So long is a level of priority that no float tells their times of arrival apart."""
    engine = fake_engine(max_num_seqs=3, priority_ageing_seconds=1e18)
    want = {}
    for index, width in enumerate((3, 2, 3, 1, 2)):
        params = BeamSearchParams(width, 9, ignore_eos=True)
        prompt = [(11 * index + k * k) % 90 for k in range(4 + index)]
        search = BeamSearch(params, (), params.max_tokens)
        engine.add_request(f"s{index}", prompt, params.sampling_params(), search=search, priority=1)
        want[f"s{index}"] = [tokens for tokens, _ in expected(fake_row, prompt, params)]
    outputs = run_to_end(engine, max_steps=500)
    assert {name: tokens_of(output) for name, output in outputs.items()} == want


def answer_of(output: CompletionOutput) -> tuple[tuple[int, ...], float]:
    return tuple(output.token_ids), output.cumulative_logprob
