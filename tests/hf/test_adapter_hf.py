"""LoRA adapters made by PEFT: the definition and `octavo merge` give what PEFT gives."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from hf.hf_adapters import adapted_by_peft, read_adapted, read_definition, trained_numbers
from hf.hf_models import SHAPES, hf_logits, make_hf_model
from octavo.cli import main
from octavo.quantize.merge import merge_directory
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

pytestmark = pytest.mark.hf
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all_linear": ("gqa4_8_2x32_biases", {"target_modules": "all-linear"}),
    "every_matrix": ("wide_heads_7x32", {"target_modules": [*MATRICES, "embed_tokens"]}),
    "untied_ends": ("plain_3x128", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "tied_head": ("smollm_9_3x64", {"target_modules": ["lm_head", "up_proj"]}),
    "tied_table": ("plain_4x32", {"target_modules": ["embed_tokens"]}),
    "rslora": ("mqa_5_1x80", {"target_modules": MATRICES, "use_rslora": True, "r": 7}),
    "patterns": (
        "relu_1x128",
        {
            "target_modules": r".*\.(q_proj|down_proj|o_proj)",
            "rank_pattern": {"down_proj": 9, r".*\.1\..*\.q_proj": 2},
            "alpha_pattern": {r"layers\.2\..*": 31, "self_attn.o_proj": 5},
        },
    ),
    "layers": (
        "gqa3_6_2x32_linear",
        {"target_modules": ["k_proj", "gate_proj"], "layers_to_transform": [0, 2]},
    ),
    "excluded": (
        "gqa8_8_1x64_llama3",
        {"target_modules": "all-linear", "exclude_modules": r".*\.0\.mlp\..*|.*\.v_proj"},
    ),
}


def make_adapter(case: str, directory: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A model and a random adapter in `directory`; returns PEFT's own of both."""
    shape, options = CASES[case]
    model = make_hf_model(SHAPES[shape], seed=3).to(dtype)
    return adapted_by_peft(model, directory, lora_dropout=0.1, **options)


@pytest.mark.parametrize("case", CASES)
def test_the_definition_gives_the_logits_of_peft(case: str, tmp_path: Path) -> None:
    theirs = make_adapter(case, tmp_path)
    adapter, ours, without = read_adapted(tmp_path)
    tokens = np.random.default_rng(1).integers(0, 307, 23).astype(np.int32)
    expected = hf_logits(theirs, tokens)
    np.testing.assert_allclose(ours.forward(tokens), expected, rtol=0, atol=1e-3)
    assert np.abs(without.forward(tokens) - expected).max() > 0.1  # the adapter does something
    assert adapter.num_parameters == trained_numbers(theirs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_as_peft_merges(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In bf16 PEFT rounds the change before it adds it: one rounding more."""
    theirs = make_adapter(case, tmp_path, dtype)
    merge_directory(*(tmp_path / name for name in ("model", "adapter", "out")))
    files = read_model(tmp_path / "out")
    merged = open_checkpoint(files)
    unties = read_model(tmp_path / "model").spec.tie_word_embeddings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if unties:  # PEFT would change both: separate them first
            inner = theirs.get_base_model()
            head, table = inner.lm_head, inner.model.embed_tokens
            both = [getattr(module, "base_layer", module) for module in (head, table)]
            both[0].weight = torch.nn.Parameter(both[0].weight.clone())
        expected = theirs.merge_and_unload().state_dict()
    assert not files.spec.tie_word_embeddings
    epsilon = 2e-6 if dtype == torch.float32 else 2**-7
    for name, tensor in merged.items():
        weight = expected[files.weight_map[name].tensor].float().numpy()
        np.testing.assert_allclose(
            tensor.to_float32(), weight, rtol=epsilon, atol=epsilon, err_msg=name
        )
    assert {"f32": torch.float32, "bf16": torch.bfloat16}[merged.dtype] == dtype


@pytest.mark.parametrize("case", ["all_linear", "every_matrix", "untied_ends", "patterns"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_octavo_diff_against_peft(
    case: str, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The native core, tap by tap."""
    make_adapter(case, tmp_path)
    model, adapter = str(tmp_path / "model"), str(tmp_path / "adapter")
    options = ["--against", "hf", "--random", "30", "--dtype", dtype]
    assert main(["diff", model, "--adapter", adapter, *options]) == 0, capsys.readouterr().out
    assert "peft" in capsys.readouterr().out


def test_the_merged_model_answers_as_the_adapter(tmp_path: Path) -> None:
    make_adapter("tied_head", tmp_path)
    _, ours, _ = read_adapted(tmp_path)
    merge_directory(*(tmp_path / name for name in ("model", "adapter", "out")))
    tokens = np.random.default_rng(2).integers(0, 307, 19).astype(np.int32)
    merged = read_definition(tmp_path, "out").forward(tokens)
    np.testing.assert_allclose(merged, ours.forward(tokens), rtol=0, atol=2e-4)
