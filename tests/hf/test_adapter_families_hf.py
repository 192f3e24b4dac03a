"""LoRA adapters made by PEFT for families whose layers or checkpoints are not Llama's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_helpers import adapter_config, random_adapter, write_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf.family_models import VOCAB, make_model
from hf.hf_adapters import adapted_by_peft, read_adapted, read_definition, trained_numbers
from hf.hf_models import hf_logits
from octavo.cli import main
from octavo.errors import UnsupportedModelError
from octavo.quantize.merge import merge_directory
from octavo.weights.adapter import read_adapter
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

pytestmark = pytest.mark.hf
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Of family_models -> LoraConfig's fields, and how many of octavo's matrices the adapter changes.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "qwen2, tied": ({"target_modules": "all-linear"}, 3 * 7),  # q, k and v have biases
    "phi3, short factors": ({"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}, 3 * 6),
    "phi3, partial rotary": ({"target_modules": ["qkv_proj"], "layers_to_transform": [1]}, 3),
    "gemma2, windows": ({"target_modules": "all-linear", "use_rslora": True}, 3 * 7),
    "gemma3_text, windows": ({"target_modules": ["q_proj", "up_proj", "embed_tokens"]}, 3 * 2 + 1),
    "gpt2, tied": (
        {"target_modules": ["c_attn", "c_proj", "c_fc", "wte"], "fan_in_fan_out": True},
        3 * 6 + 1,
    ),
    "gpt2, scores by layer": (
        {"target_modules": r".*\.(attn\.c_attn|mlp\.c_proj)", "fan_in_fan_out": True},
        3 * 4,
    ),
    "granite, multipliers": ({"target_modules": "all-linear"}, 3 * 7),
    "mixtral, two of four experts": ({"target_modules": ATTENTION}, 3 * 4),
    "qwen3_moe, a layer without experts": ({"target_modules": ["q_proj", "o_proj"]}, 3 * 2),
}


@pytest.mark.parametrize("case", CASES)
def test_the_definition_gives_the_logits_of_peft(case: str, tmp_path: Path) -> None:
    theirs = adapted_by_peft(make_model(case), tmp_path, **CASES[case][0])
    adapter, ours, without = read_adapted(tmp_path)
    tokens = np.random.default_rng(1).integers(0, VOCAB, 37).astype(np.int32)
    expected = hf_logits(theirs, tokens)
    np.testing.assert_allclose(ours.forward(tokens), expected, rtol=0, atol=1e-3)
    assert np.abs(without.forward(tokens) - expected).max() > 0.1  # the adapter does something
    trained = trained_numbers(theirs)
    assert (adapter.num_parameters, len(adapter.matrices)) == (trained, CASES[case][1])


@pytest.mark.parametrize("case", CASES)
def test_octavo_diff_against_peft(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The native core, tap by tap."""
    adapted_by_peft(make_model(case), tmp_path, **CASES[case][0])
    model, adapter = str(tmp_path / "model"), str(tmp_path / "adapter")
    options = ["--against", "hf", "--random", "30", "--adapter", adapter]
    assert main(["diff", model, *options]) == 0, capsys.readouterr().out
    assert "peft" in capsys.readouterr().out


@pytest.mark.parametrize("case", CASES)
def test_merged_as_peft_merges(case: str, tmp_path: Path) -> None:
    theirs = adapted_by_peft(make_model(case), tmp_path, **CASES[case][0])
    merge_directory(*(tmp_path / name for name in ("model", "adapter", "out")))
    files = read_model(tmp_path / "out")
    merged = open_checkpoint(files)
    _, ours, _ = read_adapted(tmp_path)
    tokens = np.random.default_rng(2).integers(0, VOCAB, 29).astype(np.int32)
    found = read_definition(tmp_path, "out").forward(tokens)
    np.testing.assert_allclose(found, ours.forward(tokens), rtol=0, atol=1e-3)
    if read_model(tmp_path / "model").spec.tie_word_embeddings != files.spec.tie_word_embeddings:
        return  # PEFT changes head and embedding at once: tests/hf/test_adapter_hf.py
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.merge_and_unload().save_pretrained(tmp_path / "theirs")
    expected = open_checkpoint(read_model(tmp_path / "theirs"))
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        np.testing.assert_allclose(
            tensor.to_float32(), expected[name].to_float32(), rtol=2e-6, atol=2e-6, err_msg=name
        )


