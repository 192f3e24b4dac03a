"""octavo diff against live Hugging Face: taps of every kind of model, mistakes of either."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diff_helpers import tokens_for, write_model
from quantization_helpers import FAMILIES, write_family_model

from octavo.cli import main
from octavo.diff.comparison import Comparison, DiffOptions
from octavo.diff.hugging_face import HuggingFaceImplementation
from octavo.diff.implementations import ReferenceImplementation
from octavo.diff.native import load_native
from octavo.models.layer import tap_names
from octavo.reference.llama import ReferenceModel
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

pytestmark = pytest.mark.hf

SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "plain tied": {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "multi-query, head_dim 80": {"num_key_value_heads": 1, "head_dim": 80},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "gelu": {"hidden_act": "gelu"},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
}


def compare_with_hf(path: Path, dtype: str, hf_path: Path | None = None, count: int = 45) -> Any:
    """octavo on `path` against Hugging Face on `hf_path` (or the same)."""
    files = read_model(path)
    checkpoint = open_checkpoint(files)
    weights = {name: tensor.to_float32() for name, tensor in checkpoint.items()}
    model = ReferenceModel(files.spec, weights, dtype=dtype, kv_dtype=dtype)
    left = load_native(
        files, checkpoint, device="cpu", dtype=dtype, max_tokens=count + 8, chunk_size=20
    )
    right = HuggingFaceImplementation(read_model(hf_path or path), dtype, num_threads=1)
    truth = ReferenceImplementation(ReferenceModel(files.spec, model.weights))
    options = DiffOptions(steps=8, decode_rows=10, chunk_size=20)
    ids = tokens_for(files.spec, count)
    return Comparison(left, right, model, ids, options, truth if dtype == "bf16" else None).run()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_tap_agrees_in_float32(tmp_path: Path, shape: str) -> None:
    path = write_model(tmp_path, **SHAPES[shape])
    result = compare_with_hf(path, "f32")
    assert result.ok, (result.first_bad, result.findings)
    assert [tap.name for tap in result.taps] == tap_names(read_model(path).spec)
    assert not result.missing
    assert all(tap.own[0] is not None and tap.own[1] is not None for tap in result.taps)
    assert result.greedy.parted_at is None
    assert result.logits.max_abs < 1e-4


@pytest.mark.parametrize("shape", ["grouped", "biases", "llama3 rope"])
def test_bf16_agrees_within_hugging_faces_own_rounding(tmp_path: Path, shape: str) -> None:
    result = compare_with_hf(write_model(tmp_path, **SHAPES[shape]), "bf16")
    assert result.ok, (result.first_bad, result.findings)
    assert all(tap.own[0] < 1e-4 for tap in result.taps), "octavo's ops are held to float32"


WRONG_CONFIGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "epsilon": ({"rms_norm_eps": 0.1}, "layers.0.attn_norm", "norm"),
    "theta": ({"rope_theta": 10000.0}, "layers.0.q_rope", "rope_and_store"),
    "activation": ({"hidden_act": "gelu"}, "layers.0.act", "gated_activation"),
}


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_a_configuration_read_differently_is_found(tmp_path: Path, name: str, dtype: str) -> None:
    """Hugging Face is given another config.json: its op is the one that is off by octavo's."""
    changed, tap, op = WRONG_CONFIGS[name]
    path = write_model(tmp_path / "model")
    other = tmp_path / "other"
    shutil.copytree(path, other)
    config = json.loads((path / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, **changed}))
    result = compare_with_hf(path, dtype, hf_path=other)
    assert (result.first_bad.name, result.findings[0].op) == (tap, op)
    assert {finding.side for finding in result.findings} == {"Hugging Face"}
    assert "transformers: models/llama/modeling_llama.py" in result.findings[0].files
    assert result.findings[0].title.endswith("is not as octavo defines it")


def test_permuted_weights_are_recognized(tmp_path: Path) -> None:
    """A GGUF file's order of q and k rows, forgotten: the commonest mistake of a converter."""
    from safetensors.numpy import load_file, save_file

    path = write_model(tmp_path / "model")
    other = tmp_path / "other"
    shutil.copytree(path, other)
    weights = load_file(other / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = weight.shape[0] // 8
            pairs = weight.reshape(heads, 2, 4, -1).swapaxes(1, 2)
            weights[name] = np.ascontiguousarray(pairs.reshape(weight.shape))
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    result = compare_with_hf(path, "f32", hf_path=other)
    assert result.first_bad.name == "layers.0.q"
    assert "GGUF" in result.findings[0].mistake


def test_taps_do_not_change_what_hugging_face_computes(tmp_path: Path) -> None:
    import torch
    import transformers

    path = write_model(tmp_path)
    files = read_model(path)
    hugging_face = HuggingFaceImplementation(files, "f32", num_threads=1)
    ids = tokens_for(files.spec, 33)
    tapped = hugging_face.feed(ids, taps=True)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        output = plain(torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True)
    np.testing.assert_array_equal(tapped.logits, output.logits[0].numpy())
    for index in range(len(files.spec.layers) - 1):
        hidden = output.hidden_states[index + 1][0].numpy()
        np.testing.assert_array_equal(tapped.taps[f"layers.{index}.out"], hidden)
    np.testing.assert_array_equal(tapped.taps["final_norm"], output.hidden_states[-1][0].numpy())


def test_command_against_hugging_face(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path)
    arguments = ["diff", str(model), "--against", "hf", "--random", "20", "--steps", "4", "--judge"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "Hugging Face" in output and "no difference" in output
    (model / "model.safetensors").unlink()
    assert main([*arguments, "--load-format", "dummy", "--dtype", "bf16"]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_made_up_weights_of_every_kind_of_checkpoint(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers is given fused, turned, shifted tensors and single experts, as from a file."""
    model = write_family_model(tmp_path / "model", family)
    (model / "model.safetensors").unlink()
    arguments = ["diff", str(model), "--against", "hf", "--random", "20", "--steps", "4"]
    assert main([*arguments, "--load-format", "dummy"]) == 0
    assert "no difference" in capsys.readouterr().out
