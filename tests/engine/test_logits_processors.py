"""A user's own logits processors: what they get, what comes of it, and that no other notices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda_helpers import DEVICE, needs_cuda
from engine_helpers import FakeDrafter, run_to_end
from invariance_helpers import (
    MODES,
    alone,
    facts,
    make_engine,
    others,
    prompt_of,
    run,
    run_preempted,
    subjects,
)
from runtime_helpers import VOCAB as TINY_VOCAB
from runtime_helpers import make_batch, tiny_runtime

from octavo.config import RuntimeOptions
from octavo.engine.engine import Engine
from octavo.engine.pipeline import Pipeline
from octavo.errors import InvalidArgumentError
from octavo.reference import sampling
from octavo.sampling_params import SamplingParams, takes_prompt
from octavo.search.beam import BeamSearch
from octavo.search.params import BeamSearchParams

Tokens = tuple[int, ...]
PROMPT = [5, 17, 80, 2, 2, 41, 9]
WARM = SamplingParams(temperature=0.8, top_p=0.95, seed=11, max_tokens=20, ignore_eos=True)


def same(prompt: Tokens, answer: Tokens, logits: np.ndarray) -> np.ndarray:
    return logits


def picky(prompt: Tokens, answer: Tokens, logits: np.ndarray) -> np.ndarray:
    """Depends on all that it gets, forbids tokens, and works in place."""
    logits *= np.float32(1.5)
    logits[prompt[-1]] += len(answer)
    logits[list(answer[-3:])] = -np.inf
    logits[sum(answer) % len(logits)] += 3
    return logits


def tiny_engine(overlap: bool = False, device: str = "cpu") -> Engine:
    options = RuntimeOptions("f32", "f32", 16, 256, 8, 128, 2, overlap_steps=overlap)
    runtime = tiny_runtime(num_blocks=32, device=device)
    return Engine(runtime, options, num_kv_blocks=32, vocab_size=TINY_VOCAB)


# ---- a function that changes nothing changes no bit ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("overlap", [False, True])
def test_identity_has_the_bits_of_plain_sampling(mode: str, overlap: bool) -> None:
    """In a crowd, with prompts in pieces, beside drafts, after a prefix hit, and preempted."""
    expected = alone("f32", mode)
    params = replace(MODES[mode], logits_processors=(same,))
    drafter = FakeDrafter(lambda sequence, count: [7] * count, 4)
    engine = make_engine(max_num_batched_tokens=29, overlap_steps=overlap, drafter=drafter)
    assert facts(run(engine, {**others(), **subjects(params)})) == expected
    assert drafter.num_proposed > 50  # of the others: who has a processor takes no drafts
    again = run(engine, subjects(params), apart=True)
    assert facts(again) == expected
    assert sum(output.metrics.num_cached_tokens for output in again.values()) > 300
    small = make_engine(max_num_seqs=1, num_blocks=33, overlap_steps=overlap)
    found = run_preempted(small, "subject77", subjects(params)["subject77"], (3, 9))
    assert facts(found)["subject77"] == expected["subject77"]
    assert found["subject77"].metrics.num_preemptions == 2


def test_beside_rows_of_prompts() -> None:
    """The rows of log-probabilities of prompts lie among those that are sampled."""
    scored = replace(MODES["sampled"], prompt_logprobs=2)
    requests = {**others(6), **subjects(scored)}
    expected = run(make_engine(max_num_batched_tokens=64), requests)
    own = {
        name: (prompt, replace(params, logits_processors=(same,)))
        for name, (prompt, params) in requests.items()
    }
    found = run(make_engine(max_num_batched_tokens=64), own)
    assert facts(found) == facts(expected)
    for name in requests:
        assert found[name].prompt_logprobs == expected[name].prompt_logprobs


@pytest.mark.parametrize("planted", ["rows reversed", "logits not put back"])
def test_planted_errors_are_seen(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if planted == "rows reversed":
        put = Pipeline.set_logits
        monkeypatch.setattr(
            Pipeline, "set_logits", lambda self, rows, values: put(self, rows[::-1], values)
        )
    else:
        monkeypatch.setattr(Pipeline, "set_logits", lambda *_: None)
    engine = tiny_engine()
    for name, processor in (("a", picky), ("b", same)):
        engine.add_request(name, PROMPT, replace(WARM, logits_processors=(processor,)))
    found = run_to_end(engine)
    assert list(found["a"].outputs[0].token_ids) != expected_answer(picky)


# ---- a function that changes them ----


def expected_answer(processor: Callable[..., Any], sample_index: int = 0) -> list[int]:
    """One token at a time, by the reference, the penalty after the function."""
    runtime, history = tiny_runtime(), list(PROMPT)
    for _ in range(WARM.max_tokens or 0):
        ticket = runtime.submit(make_batch([(history, 0, [0, 1, 2])]))
        logits = runtime.logits(ticket)[0]
        runtime.wait(ticket)
        logits = processor(tuple(PROMPT), tuple(history[len(PROMPT) :]), logits)
        row = sampling.sampling_rows(
            1,
            temperature=WARM.temperature,
            top_p=WARM.top_p,
            seed=WARM.seed,
            sample_index=sample_index,
            position=len(history),
        )[0]
        history.append(sampling.sample_row(logits, row))
    return history[len(PROMPT) :]


@pytest.mark.parametrize(
    ("overlap", "device"),
    [
        (False, "cpu"),
        (True, "cpu"),
        pytest.param(True, DEVICE, marks=needs_cuda, id="cuda"),
    ],
)
def test_answers_equal_the_reference(overlap: bool, device: str) -> None:
    engine = tiny_engine(overlap, device)
    params = replace(WARM, logits_processors=picky, n=2, logprobs=3)  # one needs no list
    engine.add_request("a", PROMPT, params)
    engine.add_request("plain", PROMPT, WARM)
    outputs = run_to_end(engine)
    for index, answer in enumerate(outputs["a"].outputs):
        assert list(answer.token_ids) == expected_answer(picky, index)
    assert list(outputs["plain"].outputs[0].token_ids) == expected_answer(same)


def test_log_probabilities_are_of_what_the_function_made() -> None:
    def few(prompt: Tokens, answer: Tokens, logits: np.ndarray) -> np.ndarray:
        found = np.full_like(logits, -np.inf)
        found[[3, 40, 41]] = 0.0, 1.0, 2.0
        return found.astype(np.float64)  # is rounded

    engine = tiny_engine()
    params = replace(WARM, temperature=3, logits_processors=[few], logprobs=5, bad_words=())
    engine.add_request("a", PROMPT, params)
    answer = run_to_end(engine)["a"].outputs[0]
    expected = np.array([2.0, 1.0, 0.0]) - np.log(np.exp([2.0, 1.0, 0.0]).sum())
    assert set(answer.token_ids) == {3, 40, 41}
    for entry in answer.logprobs or ():
        assert entry.top_token_ids == (41, 40, 3)  # not those that were forbidden
        np.testing.assert_allclose(entry.top_logprobs, expected, rtol=1e-6)
        assert entry.rank == 1 + entry.top_token_ids.index(entry.token_id)
        assert entry.logprob == entry.top_logprobs[entry.rank - 1]


def test_masks_and_penalties_come_after_it() -> None:
    def flat(answer: Tokens, logits: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(logits)) < 4, np.float32(1), np.float32(-np.inf))

    params = SamplingParams(
        temperature=0,
        max_tokens=6,
        logits_processors=[flat],
        allowed_token_ids=(1, 2, 3, 50),
        frequency_penalty=0.5,
    )
    engine = tiny_engine()
    engine.add_request("a", PROMPT, params)
    assert run_to_end(engine)["a"].outputs[0].token_ids == (1, 2, 3, 1, 2, 3)


@pytest.mark.parametrize("device", ["cpu", pytest.param(DEVICE, marks=needs_cuda, id="cuda")])
@pytest.mark.parametrize("temperature", [0.7, 1e-8])
def test_the_largest_logits_stay_numbers(temperature: float, device: str) -> None:
    """Some tokens are forced by float32's largest number, which a temperature made infinite."""

    def force(prompt: Tokens, answer: Tokens, logits: np.ndarray) -> np.ndarray:
        logits[[40, 41]] = np.finfo(np.float32).max
        return logits

    engine = tiny_engine(device=device)
    filters = {"p": {"top_p": 0.9}, "min": {"min_p": 0.1}, "typical": {"typical_p": 0.9}, "all": {}}
    for name, options in filters.items():
        params = SamplingParams(temperature, max_tokens=4, logits_processors=[force], **options)
        engine.add_request(name, PROMPT, params)
    for name, output in run_to_end(engine).items():
        assert set(output.outputs[0].token_ids) <= {40, 41}, name