@pytest.mark.parametrize("case", ["qwen2, tied", "gpt2, tied"])
def test_merged_where_names_lack_the_prefix(case: str, tmp_path: Path) -> None:
    """As in a checkpoint of the model without its head; transformers loads what is written."""
    theirs = adapted_by_peft(make_model(case), tmp_path, **CASES[case][0])
    prefix = theirs.base_model.model.base_model_prefix + "."
    file = tmp_path / "model" / "model.safetensors"
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    written = merge_directory(*(tmp_path / name for name in ("model", "adapter", "out")))
    assert written.num_matrices == CASES[case][1]
    tokens = np.random.default_rng(2).integers(0, VOCAB, 29).astype(np.int32)
    expected = read_adapted(tmp_path)[1].forward(tokens)
    found = read_definition(tmp_path, "out").forward(tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    np.testing.assert_allclose(hf_logits(model, tokens), expected, rtol=0, atol=1e-3)


# PEFT 0.21 turns adapters of single experts, as they were trained before transformers 5, into
# those of stacked ones; of a model that has layers without experts too, it drops these layers'.
@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("mixtral, two of four experts", ("w1", "w2", "w3", "gate", "q_proj")),
        ("qwen3_moe, all experts", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_adapters_of_single_experts_are_merged(
    case: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    model = make_model(case)
    model.save_pretrained(tmp_path / "model")
    places = read_model(tmp_path / "model").weight_map.values()
    shapes = {each.module: each.shape for each in places if len(each.shape) == 2}
    settings = adapter_config(target_modules=list(names), lora_dropout=0.0)
    write_adapter(tmp_path / "adapter", random_adapter({}, names, shapes=shapes), settings)
    merge_directory(*(tmp_path / name for name in ("model", "adapter", "out")))
    tokens = np.random.default_rng(3).integers(0, VOCAB, 29).astype(np.int32)
    before = hf_logits(model, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    expected = hf_logits(theirs, tokens)
    found = read_definition(tmp_path, "out").forward(tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    assert np.abs(before - expected).max() > 0.1


@pytest.mark.parametrize(
    ("case", "parameters", "more"),
    [
        (
            "mixtral, two of four experts",
            ["gate_up_proj", "down_proj"],
            {"target_modules": ["q_proj"]},
        ),
        ("mixtral, one of two, window", ["mlp.experts.down_proj"], {}),
        (
            "qwen3_moe, a layer without experts",
            ["mlp.experts.gate_up_proj", "experts.down_proj"],
            {"target_modules": ["o_proj"], "alpha_pattern": {"experts.down_proj": 31}},
        ),
    ],
)
def test_adapters_of_stacked_experts_are_merged(
    case: str, parameters: list[str], more: dict[str, Any], tmp_path: Path
) -> None:
    """`target_parameters`, as PEFT trains experts of transformers 5."""
    model = make_model(case)
    tokens = np.random.default_rng(3).integers(0, VOCAB, 29).astype(np.int32)
    before = hf_logits(model, tokens)
    theirs = adapted_by_peft(model, tmp_path, target_parameters=parameters, **{"r": 3, **more})
    expected = hf_logits(theirs, tokens)
    merge_directory(*(tmp_path / name for name in ("model", "adapter", "out")))
    found = read_definition(tmp_path, "out").forward(tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    assert np.abs(before - expected).max() > 0.1
    adapter = read_adapter(tmp_path / "adapter", read_model(tmp_path / "model"), to_merge=True)
    assert adapter.num_parameters == trained_numbers(theirs)
    with pytest.raises(UnsupportedModelError, match="target_parameters names experts"):
        read_adapter(tmp_path / "adapter", read_model(tmp_path / "model"))
