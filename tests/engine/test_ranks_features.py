"""What requests may ask for, of a model divided between two ranks: the answers of one process.

Numbers differ by rounding, so log-probabilities are compared within it, and tokens exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_helpers import ALL, adapter_config, random_adapter, write_adapter
from quantization_helpers import CONFIG, write_family_model, write_float_model
from rank_helpers import DIVISIBLE, load_llm
from text_helpers import byte_level_directory

from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from octavo.search.contrastive import ContrastiveParams
from octavo.search.params import BeamSearchParams
from octavo.search.similarity import ContrastiveSearch, ContrastiveSearchParams
from octavo.structured_outputs import StructuredOutputs

ROUNDING = 2e-5  # of log-probabilities, which are near 4, and of sums of sixteen of them
PROMPTS = [[(i * i * (3 + s) + s) % 67 for i in range(n)] for s, n in enumerate((40, 3, 21))]
VOCAB = 512  # that of the tokenizer
# 3 heads, which two ranks cannot divide.
SMALL = {"num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, a smaller one of the same vocabulary, two adapters."""
    folder = tmp_path_factory.mktemp("models")
    config = {**CONFIG, **DIVISIBLE, "vocab_size": VOCAB}
    changes = {**DIVISIBLE, "vocab_size": VOCAB}
    write_float_model(folder / "model", "F32", **changes)
    byte_level_directory(folder / "model")
    write_float_model(folder / "small", "F32", **{**changes, **SMALL})
    byte_level_directory(folder / "small")
    for seed, (name, targets) in enumerate(ADAPTERS.items()):
        tensors = random_adapter(config, targets, seed=seed)
        write_adapter(folder / name, tensors, adapter_config(target_modules=list(targets)))
    return folder


ADAPTERS = {"all": (*ALL, "embed_tokens", "lm_head"), "some": ("v_proj", "down_proj", "o_proj")}


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[tuple[LLM, LLM]]:
    options = {"dtype": "f32", "max_num_seqs": 6, "max_adapters": 1}
    one, two = (load_llm(folder / "model", ranks, **options) for ranks in (1, 2))
    yield one, two
    two.close()


def check_equal(outputs: tuple[list[Any], list[Any]], count: int = 3) -> None:
    """Same tokens, nearly the same log-probabilities."""
    one, two = ([answer for output in each for answer in output.outputs] for each in outputs)
    assert [a.token_ids for a in one] == [a.token_ids for a in two]
    assert [a.finish_reason for a in one] == [a.finish_reason for a in two]
    assert len({a.token_ids for a in one}) >= count
    for a, b in zip(one, two, strict=True):
        if a.cumulative_logprob is not None:
            assert abs(a.cumulative_logprob - b.cumulative_logprob) < 16 * ROUNDING


def both(pair: tuple[LLM, LLM], params: SamplingParams, **more: Any) -> tuple[list[Any], list[Any]]:
    one, two = (llm.generate(PROMPTS, params, progress=False, **more) for llm in pair)
    return one, two


def only_odd(prompt: Any, answer: Any, logits: np.ndarray) -> np.ndarray:
    logits[::2] = -np.inf
    logits[answer[-1] if answer else 1] -= 3
    return logits


FEATURES: dict[str, dict[str, Any]] = {
    "sampled": {},
    "greedy": {"temperature": 0},
    "filters": {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95},
    "penalties": {
        **{"repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": 0.2},
        "dry_multiplier": 0.8,
    },
    "logit_bias": {"logit_bias": {7: 4.5, 11: -100.0, 33: 3.0}},
    "allowed tokens": {"allowed_token_ids": (3, 5, 7, 9, 40, 41, 300)},
    "several answers": {"n": 3},
    "processors": {"logits_processors": (only_odd,)},
    "structured": {"structured_outputs": StructuredOutputs(regex=r"[a-z]{3}-[0-9]{4}")},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_options_of_sampling(pair: tuple[LLM, LLM], feature: str) -> None:
    options = {"temperature": 0.9, "seed": 3, "max_tokens": 12, "logprobs": 2, **FEATURES[feature]}
    params = SamplingParams(ignore_eos=feature != "structured", **options)
    outputs = both(pair, params)
    check_equal(outputs)
    if feature == "structured":
        assert all(len(output.outputs[0].text) == 8 for output in outputs[1])
    if feature == "processors":
        assert all(token % 2 for output in outputs[1] for token in output.outputs[0].token_ids)


def test_log_probabilities_of_a_prompt(pair: tuple[LLM, LLM]) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=2)
    for one, two in zip(*both(pair, params), strict=True):
        wanted, found = (
            [each.logprob for each in output.prompt_logprobs if each is not None]
            for output in (one, two)
        )
        assert len(wanted) == len(one.prompt_token_ids) - 1
        np.testing.assert_allclose(found, wanted, atol=ROUNDING)


