"""Embeddings of every family beside transformers: its last hidden states, pooled by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cuda_helpers import DEVICE, needs_cuda
from embedding_helpers import write_modules
from text_helpers import sentencepiece_directory

from hf.family_models import CASES, MAX_MODEL_LEN, make_model, saved_model, tokens_of
from octavo import LLM
from octavo.cli import main
from octavo.models.registry import FAMILIES

pytestmark = [pytest.mark.hf, pytest.mark.filterwarnings("ignore:.*eos_token_id")]
# Of vectors of length 1, whose numbers are near 0.15: float32 sums in another order, 3 to 5 layers.
TOLERANCE = 1e-5
KINDS = ("last", "mean", "first")
TEXTS = [tokens_of(count, count).tolist() for count in (1, 2, 19, 70, 150)]
LIMITS: dict[str, Any] = {
    **{"dtype": "f32", "max_model_len": MAX_MODEL_LEN, "num_kv_blocks": 120, "num_threads": 1},
    **{"max_num_batched_tokens": 64, "max_num_seqs": 4, "runner": "pooling"},
}
every_case = pytest.mark.parametrize("case", CASES)


def states_of(model: Any, tokens: list[int]) -> np.ndarray:
    """transformers' last hidden states, behind the final norm, float64 (tokens, hidden)."""
    with torch.inference_mode():
        base = model.base_model
        base(torch.from_numpy(tokens_of(MAX_MODEL_LEN, 0).astype(np.int64))[None])  # dynamic rope
        found = base(torch.tensor(tokens)[None]).last_hidden_state[0]
    states: np.ndarray = found.double().numpy()
    return states


def pooled(states: np.ndarray, kind: str, normalize: bool = True) -> np.ndarray:
    vector = {"last": states[-1], "mean": states.mean(axis=0), "first": states[0]}[kind]
    return vector / np.linalg.norm(vector) if normalize else vector


def embed(folder: Path, **options: Any) -> list[np.ndarray]:
    outputs = LLM(folder, **{**LIMITS, **options}).embed(TEXTS, progress=False)
    return [output.embedding for output in outputs]


def bare_folder(case: str, folder: Path) -> tuple[Any, Path]:
    """The model without its head as transformers saves it."""
    model = make_model(case)
    model.base_model.save_pretrained(folder)
    return model, folder


@every_case
def test_vectors_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    """Of the whole checkpoint, and of the model without its head, in chunks and batches."""
    model, whole = saved_model(case)
    _, bare = bare_folder(case, tmp_path / "bare")
    name = json.loads((bare / "config.json").read_text())["architectures"][0]
    assert name in FAMILIES and name != FAMILIES[name].architecture
    states = [states_of(model, tokens) for tokens in TEXTS]
    for kind in KINDS:
        write_modules(bare, kind, size=model.config.hidden_size)
        for found, each in zip(embed(bare, runner="auto"), states, strict=True):
            np.testing.assert_allclose(found, pooled(each, kind), atol=TOLERANCE, rtol=0)
    for found, each in zip(embed(whole), states, strict=True):
        np.testing.assert_allclose(found, pooled(each, "last"), atol=TOLERANCE, rtol=0)


@needs_cuda
@pytest.mark.parametrize("case", ["qwen3, biases", "mistral, window", "gpt2, tied"])
def test_vectors_of_a_gpu(case: str) -> None:
    model, folder = saved_model(case)
    found = embed(folder, device=DEVICE)
    for vector, tokens in zip(found, TEXTS, strict=True):
        expected = pooled(states_of(model, tokens), "last")
        np.testing.assert_allclose(vector, expected, atol=TOLERANCE, rtol=0)


def test_planted_errors_are_seen() -> None:
    """Another token's state, states before the final norm, and no end of the mean."""
    model, folder = saved_model("qwen3, biases")
    found = embed(folder)[3]
    states = states_of(model, TEXTS[3])
    with torch.inference_mode():
        ids = torch.tensor(TEXTS[3])[None]
        norm, model.base_model.norm = model.base_model.norm, torch.nn.Identity()
        before = model.base_model(ids).last_hidden_state[0].double().numpy()
        model.base_model.norm = norm
    for wrong in (states[-2], before[-1], states.mean(axis=0), states[0]):
        vector = wrong / np.linalg.norm(wrong)
        assert np.abs(found - vector).max() > 100 * TOLERANCE


@pytest.mark.parametrize("case", list(CASES)[::5])
def test_octavo_diff_of_a_model_without_a_head(case: str, tmp_path: Path, capsys: Any) -> None:
    _, folder = bare_folder(case, tmp_path)
    words = ["diff", str(folder), "--against", "hf", "--random", "19", "--steps", "2"]
    assert main(words) == 0, capsys.readouterr().out


def test_texts_with_an_end_behind_them(tmp_path: Path) -> None:
    """A tokenizer that ends each text, as Qwen3-Embedding's, is followed as transformers does."""
    model, folder = bare_folder("llama, yarn", tmp_path)
    sentencepiece_directory(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    content["post_processor"]["single"].append(end)
    content["post_processor"]["special_tokens"]["</s>"] = {
        **{"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    }
    path.write_text(json.dumps(content))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    llm, text = LLM(folder, **LIMITS), "ABBA"
    ids = [min(token, 96) for token in theirs(text)["input_ids"]]
    assert ids[-1] == 2 and llm.get_tokenizer().encode(text)[-1] == 2
    (output,) = llm.embed([ids], progress=False)
    expected = pooled(states_of(model, ids), "last")
    np.testing.assert_allclose(output.embedding, expected, atol=TOLERANCE, rtol=0)
