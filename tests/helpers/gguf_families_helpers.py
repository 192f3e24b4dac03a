"""Small GGUF files of every family, as llama.cpp's converter writes them.

Tensors are named by `gguf`'s own map from Hugging Face's names, and changed as the converter does
it; metadata are those that it writes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from weights_helpers import add_entry, add_tensor, permute_rows, tiny_vocabulary

from octavo.models.registry import FAMILIES, find_family

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
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        {
            **{"head_dim": 32, "num_experts": 5, "num_experts_per_tok": 3},
            **{"moe_intermediate_size": 64, "norm_topk_prob": True},
        },
        {
            **{"attention.key_length": 32, "attention.value_length": 32, "expert_count": 5},
            **{"expert_used_count": 3, "expert_feed_forward_length": 64},
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        {"expert_count": 4, "expert_used_count": 2, "rope.dimension_count": 16},
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


def write(
    path: Path, case: str, kind: str = "F32", std: float = 1.0, **changes: Any
) -> dict[str, np.ndarray]:
    """A GGUF of the case; returns the weights under Hugging Face's names.

    std: of the random numbers of matrices. changes: of metadata entries, named with "__" for ".";
    None leaves one out.
    """
    config = hugging_face(case)
    family = find_family(config)
    spec = family.read_spec(config)
    generator = np.random.default_rng(11)
    weights: dict[str, np.ndarray] = {}
    for source in family.tensors.weight_map(spec).values():
        if source.tensor not in weights:
            values = generator.standard_normal(source.stored_shape)
            values *= std if values.ndim == 2 else 1
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
    for name, values in stack_experts(weights).items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        stored = as_converted(architecture, name, values, config)
        plain = values.ndim < 2 or "gate_inp" in theirs
        add_tensor(writer, theirs, stored, "F32" if plain else kind)
    if config.get("rope_scaling") is LONGROPE:
        for length in ("short", "long"):
            factors = np.array(LONGROPE[f"{length}_factor"], np.float32)
            add_tensor(writer, f"rope_factors_{length}.weight", factors, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def stack_experts(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts' matrices as the converter stacks them, under the names that it gives the stacks."""
    stacked: dict[str, Any] = {}
    for name, values in weights.items():
        match = re.fullmatch(r"(.*experts)\.\d+\.(.*)", name)
        if match:
            stacked.setdefault(f"{match[1]}.{match[2]}", []).append(values)
        else:
            stacked[name] = values
    return {name: np.array(values) for name, values in stacked.items()}


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
