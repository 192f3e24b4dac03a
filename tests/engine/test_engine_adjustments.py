"""Penalties and biases through the engine: against the formula, spelled out token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from runtime_helpers import VOCAB, make_batch, tiny_runtime

from octavo.config import RuntimeOptions
from octavo.engine.engine import Engine
from octavo.errors import InvalidArgumentError
from octavo.reference import sampling
from octavo.sampling_params import SamplingParams

PROMPTS = [[5, 17, 80, 2, 2, 41, 9], [1], [80, 80, 80, 7, 3, 30, 31, 32, 33], [12, 60, 61]]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
WARM = replace(GREEDY, temperature=0.8, seed=11)


def tiny_engine(num_blocks: int = 32, overlap_steps: bool = False) -> Engine:
    options = RuntimeOptions("f32", "f32", 16, 256, 8, 128, 2, overlap_steps=overlap_steps)
    runtime = tiny_runtime(num_blocks=num_blocks)
    return Engine(runtime, options, num_kv_blocks=num_blocks, vocab_size=VOCAB)


def answers(engine: Engine, requests: Sequence[tuple[list[int], SamplingParams]]) -> list[Any]:
    for index, (prompt, params) in enumerate(requests):
        engine.add_request(str(index), prompt, params)
    results: dict[str, Any] = {}
    while engine.has_unfinished_requests:
        for chunk in engine.step():
            if chunk.result is not None:
                results[chunk.request_id] = chunk.result
    return [results[str(index)] for index in range(len(requests))]


def expected_tokens(prompt: list[int], params: SamplingParams) -> list[int]:
    """One token at a time, every logit of the vocabulary by the formula."""
    runtime = tiny_runtime()
    history = list(prompt)
    for _ in range(params.max_tokens):
        ticket = runtime.submit(make_batch([(history, 0, [0, 1, 2])]))
        logits = runtime.logits(ticket)[0]
        runtime.wait(ticket)
        bias = dict(params.logit_bias)
        answer = history[len(prompt) :]
        for token in range(VOCAB):
            x = logits[token]
            if token in history:
                rate = np.float32(params.repetition_penalty)
                x = x / rate if x > 0 else x * rate
            change = np.float32(bias.get(token, 0.0))
            change -= np.float32(params.frequency_penalty) * np.float32(answer.count(token))
            change -= np.float32(params.presence_penalty) * np.float32(token in answer)
            logits[token] = x + change
        options = ("temperature", "top_k", "top_p", "min_p", "seed")
        asked = {name: getattr(params, name) or 0 for name in options}
        row = sampling.sampling_rows(1, **asked, position=len(history))[0]
        history.append(sampling.sample_row(logits, row))
    return history[len(prompt) :]


CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "repetition": {"repetition_penalty": 1.3},
    "encouraged": {"repetition_penalty": 0.8},
    "frequency": {"frequency_penalty": 0.7},
    "presence": {"presence_penalty": 1.5},
    "negative": {"presence_penalty": -1.0, "frequency_penalty": -0.25},
    "bias": {"logit_bias": {7: 4.0, 80: -3.5, 0: 2.0}},
    "all": {
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.4,
        "logit_bias": {80: 1.0, 41: -100, 3: 2.25},
    },
}


@pytest.mark.parametrize("base", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("name", CHANGES)
def test_tokens_are_those_of_the_formula(name: str, base: SamplingParams) -> None:
    params = replace(base, **CHANGES[name])
    for prompt in PROMPTS[:2]:
        (output,) = answers(tiny_engine(), [(prompt, params)])
        assert list(output.outputs[0].token_ids) == expected_tokens(prompt, params)


def test_every_kind_changes_something() -> None:
    """Else the test above would pass with adjustments that are never applied."""
    plain = expected_tokens(PROMPTS[0], GREEDY)
    for name, changes in CHANGES.items():
        changed = expected_tokens(PROMPTS[0], replace(GREEDY, **changes))
        assert (changed == plain) == (name == "nothing"), name


@pytest.mark.parametrize("overlap_steps", [False, True])
@pytest.mark.parametrize("num_blocks", [32, 7])
def test_in_company_and_preempted_as_alone(num_blocks: int, overlap_steps: bool) -> None:
    """Requests with and without penalties in one batch; 7 blocks are too few for all of them.

    With two steps in flight a penalty must still know the token before.
    """
    requests = [
        (PROMPTS[index % len(PROMPTS)], replace(base, **changes))
        for base in (GREEDY, WARM)
        for index, changes in enumerate(CHANGES.values())
    ][:7]
    alone = [answers(tiny_engine(), [request])[0] for request in requests]
    engine = tiny_engine(num_blocks, overlap_steps)
    together = answers(engine, requests)
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]
    preempted = any(output.metrics.num_preemptions for output in together)
    assert preempted == (num_blocks == 7)


def test_log_probabilities_are_the_models_own() -> None:
    params = replace(GREEDY, max_tokens=1, logprobs=4)
    (plain,) = answers(tiny_engine(), [(PROMPTS[0], params)])
    (biased,) = answers(tiny_engine(), [(PROMPTS[0], replace(params, logit_bias={7: 99}))])
    (before,), (after,) = plain.outputs[0].logprobs, biased.outputs[0].logprobs
    assert after.token_id == 7 != before.token_id
    assert (after.top_token_ids, after.top_logprobs) == (before.top_token_ids, before.top_logprobs)
    assert after.logprob < before.logprob


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("repetition_penalty", 0, "repetition_penalty is 0; expected 0.01 or more, at most 100"),
        ("repetition_penalty", float("nan"), "repetition_penalty is nan"),
        ("frequency_penalty", 2.5, "frequency_penalty is 2.5; expected -2 or more, at most 2"),
        ("presence_penalty", -3, "presence_penalty is -3"),
        ("logit_bias", {3: 101}, "logit_bias of token 3 is 101; expected -100 or more"),
        ("logit_bias", {-1: 1}, "token id of logit_bias is -1"),
        ("logit_bias", {"7": 1}, "token id of logit_bias is '7'"),
    ],
)
def test_wrong_values_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        SamplingParams(**{field: value})


def test_a_biased_token_must_be_in_the_vocabulary() -> None:
    with pytest.raises(InvalidArgumentError, match=f"token id of logit_bias is {VOCAB}"):
        tiny_engine().add_request("a", [1], SamplingParams(logit_bias={VOCAB: 1.0}))