def test_what_a_function_gets_and_the_order_of_several() -> None:
    seen: list[Any] = []

    def first(answer: Tokens, logits: np.ndarray) -> np.ndarray:
        seen.append((answer, logits.dtype, logits.shape, logits.flags.writeable))
        return logits + len(answer)

    def second(prompt: Tokens, answer: Tokens, logits: np.ndarray) -> np.ndarray:
        assert prompt == tuple(PROMPT)
        return np.where(np.arange(len(logits)) == round(float(logits.mean())) % 50, 9.0, -9.0)

    def third(prompt: Tokens, answer: Tokens, logits: np.ndarray) -> np.ndarray:
        assert set(logits.tolist()) == {9.0, -9.0}
        return np.roll(logits, 1)

    engine = tiny_engine(overlap=True)
    params = SamplingParams(temperature=0, max_tokens=5, logits_processors=[first, second, third])
    engine.add_request("a", PROMPT, params)
    answer = run_to_end(engine)["a"].outputs[0].token_ids
    assert [one[0] for one in seen] == [answer[:i] for i in range(5)]
    assert all(one[1:] == (np.float32, (TINY_VOCAB,), True) for one in seen)


# ---- mistakes ----


def nothing(prompt: Tokens, answer: Tokens, logits: np.ndarray) -> None:
    logits += 1


