"""GGUF files of every family: the same configuration and weights as from a Hugging Face directory.

`gguf_families_helpers` writes the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz_weights import COUNT, count_outcomes, mutations
from gguf_families_helpers import CASES, hugging_face, write

from octavo.errors import UnsupportedModelError, WeightsError
from octavo.models.registry import find_family
from octavo.quantization.apply import dequantized
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.convert import convert_gguf
from octavo.weights.gguf_folder import GgufFolder
from octavo.weights.model_files import read_folder, read_model
from octavo.weights.safetensors import open_weight_files


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_what_the_directory_is(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    weights = write(path, case)
    files = read_model(path)
    config = hugging_face(case)
    assert files.spec == files.family.read_spec(config) == find_family(config).read_spec(config)
    checkpoint = open_checkpoint(files)
    for name, source in files.family.tensors.weight_map(files.spec).items():
        expected = weights[source.tensor]
        if source.rows is not None:
            first = source.rows[0]
            expected = expected[first : first + source.shape[0]]
        if source.transform == "plus_one":
            expected = expected + 1
        np.testing.assert_array_equal(checkpoint[name].to_float32(), expected, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_converted_directory_has_the_tensors_of_hugging_face(case: str, tmp_path: Path) -> None:
    """Fused matrices whole, in the order of their rows; norms without the one that GGUF adds."""
    weights = write(tmp_path / "model.gguf", case)
    directory = tmp_path / "converted"
    directory.mkdir()
    convert_gguf(tmp_path / "model.gguf", directory)
    found = open_weight_files(directory)
    assert found.infos.keys() == weights.keys()
    for name, expected in weights.items():
        is_rounded = case.startswith("gemma") and name.endswith("norm.weight")  # w + 1 - 1
        np.testing.assert_allclose(
            found.read(name).data, expected, rtol=0, atol=5e-7 * is_rounded, err_msg=name
        )


@pytest.mark.parametrize("case", CASES)
def test_codes_of_every_family(case: str, tmp_path: Path) -> None:
    """Rows of fused matrices, and of q and k in another order, as codes too."""
    path = tmp_path / "model.gguf"
    write(path, case, "Q4_0")
    checkpoint = open_checkpoint(read_model(path))
    exact = open_checkpoint(read_folder(GgufFolder(path, "f32")))
    mlp = "layers.1.experts.1.up" if "moe" in case or case == "mixtral" else "layers.1.up"
    assert {"layers.1.k", mlp, "embed"} <= checkpoint.formats.keys()
    for name in exact:
        np.testing.assert_array_equal(dequantized(checkpoint, name), exact[name].data, err_msg=name)


@pytest.mark.parametrize(
    ("case", "changes", "parts"),
    [
        ("qwen2", {"attention__sliding_window": 64}, ("qwen2.attention.sliding_window", "64")),
        ("mistral nemo", {"rope__dimension_count": 16}, ("dimension_count is 16", "32 (the whole")),
        (
            "qwen2",
            {"rope__dimension_count": 8, "attention__key_length": 16},
            ("qwen2.rope.dimension_count", "8", "16"),
        ),
        ("qwen2", {"rope__scaling__type": "longrope"}, ("qwen2.rope.scaling.type", "longrope")),
        ("qwen2", {"rope__freq_base_swa": 5.0}, ("rope.freq_base_swa", "5.0")),
        ("qwen2", {"block_count": None}, ("qwen2.block_count is missing",)),
        ("qwen2", {"feed_forward_length": [160, 160]}, ("feed_forward_length", "all layers")),
        ("gemma2", {"attention__sliding_window": 0}, ("gemma2.attention.sliding_window", "0")),
        ("gemma2", {"attention__sliding_window_pattern": 3}, ("sliding_window_pattern", "3")),
        ("gemma3", {"attn_logit_softcapping": 50.0}, ("gemma3.attn_logit_softcapping", "50.0")),
        ("gemma3", {"attention__sliding_window_pattern": 0}, ("sliding_window_pattern", "0")),
        ("qwen3-moe", {"expert_used_count": 6}, ("qwen3moe.expert_used_count", "6", "to 5")),
        ("qwen3-moe", {"expert_gating_func": 2}, ("expert_gating_func", "2", "softmax")),
        ("qwen3-moe", {"expert_count": 6}, ("ffn_gate_exps", "(320, 96)", "(384, 96)")),
        ("mixtral", {"expert_count": None}, ("llama.expert_used_count is 2",)),
        ("mixtral", {"expert_shared_count": 1}, ("expert_shared_count", "1")),
        ("qwen3", {"attention__value_length": 16}, ("value_length", "16", "32")),
        ("phi3", {"rope__dimension_count": 17}, ("phi3.rope.dimension_count", "17", "at most 16")),
        ("phi3", {"attention__sliding_window": 2**25}, ("sliding_window", "33554432")),
        ("qwen2", {"rope__scaling__attn_factor": 1.5}, ("qwen2.rope.scaling.attn_factor", "1.5")),
        ("phi3", {"rope__scaling__attn_factor": 1.5}, ("phi3.rope.scaling.attn_factor", "1.5")),
        ("phi4-mini", {"rope__scaling__factor": 4.0}, ("phi3.rope.scaling.factor", "4.0")),
        ("phi4-mini", {"rope__dimension_count": 13}, ("13",)),
        ("phi4-mini", {"rope__scaling__attn_factor": -2.0}, ("attn_factor", "-2.0")),
        ("llama, yarn", {"rope__scaling__original_context_length": None}, ("is missing",)),
        ("llama, yarn", {"rope__scaling__yarn_ext_factor": 0.5}, ("yarn_ext_factor", "0.5")),
    ],
)
def test_what_is_refused(
    case: str, changes: dict[str, Any], parts: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write(path, case, **changes)
    with pytest.raises((UnsupportedModelError, WeightsError)) as caught:
        open_checkpoint(read_model(path))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize("case", ["qwen2", "phi4-mini"])
def test_mutated_headers(case: str, tmp_path: Path) -> None:
    """1,000 damaged files: a typed error, or weights as the configuration wants them."""
    path = tmp_path / "model.gguf"
    write(path, case, "Q4_0")
    original = path.read_bytes()
    header = original.rindex(b"blk.2.") + 60

    def load(file: Path) -> None:
        for _, _, tensor in open_checkpoint(read_model(file)).checked_runs():
            assert tensor.data.size

    outcomes = count_outcomes(load, path, mutations(original, header, seed=3))
    assert outcomes["refused"] > 0.3 * COUNT and outcomes["read"] > 0.1 * COUNT, outcomes


def test_an_attention_factor_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, "phi4-mini", rope__scaling__attn_factor=1.5)
    rope = read_model(path).spec.layers[0].rope
    assert rope is not None and rope.attention_factor == 1.5
