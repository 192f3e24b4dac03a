"""Beam search is that of `generate(num_beams=...)`; contrastive decoding is the paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_helpers import SMOLLM2_MISSING, smollm2_path

from hf.hf_models import SHAPES, make_hf_model
from hf.hf_smollm2 import SmolLM2
from octavo.errors import InvalidArgumentError
from octavo.llm import LLM
from octavo.reference.search import beam_search, contrastive_choice, similarity_choice
from octavo.sampling_params import SamplingParams
from octavo.search.contrastive import ContrastiveParams
from octavo.search.params import BeamSearchParams
from octavo.search.similarity import ContrastiveSearch, ContrastiveSearchParams

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
        model.lm_head.weight[list(STOPS)] *= 3
    model.generation_config.eos_token_id = list(STOPS)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path)
    llm = LLM(tmp_path, dtype="f32", max_model_len=128, device="cpu")
    assert llm.engine.eos_token_ids == frozenset(STOPS)

    def row(tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1]
        return torch.log_softmax(logits.float(), -1).numpy()

    num_ended = num_changed = 0
    for index, case in enumerate(CASES):
        prompt = np.random.default_rng(index).integers(0, 131, size=3 + index).tolist()
        expected = hf_beams(model, prompt, 12, **case)
        assert ours(llm, prompt, 12, **case) == expected, case
        num_ended += sum(answer[-1] in STOPS for answer in expected)
        if index % 5 == 0:
            found = beam_search(row, prompt, max_tokens=12, stop_token_ids=STOPS, **case)
            assert [tokens for tokens, _ in found] == expected, case
        shifted = {**case, "length_penalty": case["length_penalty"] + 3.0}
        num_changed += ours(llm, prompt, 12, **shifted) != expected
    assert num_ended > 10 and num_changed > 3  # some end early, and the penalty matters


@pytest.mark.filterwarnings("ignore")
def test_contrastive_decoding_is_the_papers(tmp_path: Path) -> None:
    models: list[Any] = []
    num_changed = 0
    for index, shape in enumerate(("plain_3x128", "mqa_5_1x80")):
        model = make_hf_model({**SHAPES[shape], "vocab_size": 131}, seed=index)
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        model.save_pretrained(tmp_path / str(index))
        models.append(model)

    def row(model: Any, tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1], -1).numpy()

    llm = LLM(tmp_path / "0", dtype="f32", max_model_len=128, device="cpu")
    prompts = [np.random.default_rng(i).integers(0, 131, size=5 + 9 * i).tolist() for i in range(3)]
    for alpha, temperature in ((0.1, 1.0), (0.5, 0.7), (0.01, 1.5)):
        params = ContrastiveParams(15, alpha, temperature, ignore_eos=True)
        outputs = llm.contrastive_decoding(prompts, tmp_path / "1", params, progress=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            tokens = list(prompt)
            for _ in range(15):
                rows = [row(model, tokens) for model in models]
                tokens.append(contrastive_choice(rows[0], rows[1], alpha, temperature))
            assert list(output.outputs[0].token_ids) == tokens[len(prompt) :]
            greedy = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=15))
            num_changed += greedy[0].outputs[0].token_ids != output.outputs[0].token_ids
    assert num_changed > 5
    other = make_hf_model(SHAPES["plain_4x32"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InvalidArgumentError, match="has 307 tokens; expected 131"):
        llm.contrastive_decoding(prompts, tmp_path / "other")


@pytest.mark.filterwarnings("ignore")
def test_contrastive_search_is_the_papers(tmp_path: Path) -> None:
    model = make_hf_model({**SHAPES["plain_3x128"], "vocab_size": 131}, seed=2)
    model.save_pretrained(tmp_path)
    search = ContrastiveSearch(str(tmp_path), 6, dtype="f32", max_model_len=400, device="cpu")

    def look(tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            found = model(torch.tensor([tokens]), output_hidden_states=True)
        return found.hidden_states[-1][0].numpy(), found.logits[0, -1].numpy()

    num_changed = 0
    for index, (alpha, k) in enumerate(((0.6, 4), (0.9, 6), (0.0, 5))):
        prompt = np.random.default_rng(index).integers(0, 131, size=3 + 140 * index).tolist()
        tokens, greedy = list(prompt), list(prompt)
        for _ in range(10):
            states, logits = look(tokens)
            best = np.argsort(-logits)[:k]
            probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            candidates = np.stack([look([*tokens, int(token)])[0][-1] for token in best])
            chosen = similarity_choice(probabilities[best], candidates, states, alpha)
            tokens.append(int(best[chosen]))
            greedy.append(int(look(greedy)[1].argmax()))
        params = ContrastiveSearchParams(alpha, k, 10)
        assert search.generate(prompt, params) == tokens[len(prompt) :], alpha
        num_changed += tokens != greedy
        assert (tokens == greedy) or alpha > 0
    assert num_changed
    with pytest.raises(InvalidArgumentError, match="top_k is 7; expected at most 6"):
        search.generate([1], ContrastiveSearchParams(top_k=7))
    with pytest.raises(InvalidArgumentError, match="the prompt has 400 tokens"):
        search.generate([1] * 400)


@pytest.mark.slow
@pytest.mark.skipif(smollm2_path() is None, reason=SMOLLM2_MISSING)
@pytest.mark.filterwarnings("ignore")
def test_of_a_real_model(smollm2: SmolLM2) -> None:
    llm = LLM(smollm2.path, dtype="f32", max_model_len=256, device="cpu")
    prompt = smollm2.tokens("The three primary colours are").tolist()
    for early in (False, "never"):
        case = {"num_beams": 4, "length_penalty": 1.0, "early_stopping": early}
        assert ours(llm, prompt, 24, **case) == hf_beams(smollm2.hf_model, prompt, 24, **case)
