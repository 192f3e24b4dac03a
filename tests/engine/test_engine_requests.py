"""One request and its end: stop tokens, stop strings, limits, failures, seeds."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from engine_helpers import (
    check_answers,
    fake_engine,
    plain_tokenizer_directory,
    run_to_end,
    solo_answer,
)
from fake_runtime import EOS, NAN_TOKEN, VOCAB, FakeRuntime

from octavo.engine.engine import Engine
from octavo.engine.guard import deferred_interrupt
from octavo.engine.outputs import OutputChunk, RequestOutput
from octavo.engine.request import derive_seed
from octavo.errors import InvalidArgumentError
from octavo.sampling_params import SamplingParams
from octavo.text.tokenizer import Tokenizer

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 20}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(plain_tokenizer_directory(tmp_path_factory.mktemp("plain")))


def run(engine: Engine, prompt: list[int], params: SamplingParams) -> RequestOutput:
    engine.add_request("only", prompt, params)
    return run_to_end(engine)["only"]


def as_text(token_ids: tuple[int, ...] | list[int]) -> str:
    return "".join(chr(33 + token) for token in token_ids)


def test_greedy_answer_and_its_metrics() -> None:
    params = SamplingParams(**GREEDY, logprobs=2)
    output = run(fake_engine(), [1, 2, 3], params)
    check_answers(output, params)
    answer = output.outputs[0]
    assert len(answer.token_ids) == 20 and answer.finish_reason == "length"
    assert answer.logprobs is not None
    assert answer.cumulative_logprob == sum(entry.logprob for entry in answer.logprobs)
    metrics = output.metrics
    assert (metrics.num_prompt_tokens, metrics.num_output_tokens) == (3, 20)
    assert metrics.first_scheduled_time is not None and metrics.first_token_time is not None
    assert metrics.arrival_time <= metrics.first_scheduled_time <= metrics.first_token_time
    assert metrics.first_token_time <= metrics.finished_time
    assert metrics.tokens_per_second is not None and metrics.tokens_per_second > 0


def test_without_logprobs_none_are_reported() -> None:
    output = run(fake_engine(), [1, 2, 3], SamplingParams(**GREEDY))
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None


def test_eos_ends_an_answer_unless_ignored(tokenizer: Tokenizer) -> None:
    prompt = next(
        [i, i + 1]
        for i in range(90)
        if EOS in solo_answer([i, i + 1], SamplingParams(**GREEDY)).token_ids[3:9]
    )
    whole = solo_answer(prompt, SamplingParams(**GREEDY)).token_ids
    end = whole.index(EOS)
    engine = fake_engine(tokenizer=tokenizer)
    answer = run(engine, prompt, SamplingParams(temperature=0.0, max_tokens=20)).outputs[0]
    assert answer.token_ids == whole[: end + 1]  # the EOS itself is among the tokens
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
    assert answer.text == as_text(whole[:end])  # but not in the text
    kept = SamplingParams(temperature=0.0, skip_special_tokens=False)
    assert run(engine, prompt, kept).outputs[0].text == as_text(whole[:end])
    ignored = run(engine, prompt, SamplingParams(**GREEDY)).outputs[0]
    assert ignored.token_ids == whole and ignored.finish_reason == "length"


@pytest.mark.parametrize("include", [False, True])
def test_stop_token(tokenizer: Tokenizer, include: bool) -> None:
    whole = solo_answer([4, 9, 2], SamplingParams(**GREEDY)).token_ids
    stop = whole[6]
    end = whole.index(stop)
    params = SamplingParams(**GREEDY, stop_token_ids=(stop, 0), include_stop_str_in_output=include)
    answer = run(fake_engine(tokenizer=tokenizer), [4, 9, 2], params).outputs[0]
    assert answer.token_ids == whole[: end + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.text == as_text([t for t in whole[: end + include] if t != EOS])


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_across_tokens(tokenizer: Tokenizer, include: bool, stream: bool) -> None:
    whole = solo_answer([4, 9, 2], SamplingParams(**GREEDY)).token_ids
    text = as_text(whole)
    assert EOS not in whole
    params = SamplingParams(
        **GREEDY, stop=(text[7:10], "never"), include_stop_str_in_output=include
    )
    engine = fake_engine(tokenizer=tokenizer)
    engine.add_request("only", [4, 9, 2], params, stream=stream)
    chunks: list[OutputChunk] = []
    while engine.has_unfinished_requests:
        chunks += engine.step()
    assert chunks[-1].result is not None
    answer = chunks[-1].result.outputs[0]
    assert answer.text == text[: 10 if include else 7]
    assert answer.token_ids == whole[:10]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", text[7:10])
    if stream:
        assert "".join(chunk.text for chunk in chunks) == answer.text
        assert len(chunks) == 10


def test_what_a_stop_string_held_back_appears_at_the_end(tokenizer: Tokenizer) -> None:
    whole = solo_answer([4, 9, 2], SamplingParams(**GREEDY)).token_ids
    text = as_text(whole)
    params = SamplingParams(**GREEDY, stop=(text[-2:] + "?",))
    answer = run(fake_engine(tokenizer=tokenizer), [4, 9, 2], params).outputs[0]
    assert answer.text == text and answer.finish_reason == "length"


def test_min_tokens_masks_eos_and_stop_tokens_and_disarms_stop_strings(
    tokenizer: Tokenizer,
) -> None:
    whole = solo_answer([4, 9, 2], SamplingParams(**GREEDY)).token_ids
    text = as_text(whole)
    params = SamplingParams(**GREEDY, min_tokens=6, stop=(text[2:4], text[8:10]))
    answer = run(fake_engine(tokenizer=tokenizer), [4, 9, 2], params).outputs[0]
    assert answer.text == text[:8]
    params = SamplingParams(**GREEDY, min_tokens=6, stop_token_ids=whole[2:4])
    expected = solo_answer([4, 9, 2], params)
    assert expected.token_ids[2] != whole[2] and len(expected.token_ids) >= 6
    answer = run(fake_engine(tokenizer=tokenizer), [4, 9, 2], params).outputs[0]
    assert answer.token_ids == expected.token_ids


def test_the_context_is_a_limit_too() -> None:
    output = run(fake_engine(max_model_len=16), [1] * 11, SamplingParams(**GREEDY))
    assert len(output.outputs[0].token_ids) == 5
    assert output.outputs[0].finish_reason == "length"


def test_several_answers_differ_and_each_is_its_own(tokenizer: Tokenizer) -> None:
    params = SamplingParams(temperature=1.0, seed=11, n=4, max_tokens=9, ignore_eos=True)
    output = run(fake_engine(tokenizer=tokenizer, max_num_seqs=3), [1, 2, 3], params)
    check_answers(output, params)
    assert len({answer.token_ids for answer in output.outputs}) == 4
    assert output.metrics.num_output_tokens == 36
    greedy = run(fake_engine(), [1, 2, 3], SamplingParams(**GREEDY, n=2))
    assert greedy.outputs[0].token_ids == greedy.outputs[1].token_ids


def test_seeds() -> None:
    def texts(engine_seed: int, **params: Any) -> list[tuple[int, ...]]:
        engine = fake_engine(seed=engine_seed)
        for i in range(3):
            engine.add_request(f"{i}", [1, 2, 3], SamplingParams(max_tokens=12, **params))
        outputs = run_to_end(engine)
        return [outputs[f"{i}"].outputs[0].token_ids for i in range(3)]

    assert texts(1) == texts(1)
    assert len(set(texts(1) + texts(2))) == 6
    assert len(set(texts(1, seed=9) + texts(2, seed=9))) == 1
    assert derive_seed(0, "1") != derive_seed(1, "0")
    assert 0 <= derive_seed(0, "x") < 2**64


def test_a_nan_ends_its_request_alone() -> None:
    engine = fake_engine()
    params = SamplingParams(**GREEDY, n=2)
    engine.add_request("good", [1, 2, 3], SamplingParams(**GREEDY))
    engine.add_request("bad", [1, 2, NAN_TOKEN], params)
    engine.add_request("other", [3, 2, 1], SamplingParams(**GREEDY))
    outputs = run_to_end(engine)
    for name in ("good", "other"):
        check_answers(outputs[name], SamplingParams(**GREEDY))
    assert [answer.finish_reason for answer in outputs["bad"].outputs] == ["error", "error"]
    assert outputs["bad"].error is not None
    assert "NaN or an infinity at token 3 of request 'bad'" in outputs["bad"].error


def test_a_failed_stream_closes_each_of_its_answers() -> None:
    engine = fake_engine()
    engine.add_request("bad", [1, NAN_TOKEN], SamplingParams(**GREEDY, n=3), stream=True)
    chunks = engine.step()
    assert [(c.index, c.finish_reason) for c in chunks] == [(i, "error") for i in range(3)]
    assert [c.result is not None for c in chunks] == [False, False, True]


def test_abort_keeps_what_there_is(tokenizer: Tokenizer) -> None:
    engine = fake_engine(tokenizer=tokenizer)
    params = SamplingParams(**GREEDY)
    engine.add_request("gone", [4, 9, 2], params)
    engine.add_request("stays", [4, 9, 3], params)
    for _ in range(5):
        engine.step()
    output = engine.abort("gone")
    assert output is not None
    whole = solo_answer([4, 9, 2], params).token_ids
    assert output.outputs[0].token_ids == whole[:5]
    assert output.outputs[0].text == as_text(whole[:5])
    assert output.outputs[0].finish_reason == "abort"
    check_answers(run_to_end(engine)["stays"], params)
    assert engine.abort("gone") is None and engine.abort("never") is None


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt has no tokens"),
        ([1] * 48, {}, "has 48 tokens; expected at most 47"),
        ([1, VOCAB], {}, f"token 1 of the prompt is {VOCAB}; expected 0 to {VOCAB - 1}"),
        ([-1], {}, "token 0 of the prompt is -1"),
        ([1.5], {}, "token 0 of the prompt is 1.5; expected an integer"),
        ([1], {"stop_token_ids": (VOCAB,)}, f"stop_token_ids is {VOCAB}"),
        ([1], {"stop": ("x",)}, "no tokenizer"),
        ([1], {"min_tokens": 1, "stop_token_ids": tuple(range(VOCAB))}, "no token is left"),
    ],
)
def test_refusals(prompt: list[Any], params: dict[str, Any], message: str) -> None:
    engine = fake_engine()
    with pytest.raises(InvalidArgumentError, match=message):
        engine.add_request("bad", prompt, SamplingParams(**params))
    assert not engine.has_unfinished_requests
    engine.check_integrity()


def test_an_id_in_use_is_refused() -> None:
    engine = fake_engine()
    engine.add_request("a", [1], SamplingParams())
    with pytest.raises(InvalidArgumentError, match="'a' is already running"):
        engine.add_request("a", [1], SamplingParams())


def test_a_step_that_fails_can_be_repeated() -> None:
    engine = fake_engine()
    params = SamplingParams(**GREEDY)
    engine.add_request("a", [1, 2, 3], params)
    engine.step()
    runtime = engine.runtime
    assert isinstance(runtime, FakeRuntime)
    runtime.fail_next = RuntimeError("out of luck")
    with pytest.raises(RuntimeError, match="out of luck"):
        engine.step()
    check_answers(run_to_end(engine)["a"], params)


def test_an_engine_with_nothing_to_do() -> None:
    engine = fake_engine()
    assert engine.step() == []
    assert engine.num_steps == 0


def test_interrupts_wait_for_the_end_of_the_block() -> None:
    reached = []
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), deferred_interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("end")
    assert reached == ["end"]
    with pytest.raises(KeyboardInterrupt), deferred_interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("never")
    assert reached == ["end"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_text_of_a_sentencepiece_answer_keeps_its_first_space(tmp_path: Path) -> None:
    from text_helpers import sentencepiece_directory

    from octavo.engine.answer import Answer
    from octavo.engine.request import Request

    tokenizer = Tokenizer(sentencepiece_directory(tmp_path))
    ids = tokenizer.encode("The capital", add_special_tokens=False)
    texts = []
    for continues in (True, False):
        request = Request("r", None, (1,), SamplingParams(), continues_prompt=continues)
        answer = Answer(request, request.sequences[0], tokenizer, (2,))
        for token in ids:
            answer.push(token)
        answer.flush()
        texts.append(answer.text)
    assert texts == [" The capital", "The capital"]
