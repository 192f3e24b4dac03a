"""Directories that octavo writes, read by the library whose layout they are in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantization_helpers import SCHEMES, write_family_model, write_quantized_model
from transformers import AutoModelForCausalLM

from octavo.models.layer import weight_shapes
from octavo.quantization.apply import dequantized
from octavo.quantization.plan import Scheme
from octavo.quantize.writer import quantize_directory
from octavo.reference.llama import ReferenceModel
from octavo.reference.quantization import pack_int4
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.codes import pack_words, pack_zeros
from octavo.weights.model_files import read_model

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")  # of the library, not of octavo
compressed_tensors = pytest.importorskip(
    "compressed_tensors", reason="compressed-tensors is not installed (it needs Python 3.11)"
)


def test_packing_is_the_librarys() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    generator = np.random.default_rng(0)
    for bits, width in ((4, 96), (4, 32), (8, 98), (8, 64)):
        limit = 1 << (bits - 1)
        values = generator.integers(-limit, limit, (19, width)).astype(np.int8)
        theirs = pack_to_int32(torch.from_numpy(values), bits).numpy()
        codes = pack_int4(values + 8) if bits == 4 else values
        assert np.array_equal(pack_words(codes, f"int{bits}"), theirs)
    zeros = generator.integers(-8, 8, (19, 6)).astype(np.int8)
    theirs = pack_to_int32(torch.from_numpy(zeros), 4, packed_dim=0).numpy()
    assert np.array_equal(pack_zeros(zeros.astype(np.float32)), theirs)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "int4-nonuniform"])
def test_the_library_decodes_what_octavo_writes(tmp_path: Path, scheme: str) -> None:
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    _, target = write_quantized_model(tmp_path, scheme)
    config: dict[str, Any] = json.loads((target / "config.json").read_text())
    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    assert parsed.quantization_status == "compressed" and parsed.ignore == ["lm_head"]
    tensors = load_file(target / "model.safetensors")
    files = read_model(target)
    checkpoint = open_checkpoint(files)
    for name, matrix in files.quantized.items():
        module = matrix.module + "."
        (group,) = (
            group
            for group in parsed.config_groups.values()
            if group.weights.num_bits == (4 if matrix.format.dtype == "int4" else 8)
        )
        assert matrix.module in group.targets or "Linear" in group.targets
        state = {
            key.removeprefix(module): value
            for key, value in tensors.items()
            if key.startswith(module)
        }
        # In float32: the library multiplies in the type of the scales, octavo in float32.
        state["weight_scale"] = state["weight_scale"].float()
        theirs = PackedQuantizationCompressor.decompress(state, group)["weight"].numpy()
        assert np.array_equal(theirs, dequantized(checkpoint, name + ".weight")), name


# Not the asymmetric one: transformers 5.23 makes room for zero points that are not packed, and
# drops those of the file, which compressed-tensors itself packs so and decodes (above).
@pytest.mark.parametrize("scheme", ["int8", "int4", "int4-mixed"])
def test_transformers_runs_what_octavo_writes(tmp_path: Path, scheme: str) -> None:
    _, target = write_quantized_model(tmp_path, scheme)
    compare_with_transformers(target)


def compare_with_transformers(target: Path) -> None:
    """The directory's logits by transformers and by octavo's definition."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    ids = [3, 30, 7, 7, 21, 66, 1]
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()

    files = read_model(target)
    checkpoint = open_checkpoint(files)
    weights = {name: dequantized(checkpoint, name) for name in weight_shapes(files.spec)}
    ours = ReferenceModel(files.spec, weights).forward(ids)
    # transformers rounds the decoded weights to the type of their scales, bfloat16.
    assert np.abs(theirs - ours).max() < 0.05 * ours.std()


@pytest.mark.parametrize("family", ["phi3", "mixtral", "qwen3_moe", "gemma2"])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_transformers_runs_fused_matrices_and_experts(
    family: str, scheme: str, tmp_path: Path
) -> None:
    source = write_family_model(tmp_path / "float", family)
    compare_with_transformers(quantize_directory(source, tmp_path / "out", SCHEMES[scheme]).path)


@pytest.mark.parametrize("scheme", ["int8", "int4", "w8a8"])
def test_transformers_refuses_the_turned_codes_of_gpt2(scheme: str, tmp_path: Path) -> None:
    source = write_family_model(tmp_path / "float", "gpt2")
    target = quantize_directory(source, tmp_path / "out", Scheme(scheme)).path
    with pytest.raises(RuntimeError, match="size"):
        AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)


def test_transformers_refuses_levels_that_it_does_not_know(tmp_path: Path) -> None:
    _, target = write_quantized_model(tmp_path, "int4-nonuniform")
    with pytest.raises(RuntimeError, match="size"):  # after it has warned of "octavo"
        AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
