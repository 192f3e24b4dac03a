"""Beam search gives the tokens of transformers' `generate(num_beams=...)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_helpers import SMOLLM2_MISSING, smollm2_path

from hf.hf_models import SHAPES, make_hf_model
from octavo.llm import LLM
from octavo.reference.search import beam_search
from octavo.search.params import BeamSearchParams

pytestmark = pytest.mark.hf
STOPS = (3, 50, 120)
CASES: list[dict[str, Any]] = [
    {"num_beams": beams, "length_penalty": penalty, "early_stopping": early}
    for beams, penalty in ((1, 1.0), (2, 1.0), (4, 0.0), (4, 1.0), (5, -0.8), (3, 2.0))
    for early in (False, True, "never")
]


def hf_beams(model: Any, prompt: list[int], max_tokens: int, **options: Any) -> list[list[int]]:
    """Of each beam the new tokens, up to the first stop token."""
    with torch.no_grad():
        found = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=max_tokens,
            num_return_sequences=options["num_beams"],
            **options,
        )
    stops = model.generation_config.eos_token_id
    stops = [stops] if isinstance(stops, int) else stops
    answers = []
    for row in found[:, len(prompt) :].tolist():
        ends = [index + 1 for index, token in enumerate(row) if token in stops]
        answers.append(row[: min(ends, default=len(row))])
    return answers


def ours(llm: LLM, prompt: list[int], max_tokens: int, **options: Any) -> list[list[int]]:
    beams = options.pop("num_beams")
    params = BeamSearchParams(beams, max_tokens, **options)
    (output,) = llm.beam_search(prompt, params, progress=False)
    return [list(answer.token_ids) for answer in output.outputs]


@pytest.mark.filterwarnings("ignore")
def test_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    model = make_hf_model({**SHAPES["smollm_9_3x64"], "vocab_size": 131}, seed=4)
    with torch.no_grad():  # flatter, so that beams differ, and answers end at different lengths
        model.lm_head.weight.mul_(0.15)
    model.generation_config.eos_token_id = list(STOPS)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path)
    llm = LLM(tmp_path, dtype="f32", max_model_len=128, device="cpu")
    assert llm.engine.eos_token_ids == frozenset(STOPS)

    def row(tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1]
        return torch.log_softmax(logits.float(), -1).numpy()

    num_ended = 0
    for index, case in enumerate(CASES):
        prompt = np.random.default_rng(index).integers(0, 131, size=3 + index).tolist()
        expected = hf_beams(model, prompt, 12, **case)
        assert ours(llm, prompt, 12, **case) == expected, case
        num_ended += sum(answer[-1] in STOPS for answer in expected)
        if index % 5 == 0:
            found = beam_search(row, prompt, max_tokens=12, stop_token_ids=STOPS, **case)
            assert [tokens for tokens, _ in found] == expected, case
        shifted = {**case, "length_penalty": case["length_penalty"] + 3.0}
        if ours(llm, prompt, 12, **shifted) != expected:
            num_ended += 1000
    assert num_ended > 2010  # some answers end early, and the penalty matters


@pytest.mark.slow
@pytest.mark.skipif(smollm2_path() is None, reason=SMOLLM2_MISSING)
@pytest.mark.filterwarnings("ignore")
def test_of_a_real_model() -> None:
    from hf.hf_smollm2 import SmolLM2

    path = smollm2_path()
    assert path is not None
    smollm2 = SmolLM2(path)
    llm = LLM(path, dtype="f32", max_model_len=256, device="cpu")
    prompt = smollm2.tokens("The three primary colours are").tolist()
    for early in (False, "never"):
        case = {"num_beams": 4, "length_penalty": 1.0, "early_stopping": early}
        assert ours(llm, prompt, 24, **case) == hf_beams(smollm2.hf_model, prompt, 24, **case)
