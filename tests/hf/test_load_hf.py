"""Directories that transformers itself writes: every weight comes back as it is there."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file, save_model
from transformers import LlamaConfig, LlamaForCausalLM

from octavo.models.rope import default_rope
from octavo.reference.llama import ReferenceModel
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

torch.set_num_threads(1)

LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
CASES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "implied_head_dim": {"head_dim": None},
    "wide_heads": {"head_dim": 20},
    "multi_query": {"num_key_value_heads": 1},
    "plain_attention": {"num_key_value_heads": 6},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "attention_bias": {"attention_bias": True},
    "llama3": {"rope_parameters": LLAMA3},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.5}},
    "several_ends": {"eos_token_id": [2, 5, 9]},
    "no_end": {"eos_token_id": None},
}


def save(case: str, directory: Path, dtype: torch.dtype, shard_size: str) -> LlamaForCausalLM:
    torch.manual_seed(11)
    settings: dict[str, Any] = {
        **{"vocab_size": 61, "hidden_size": 48, "intermediate_size": 52, "num_hidden_layers": 3},
        **{"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8},
        "max_position_embeddings": 256,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **CASES[case]}))
    for parameter in model.parameters():  # norms and biases too, so that none is constant
        parameter.data.normal_(0.5, 0.2)
    model = model.to(dtype)
    model.save_pretrained(directory, max_shard_size=shard_size)
    return model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_loaded_as_saved(case: str, shard_size: str, tmp_path: Path) -> None:
    dtype = [torch.float32, torch.float16, torch.bfloat16][len(case) % 3]
    model = save(case, tmp_path, dtype, shard_size)
    sharded = (tmp_path / "model.safetensors.index.json").exists()
    assert sharded == (shard_size == "20KB")
    files = read_model(tmp_path)
    checkpoint = open_checkpoint(files)
    theirs = model.state_dict()
    tied = {"lm_head.weight"} if CASES[case].get("tie_word_embeddings") else set()
    assert {source.tensor for source in files.weight_map.values()} == set(theirs) - tied
    for name, tensor in checkpoint.items():
        expected = theirs[files.weight_map[name].tensor].float().numpy()
        assert expected.std() > 0
        np.testing.assert_array_equal(tensor.to_float32(), expected, err_msg=name)
    assert {"f32": 4, "f16": 2, "bf16": 2}[checkpoint.dtype] == model.dtype.itemsize
    ends = model.generation_config.eos_token_id
    assert files.eos_token_ids == tuple(
        ends if isinstance(ends, list) else [] if ends is None else [ends]
    )


@pytest.mark.parametrize("stored", ["head", "table", "both", "different", "neither_tied"])
def test_a_tied_pair_is_what_transformers_makes_of_it(stored: str, tmp_path: Path) -> None:
    """save_model of safetensors keeps the head alone; other tools write both of the pair."""
    model = save("tied", tmp_path, torch.float32, "1GB")
    path = tmp_path / "model.safetensors"
    if stored == "head":
        save_model(model, str(path))
        with safe_open(path, "np") as file:
            assert file.metadata()["model.embed_tokens.weight"] == "lm_head.weight"
    elif stored != "table":
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        if stored == "different":
            weights["lm_head.weight"][60, 47] += 0.25
        if stored == "neither_tied":
            weights["lm_head.weight"] = -weights["lm_head.weight"]
            config = json.loads((tmp_path / "config.json").read_text())
            config["tie_word_embeddings"] = False
            (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(weights, path, metadata={"format": "pt"})
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        files = read_model(tmp_path)
    told = [warning for warning in caught if "differs from" in str(warning.message)]
    assert len(told) == (stored == "different")
    checkpoint = open_checkpoint(files)
    tied = theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert files.spec.tie_word_embeddings == tied == (stored in ("head", "table", "both"))
    for name, tensor in checkpoint.items():
        expected = theirs.state_dict()[files.weight_map[name].tensor].numpy()
        np.testing.assert_array_equal(tensor.data, expected, err_msg=name)
    tokens = np.arange(5, 40, dtype=np.int32)
    weights_of = {name: tensor.to_float32() for name, tensor in checkpoint.items()}
    ours = ReferenceModel(files.spec, weights_of).forward(tokens)
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens[None].astype(np.int64))).logits[0].numpy()
    np.testing.assert_allclose(ours, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["untied", "llama3", "linear"])
def test_rope_in_both_spellings_is_what_transformers_reads(case: str, tmp_path: Path) -> None:
    model = save(case, tmp_path, torch.float32, "1GB")
    files = read_model(tmp_path)
    new = dict(model.config.rope_parameters)
    old = {name: value for name, value in files.config.items() if name != "rope_parameters"}
    old["rope_theta"] = new.pop("rope_theta")
    old["rope_scaling"] = None if case == "untied" else new
    from octavo.models.llama import read_spec

    assert read_spec(old) == files.spec


def test_missing_fields_take_the_defaults_of_transformers() -> None:
    from octavo.models.llama import read_spec

    sizes = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 61},
        **{"hidden_size": 48, "intermediate_size": 52, "num_hidden_layers": 3},
        "num_attention_heads": 6,
    }
    theirs, ours = LlamaConfig(**sizes), read_spec(sizes)
    layer = ours.layers[0]
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert layer.norm.eps == theirs.rms_norm_eps
    assert layer.num_kv_heads == theirs.num_key_value_heads
    assert layer.head_dim == theirs.head_dim
    assert layer.activation == theirs.hidden_act
    assert (layer.qkv_bias, layer.mlp_bias) == (theirs.attention_bias, theirs.mlp_bias)
    assert layer.rope == default_rope(theirs.rope_parameters["rope_theta"], 8)
