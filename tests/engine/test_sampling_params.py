"""What may be written into SamplingParams and EngineConfig, and what it means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine_helpers import fake_engine, run_to_end

from octavo import SamplingParams
from octavo.config import EngineConfig
from octavo.errors import InvalidArgumentError


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_p": 0}, {"top_p": 0.0}),
        ({"max_tokens": -1}, {"max_tokens": None}),
        ({"max_tokens": None, "min_tokens": 900}, {"max_tokens": None, "min_tokens": 900}),
        ({"seed": -1}, {"seed": None}),
        ({"seed": -2}, {"seed": 2**64 - 2}),
        ({"stop": None, "stop_token_ids": None}, {"stop": (), "stop_token_ids": ()}),
        ({"stop": ""}, {"stop": ()}),
        ({"stop": ["", "x", ""]}, {"stop": ("x",)}),
        ({"stop": "xy"}, {"stop": ("xy",)}),
        ({"logit_bias": None}, {"logit_bias": ()}),
        ({"logit_bias": {9: 1, 3: -2}}, {"logit_bias": ((3, -2.0), (9, 1.0))}),
        ({"max_tokens": np.int64(7), "n": np.int32(2)}, {"max_tokens": 7, "n": 2}),
        ({"temperature": np.float32(0.5), "min_p": np.float64(0.25)}, {"temperature": 0.5}),
        ({"temperature": None, "n": None, "top_p": None}, {"temperature": 1.0, "n": 1}),
        ({"skip_special_tokens": None, "ignore_eos": None}, {"skip_special_tokens": True}),
        ({"ignore_eos": np.bool_(True)}, {"ignore_eos": True}),
        ({"stop_token_ids": np.array([4, 5])}, {"stop_token_ids": (4, 5)}),
        ({"max_tokens": 10**400, "top_k": 2**70}, {"max_tokens": 2**64 - 1, "top_k": 2**64 - 1}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_vllm_takes_is_understood(given: dict[str, Any], kept: dict[str, Any]) -> None:
    params = SamplingParams(**given)
    for name, value in kept.items():
        found = getattr(params, name)
        assert found == value
        assert type(found) is type(value)  # no number of NumPy goes further
    assert hash(params) == hash(SamplingParams(**given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; expected 1 or more, or prompt_logprobs beside it"),
        ({"max_tokens": -2}, "max_tokens is -2"),
        ({"stop": 3}, "stop is 3; expected a list of strings"),
        ({"stop": {}}, "stop is {}; expected a list of strings"),
        ({"stop_token_ids": 3}, "stop_token_ids is 3; expected a list of token ids"),
        ({"stop_token_ids": "12"}, "stop_token_ids is '12'; expected a list of token ids"),
        ({"allowed_token_ids": 3}, "allowed_token_ids is 3; expected a list of token ids"),
        ({"logit_bias": 3}, "logit_bias is 3; expected a dict of token id -> number"),
        ({"max_tokens": 2.0}, "max_tokens is 2.0"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens is 5; expected an integer, 0 to 4"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"top_p": np.float32("nan")}, "top_p is"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"n": np.bool_(True)}, "n is"),
        ({"seed": 2**64}, "seed is"),
        ({"ignore_eos": "no"}, "ignore_eos is 'no'; expected True or False"),
        ({"stop": [5]}, "stop holds 5; expected strings"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"max_tokens": np.array([4, 5])}, "max_tokens is array"),
        ({"ignore_eos": np.array([4, 5])}, "ignore_eos is array"),
        ({"logits_processors": 3}, "logits_processors is 3"),
        ({"logit_bias": (1, 2)}, "logit_bias is "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_means_nothing_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        SamplingParams(**given)


@pytest.mark.parametrize(("num_blocks", "length"), [(64, 48), (2, 9)])
def test_no_limit_is_the_end_of_the_context_or_of_the_cache(num_blocks: int, length: int) -> None:
    engine = fake_engine(num_blocks=num_blocks)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    engine.add_request("all", [1, 2, 3], params)
    (answer,) = run_to_end(engine)["all"].outputs
    assert (len(answer.token_ids), answer.finish_reason) == (length - 3, "length")
    (arrived,) = (event for event in engine.events if event[1] == "arrived")
    assert arrived[4] == length - 3


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("bfloat16", "bf16"),
        ("float16", "f16"),
        ("half", "f16"),
        ("float32", "f32"),
        ("float", "f32"),
        ("auto", "auto"),
        ("bf16", "bf16"),
    ],
)
def test_formats_under_torch_s_names(given: Any, kept: str) -> None:
    class Torch:
        def __str__(self) -> str:
            return f"torch.{given}"

    values: list[Any] = [given, Torch()]
    values += {"float32": [np.float32, np.dtype("float32")], "float16": [np.float16]}.get(given, [])
    for value in values:
        config = EngineConfig(dtype=value, kv_dtype=value)
        assert (config.dtype, config.kv_dtype) == (kept, kept)


@pytest.mark.parametrize("given", ["float64", "bf", None, 16])
def test_a_format_that_is_none(given: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^dtype is '{given}'; expected one of auto"):
        EngineConfig(dtype=given)
