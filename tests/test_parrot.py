"""The parrot of other tests: what it says, and with which probability."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from parrot import END, GO, byte_tokens, say, write_parrot

from octavo.llm import LLM
from octavo.sampling_params import SamplingParams


def test_it_says_what_it_is_told(tmp_path: Path) -> None:
    unicorn = byte_tokens("🦄 ".encode())
    write_parrot(tmp_path, say("Hello", *unicorn, "<mark>"), special=["<mark>"])
    (output,) = LLM(tmp_path, num_threads=1).chat(
        [[{"role": "user", "content": "x"}]], SamplingParams(temperature=0), progress=False
    )
    (answer,) = output.outputs
    assert answer.text == "Hello🦄 " and answer.finish_reason == "stop"
    assert len(answer.token_ids) == 1 + len(unicorn) + 2


def test_its_probabilities_are_known(tmp_path: Path) -> None:
    write_parrot(tmp_path, {GO: {"yes": 3.0, "no": 2.0}, "yes": END, "no": END})
    llm = LLM(tmp_path, num_threads=1)
    params = SamplingParams(temperature=0, logprobs=2)
    (output,) = llm.generate([GO], params, progress=False)
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    others = llm.engine.vocab_size - 2
    total = math.log(math.exp(3) + math.exp(2) + others)
    assert logprobs[0].top_logprobs == pytest.approx([3 - total, 2 - total], abs=1e-4)


def test_a_chain_that_is_not_one() -> None:
    with pytest.raises(ValueError, match="twice"):
        say("a", "b", "a")