def test_beam_search(pair: tuple[LLM, LLM]) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=9, ignore_eos=True)
    one, two = (llm.beam_search(PROMPTS, params, progress=False) for llm in pair)
    check_equal((one, two), 9)


def test_contrastive_decoding_with_an_amateur_that_cannot_be_divided(
    folder: Path, pair: tuple[LLM, LLM]
) -> None:
    params = ContrastiveParams(max_tokens=9, ignore_eos=True)
    one, two = (
        llm.contrastive_decoding(PROMPTS, folder / "small", params, progress=False) for llm in pair
    )
    check_equal((one, two), 2)


def test_contrastive_search(folder: Path) -> None:
    """It compares hidden states, which every rank has whole."""
    found = []
    for ranks in (1, 2):
        path = str(folder / "model")
        search = ContrastiveSearch(path, tensor_parallel_size=ranks, device="cpu", dtype="f32")
        params = ContrastiveSearchParams(max_tokens=9)
        found.append(search.generate(PROMPTS[0], params))
    assert found[0] and found[0] == found[1]


def test_adapters_come_and_go(folder: Path, pair: tuple[LLM, LLM]) -> None:
    """There is one place: each pushes out the other."""
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=10, logprobs=1, ignore_eos=True)
    plain = both(pair, params)
    for llm in pair:
        for name in ADAPTERS:
            llm.load_adapter(name, folder / name)
    seen = [plain[1][0].outputs[0].token_ids]
    for name in (*ADAPTERS, "all"):
        outputs = both(pair, params, adapter=name)
        check_equal(outputs)
        seen.append(outputs[1][0].outputs[0].token_ids)
    assert len(set(seen)) == 3
    for llm in pair:
        for name in ADAPTERS:
            llm.unload_adapter(name)
    check_equal(both(pair, params))


SPECULATION: dict[str, dict[str, Any]] = {
    "n-grams": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1},
    "draft model": {"model": "small", "num_speculative_tokens": 3},
}


@pytest.mark.parametrize("method", SPECULATION)
def test_drafts_change_nothing(folder: Path, pair: tuple[LLM, LLM], method: str) -> None:
    """Not a bit, with the same number of ranks."""
    drafts = dict(SPECULATION[method])
    if "model" in drafts:
        drafts["model"] = str(folder / "small")
    options = {"dtype": "f32", "max_num_seqs": 6, "speculative_config": drafts}
    with load_llm(folder / "model", 2, **options) as drafted:
        for temperature in (0.0, 0.8):
            params = SamplingParams(
                temperature=temperature, seed=5, max_tokens=14, logprobs=2, ignore_eos=True
            )
            found = drafted.generate(PROMPTS, params, progress=False)
            wanted = pair[1].generate(PROMPTS, params, progress=False)
            assert [o.outputs[0].token_ids for o in found] == [
                o.outputs[0].token_ids for o in wanted
            ]
            assert [o.outputs[0].logprobs for o in found] == [o.outputs[0].logprobs for o in wanted]
        assert drafted.engine.stats().num_draft_tokens > 0


def test_a_processor_that_fails_harms_nobody_else(pair: tuple[LLM, LLM]) -> None:
    def broken(prompt: Any, answer: Any, logits: np.ndarray) -> np.ndarray:
        raise ZeroDivisionError("in the user's own function")

    params = SamplingParams(max_tokens=4, logits_processors=(broken,))
    bad = pair[1].generate(PROMPTS, params, progress=False)
    assert all("in the user's own function" in str(output.error) for output in bad)
    good = SamplingParams(temperature=0.7, seed=2, max_tokens=8, ignore_eos=True)
    check_equal(both(pair, good))


def test_layers_with_windows(tmp_path: Path) -> None:
    """Gemma 2: two KV groups, norms of outputs, caps, a tied head."""
    path = write_family_model(tmp_path / "gemma2", "gemma2", "F32", intermediate_size=192)
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=10, logprobs=1, ignore_eos=True)
    one, two = (
        load_llm(path, ranks, dtype="f32").generate(PROMPTS, params, progress=False)
        for ranks in (1, 2)
    )
    check_equal((one, two))