def poisoned(value: float) -> Callable[..., np.ndarray]:
    def poison(prompt: Tokens, answer: Tokens, logits: np.ndarray) -> np.ndarray:
        logits[17 if len(answer) == 4 else 0] = value if len(answer) == 4 else 0
        return logits

    return poison


def broken(prompt: Tokens, answer: Tokens, logits: np.ndarray) -> np.ndarray:
    if len(answer) == 4:
        raise RuntimeError("broken on purpose")
    return logits


FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "raises": (broken, "RuntimeError: broken on purpose"),
    "None": (nothing, "nothing returned None; .*return the array, even if you changed it"),
    "shape": (lambda p, a, x: x[1:], r"returned float32 of shape \(82,\); expected .*\(83,\)"),
    "kind": (lambda p, a, x: x.astype(np.int64), "returned int64 of shape"),
    "text": (lambda p, a, x: "more", "returned <U4 of shape"),
    "NaN": (poisoned(np.nan), "poison returned nan as the logit of token 17"),
    "infinity": (poisoned(np.inf), "poison returned inf as the logit of token 17"),
    "overflow": (lambda p, a, x: x.astype(np.float64) * 1e300, "returned inf as the logit"),
    "all": (lambda p, a, x: x * 0 - np.inf, "its logits processors forbid every token"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_its_own_request_alone(name: str) -> None:
    processor, message = FAULTS[name]
    engine = tiny_engine(overlap=True)
    engine.add_request("bad", PROMPT, replace(WARM, logits_processors=[processor], n=2))
    engine.add_request("own", PROMPT, replace(WARM, logits_processors=[picky]))
    engine.add_request("plain", PROMPT, WARM)
    outputs = run_to_end(engine)
    error = outputs["bad"].error
    assert error is not None and "the next token of request 'bad' cannot be chosen" in error
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)
    assert {answer.finish_reason for answer in outputs["bad"].outputs} == {"error"}
    assert list(outputs["own"].outputs[0].token_ids) == expected_answer(picky)
    assert list(outputs["plain"].outputs[0].token_ids) == expected_answer(same)
    assert engine.blocks.num_free_blocks == engine.blocks.num_blocks


def test_both_contracts_are_told_apart() -> None:
    class Both:
        def __call__(self, prompt: Any, answer: Any, logits: Any) -> Any:
            return logits

        def two(self, answer: Any, logits: Any, strength: float = 1.0) -> Any:
            return logits

    assert takes_prompt(same) and takes_prompt(Both()) and takes_prompt(lambda *_: 0)
    assert takes_prompt(lambda a, b, c, d=1: 0) and takes_prompt(print)
    assert not takes_prompt(Both().two) and not takes_prompt(lambda a, b: 0)
    assert not takes_prompt(lambda a, b=0: 0)
    for given in (3, [3], [lambda: 0], [lambda a: 0], [lambda a, b, c, d: 0]):
        with pytest.raises((InvalidArgumentError, TypeError), match="logits_processors|iterable"):
            SamplingParams(logits_processors=given)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="logits_processors holds 3; expected functions"):
        SamplingParams(logits_processors=[3])  # type: ignore[arg-type]


def test_a_search_refuses_it() -> None:
    engine = make_engine()
    search = BeamSearch(BeamSearchParams(2), (), 9)
    with pytest.raises(InvalidArgumentError, match="logits_processors is given, but a search"):
        engine.add_request(
            "a", prompt_of(5, 1), replace(WARM, logits_processors=[same]), search=search
        )


def test_rows_of_a_runtime() -> None:
    runtime = tiny_runtime()
    batch = make_batch([([1, 2, 3], 0, [0]), ([4], 0, [1]), ([5, 6], 0, [2])], num_logprobs=0)
    ticket = runtime.submit(batch)
    every = runtime.logits(ticket)
    assert np.array_equal(runtime.logits(ticket, np.array([2, 0], np.int32)), every[[2, 0]])
    with pytest.raises(ValueError, match="rows names row 3; expected 0 to 2"):
        runtime.logits(ticket, np.array([3], np.int32))
    for row, count, message in ((3, TINY_VOCAB, "row is 3"), (0, 5, "values has 5 numbers")):
        with pytest.raises(ValueError, match=message):
            runtime.set_logits(ticket, row, np.zeros(count, np.float32))
    changed = np.zeros(TINY_VOCAB, np.float32)
    changed[50] = 2
    runtime.set_logits(ticket, 1, changed)
    runtime.sample(ticket)
    with pytest.raises(ValueError, match="is sampled already"):
        runtime.set_logits(ticket, 1, changed)
    output = runtime.wait(ticket)
    assert output.token_ids[1] == 50 and output.ranks.tolist() == [1, 1, 1]
    assert output.token_ids[0] == every[0].argmax() and output.token_ids[2] == every[2].argmax()
