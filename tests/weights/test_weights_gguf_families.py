"""GGUF files of every family: the same configuration and weights as from a Hugging Face directory.

Tensors are named by `gguf`'s own map from Hugging Face's names, and changed as llama.cpp's
converter changes them; metadata are those that it writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from fuzz_weights import count_outcomes, mutations
from weights_helpers import add_entry, add_tensor, permute_rows, tiny_vocabulary

from octavo.errors import UnsupportedModelError, WeightsError
from octavo.models.registry import FAMILIES, find_family
from octavo.quantization.apply import dequantized
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.gguf_folder import GgufFolder
from octavo.weights.model_files import read_folder, read_model

TOKENS, TOKEN_TYPES, MERGES = tiny_vocabulary()
VOCAB = len(TOKENS)
COMMON = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 200,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "rope_theta": 20000.0,
}
# Of every case: Hugging Face's configuration beside COMMON, and llama.cpp's entries for it.
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(6)],
    "long_factor": [2.0 + 0.5 * i for i in range(6)],
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"head_dim": 16}, {"rope.dimension_count": 16}),
    "mistral nemo": (
        "LlamaForCausalLM",
        {"head_dim": 32},
        {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32},
    ),
    "llama, yarn": (
        "LlamaForCausalLM",
        {
            "head_dim": 16,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 50,
                "beta_fast": 24.0,
            },
        },
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 50,
            "rope.scaling.yarn_beta_fast": 24.0,
        },
    ),
    "qwen2": ("Qwen2ForCausalLM", {}, {}),
    "qwen2, tied": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}, {}),
    "qwen3": (
        "Qwen3ForCausalLM",
        {"head_dim": 32, "tie_word_embeddings": True},
        {"attention.key_length": 32, "attention.value_length": 32},
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            **{"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24},
            **{"attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0},
        },
        {
            **{"attention.key_length": 32, "attention.value_length": 32},
            **{"attention.sliding_window": 24, "attn_logit_softcapping": 40.0},
            "final_logit_softcapping": 20.0,
        },
    ),
    # As of the models of 27 billion weights, which have so many layers.
    "gemma2, 27b": (
        "Gemma2ForCausalLM",
        {"head_dim": 32, "query_pre_attn_scalar": 16, "num_hidden_layers": 46},
        {"attention.key_length": 32, "attention.value_length": 32},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            **{"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24},
            **{"num_hidden_layers": 7, "rope_local_base_freq": 500.0},
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            **{"attention.key_length": 32, "attention.value_length": 32},
            **{"attention.sliding_window": 24, "rope.freq_base_swa": 500.0},
            **{"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        },
    ),
    "gemma3, no windows": (
        "Gemma3ForCausalLM",
        {
            **{"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": None},
            **{"layer_types": ["full_attention"] * 3, "tie_word_embeddings": False},
        },
        {"attention.key_length": 32, "attention.value_length": 32},
    ),
    "phi3": (
        "Phi3ForCausalLM",
        {"sliding_window": 70, "original_max_position_embeddings": 200},
        {"attention.sliding_window": 70, "rope.scaling.original_context_length": 200},
    ),
    "phi4-mini": (
        "Phi3ForCausalLM",
        {
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 50,
            "rope_scaling": LONGROPE,
            "tie_word_embeddings": True,
        },
        {
            "attention.sliding_window": 0,
            "rope.dimension_count": 12,
            "rope.scaling.original_context_length": 50,
            "rope.scaling.attn_factor": (1 + np.log(4) / np.log(50)) ** 0.5,
        },
    ),
}


def hugging_face(case: str) -> dict[str, Any]:
    architecture, own, _ = CASES[case]
    model_type = FAMILIES[architecture].model_type
    return {**COMMON, **own, "architectures": [architecture], "model_type": model_type}


def write(path: Path, case: str, kind: str = "F32", **changes: Any) -> dict[str, np.ndarray]:
    """A GGUF of the case; returns the weights under Hugging Face's names.

    changes: of metadata entries, named with "__" for "."; None leaves one out.
    """
    config = hugging_face(case)
    family = find_family(config)
    spec = family.read_spec(config)
    generator = np.random.default_rng(11)
    weights: dict[str, np.ndarray] = {}
    for source in family.tensors.weight_map(spec).values():
        if source.tensor not in weights:
            values = generator.standard_normal(source.stored_shape)
            weights[source.tensor] = values.astype(np.float32)
    assert family.gguf is not None
    architecture = family.gguf.architecture
    keys = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(keys[architecture], len(spec.layers))
    entries = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
        **CASES[case][2],
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in entries.items():
        add_entry(writer, f"{architecture}.{name}", value)
    for name, value in {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": TOKENS,
        "token_type": TOKEN_TYPES,
        "merges": MERGES,
        "eos_token_id": 1,
    }.items():
        add_entry(writer, f"tokenizer.ggml.{name}", value)
    for name, values in weights.items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        stored = as_converted(architecture, name, values, config)
        add_tensor(writer, theirs, stored, kind if values.ndim == 2 else "F32")
    if config.get("rope_scaling") is LONGROPE:
        for length in ("short", "long"):
            factors = np.array(LONGROPE[f"{length}_factor"], np.float32)
            add_tensor(writer, f"rope_factors_{length}.weight", factors, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def as_converted(
    architecture: str, name: str, values: np.ndarray, config: dict[str, Any]
) -> np.ndarray:
    """What llama.cpp's converter changes in a tensor."""
    if architecture == "llama" and ".q_proj." in name:
        return permute_rows(values, config["num_attention_heads"])
    if architecture == "llama" and ".k_proj." in name:
        return permute_rows(values, config["num_key_value_heads"])
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    return values


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
def test_codes_of_every_family(case: str, tmp_path: Path) -> None:
    """Rows of fused matrices, and of q and k in another order, as codes too."""
    path = tmp_path / "model.gguf"
    write(path, case, "Q4_0")
    checkpoint = open_checkpoint(read_model(path))
    exact = open_checkpoint(read_folder(GgufFolder(path, "f32")))
    assert {"layers.1.k", "layers.1.gate", "embed"} <= checkpoint.formats.keys()
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
        ("qwen3", {"attention__value_length": 16}, ("value_length", "16", "32")),
        ("phi3", {"rope__dimension_count": 17}, ("phi3.rope.dimension_count", "17", "at most 16")),
        ("phi3", {"attention__sliding_window": 2**25}, ("sliding_window", "33554432")),
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
        for _, tensor in open_checkpoint(read_model(file)).checked_items():
            assert tensor.data.size

    outcomes = count_outcomes(load, path, mutations(original, 1000, header, seed=3))
    assert outcomes["refused"] > 300 and outcomes["read"] > 100, outcomes


def test_an_attention_factor_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, "phi4-mini", rope__scaling__attn_factor=1.5)
    rope = read_model(path).spec.layers[0].rope
    assert rope is not None and rope.attention_factor == 1.5
