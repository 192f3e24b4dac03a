"""Quantized directories of families whose checkpoints hold fused, turned or stacked matrices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantization_helpers import FAMILIES, SCHEMES, write_family_model

from octavo.config import Environment
from octavo.diff.native import load_native
from octavo.errors import InvalidArgumentError
from octavo.models.layer import weight_shapes
from octavo.quantization.apply import dequantized, quantize_checkpoint
from octavo.quantization.plan import Scheme
from octavo.quantize.model import QuantizeRequest, quantize_model
from octavo.quantize.writer import quantize_directory
from octavo.weights.checkpoint import Checkpoint, open_checkpoint
from octavo.weights.model_files import ModelFiles, read_model

TOKENS = np.array([3, 30, 7, 7, 21, 66, 1, 50, 12, 9, 64], np.int32)


def logits(files: ModelFiles, checkpoint: Checkpoint) -> np.ndarray:
    """The native core's, of every position."""
    run = load_native(
        files, checkpoint, device="cpu", dtype="bf16", max_tokens=16, chunk_size=16, num_threads=1
    )
    return run.feed(TOKENS).logits


def written(target: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header of the weights file, and the quantization_config."""
    content = (target / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header, json.loads((target / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["int8", "int4", "int4-asymmetric", "int4-nonuniform", "w8a8"])
def test_a_directory_is_the_model_quantized_at_load(
    family: str, scheme: str, tmp_path: Path
) -> None:
    source, wanted = write_family_model(tmp_path / "float", family), SCHEMES.get(scheme)
    wanted = wanted or Scheme(scheme)
    target = quantize_directory(source, tmp_path / "out", wanted).path
    files, theirs = read_model(source), read_model(target)
    assert theirs.spec == files.spec
    at_load = quantize_checkpoint(open_checkpoint(files), files.spec, wanted)
    stored = quantize_checkpoint(open_checkpoint(theirs), theirs.spec, None)
    assert at_load.formats == stored.formats
    for name in weight_shapes(files.spec):
        ours, others = dequantized(at_load, name), dequantized(stored, name)
        np.testing.assert_array_equal(ours, others, err_msg=name)
    np.testing.assert_array_equal(logits(files, at_load), logits(theirs, stored))


def test_fused_matrices_are_written_as_one(tmp_path: Path) -> None:
    source = write_family_model(tmp_path / "float", "phi3")
    target = quantize_directory(source, tmp_path / "out", SCHEMES["int4-asymmetric"]).path
    header, config = written(target)
    name = "model.layers.1.self_attn.qkv_proj"  # 96 + 32 + 32 outputs
    assert header[f"{name}.weight_packed"]["shape"] == [160, 12]
    assert header[f"{name}.weight_scale"]["shape"] == [160, 3]
    assert header[f"{name}.weight_zero_point"]["shape"] == [20, 3]
    assert header["model.layers.1.mlp.gate_up_proj.weight_packed"]["shape"] == [328, 12]
    assert config["quant_method"] == "compressed-tensors" and config["ignore"] == ["lm_head"]
    assert header["model.layers.1.mlp.down_proj.weight_packed"]["shape"] == [96, 41]  # int8
    targets = config["config_groups"]["group_0"]["targets"]
    assert targets == [rf"re:.*\.{kind}$" for kind in ("gate_up_proj", "o_proj", "qkv_proj")]


@pytest.mark.parametrize("scheme", ["int8", "int4", "w8a8"])
def test_turned_matrices_are_for_octavo_alone(scheme: str, tmp_path: Path) -> None:
    """No matrix has the shape that another reader of GPT-2 expects, so none takes it for one."""
    source = write_family_model(tmp_path / "float", "gpt2", n_inner=192)
    target = quantize_directory(source, tmp_path / "out", Scheme(scheme)).path
    header, config = written(target)
    words = 12 if scheme == "int4" else 24
    for module, outputs, inputs in (("attn.c_attn", 288, 96), ("mlp.c_proj", 96, 192)):
        shape = header[f"transformer.h.0.{module}.weight"]["shape"]
        assert shape == [outputs, words * inputs // 96]
    assert config["quant_method"] == config["format"] == "octavo"
    assert header["transformer.h.1.attn.c_attn.bias"]["shape"] == [288]


@pytest.mark.parametrize(
    ("family", "int8", "message"),
    [
        ("phi3", "layers.1.k", r"layers\.1\.q takes int4.*layers\.1\.k int8; .* one matrix"),
        ("gpt2", "*.v", r"layers\.0\.q takes int4, .* layers\.0\.v int8"),
        (
            "mixtral",
            "*.experts.2.up",
            r"experts\.0\.gate takes int4.*experts\.2\.up int8.*run as one",
        ),
    ],
)
def test_what_is_one_matrix_takes_one_format(
    family: str, int8: str, message: str, tmp_path: Path
) -> None:
    source = write_family_model(tmp_path / "float", family)
    with pytest.raises(InvalidArgumentError, match=message):
        quantize_directory(source, tmp_path / "out", Scheme("int4", int8=(int8,)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["float"]


@pytest.mark.parametrize(
    ("family", "int8"),
    [("phi3", "*.[qkv]"), ("gpt2", "layers.1.[qkv]"), ("mixtral", "layers.0.experts.*.down")],
)
def test_parts_in_int8(family: str, int8: str, tmp_path: Path) -> None:
    source, scheme = write_family_model(tmp_path / "float", family), Scheme("int4", int8=(int8,))
    result = quantize_directory(source, tmp_path / "out", scheme)
    files = read_model(result.path)
    checkpoint = open_checkpoint(files)
    assert checkpoint.formats == result.formats
    at_load = quantize_checkpoint(open_checkpoint(read_model(source)), files.spec, scheme)
    stored = quantize_checkpoint(checkpoint, files.spec, None)
    np.testing.assert_array_equal(logits(files, at_load), logits(files, stored))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_routers_stay_as_they_are_and_others_are_told_so(family: str, tmp_path: Path) -> None:
    source = write_family_model(tmp_path / "float", family)
    header, config = written(quantize_directory(source, tmp_path / "out", Scheme("int4")).path)
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    routers = [name for name in header if name.endswith(f"{block}.gate.weight")]
    assert len(routers) == 2 and all(header[name]["dtype"] == "F32" for name in routers)
    left_out = [name.removesuffix(".weight") for name in routers]
    assert config["ignore"] == ["lm_head", *left_out]


@pytest.mark.parametrize("family", ["phi3", "mixtral", "qwen3_moe", "gpt2"])
def test_bits_are_spent_on_what_is_one_matrix_at_once(family: str, tmp_path: Path) -> None:
    """Importance and sensitivity are measured, and the result is a directory that loads."""
    source = write_family_model(tmp_path / "float", family)
    scheme = Scheme("int4", method="weighted")
    request = QuantizeRequest(
        str(source), tmp_path / "out", scheme, bits_per_weight=6.4, max_windows=1
    )
    found = quantize_model(request, Environment(home=tmp_path, num_threads=1, isa="auto"))
    assert found.directory is not None and found.sensitivity is not None
    assert found.chosen and len(found.sensitivity.parts) >= 8
    formats = open_checkpoint(read_model(tmp_path / "out")).formats
    eight = {name for name, each in formats.items() if each.dtype == "int8"}
    by_width = {"layers.0.down", "layers.1.down"} if family == "phi3" else set()
    assert eight == {*found.chosen, *by_width}
