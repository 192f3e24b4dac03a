"""Random small models of every family, made by transformers and saved as it saves them.

Sizes are odd, windows are shorter and longer than the prompts, no norm's weight is 1 and no bias
0; matrices are as large as they may be without losing the differences between logits.
"""

from __future__ import annotations

import tempfile
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

VOCAB = 97
MAX_MODEL_LEN = 192
ORIGINAL = 45  # beyond so many tokens a model's rope has other frequencies, in two cases
_TOKENS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": None}
_SIZES = {
    **{"vocab_size": VOCAB, "hidden_size": 42, "intermediate_size": 57, "num_hidden_layers": 3},
    **{"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10},
    **{"max_position_embeddings": 256, **_TOKENS},
}
_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 1}  # of 14, as hidden_size implies
_TURNS = ["sliding_attention", "full_attention", "sliding_attention"]
_LONG = {  # factors for head_dim 10, which transformers takes from a hidden_size of 60
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0],
    "long_factor": [1.0, 1.9, 2.9, 4.1, 8.0],
}

# "model_type, what is unusual" -> fields of its configuration beside _SIZES.
CASES: dict[str, dict[str, Any]] = {
    "llama, yarn": {
        "rope_scaling": {
            **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
        }
    },
    "llama, dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, **_HEADS},
    "mistral, window": {"sliding_window": 23, "num_key_value_heads": 1},
    "mistral, no window": {"sliding_window": None, "tie_word_embeddings": True},
    "ministral, windows in turn": {"sliding_window": 17, "layer_types": _TURNS},
    "ministral, long windows": {"sliding_window": 150, "layer_types": _TURNS[::-1]},
    "qwen2, tied": {"head_dim": None, **_HEADS, "tie_word_embeddings": True},
    "qwen2, windows": {
        **{"head_dim": None, **_HEADS, "num_key_value_heads": 3, "use_sliding_window": True},
        **{"sliding_window": 19, "max_window_layers": 1},
    },
    "phi3, short factors": {
        **{"hidden_size": 60, "rope_scaling": _LONG},
        "original_max_position_embeddings": MAX_MODEL_LEN,
    },
    "phi3, long factors, window": {
        **{"hidden_size": 60, "rope_scaling": _LONG, "original_max_position_embeddings": ORIGINAL},
        "sliding_window": 31,
    },
    "phi3, partial rotary": {"partial_rotary_factor": 0.6, "tie_word_embeddings": True},
    "smollm3, layers without rope": {"head_dim": None, **_HEADS, "num_hidden_layers": 5},
    "smollm3, windows and biases": {
        **{"head_dim": None, **_HEADS, "no_rope_layers": [1, 0, 1], "use_sliding_window": True},
        **{"sliding_window": 21, "attention_bias": True, "mlp_bias": True},
    },
    "starcoder2, window": {"head_dim": None, **_HEADS, "sliding_window": 20},
    "starcoder2, no biases": {
        **{"head_dim": None, **_HEADS, "use_bias": False, "tie_word_embeddings": False},
    },
    "qwen3, biases": {"attention_bias": True},
    "qwen3, windows": {
        **{"use_sliding_window": True, "sliding_window": 19, "max_window_layers": 2},
        **{"num_key_value_heads": 1, "tie_word_embeddings": True},
    },
    "gemma2, windows": {"sliding_window": 13, "query_pre_attn_scalar": 17},
    "gemma2, no caps": {
        **{"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 250},
        **{"attention_bias": True},
    },
    "gemma3_text, windows": {
        **{"sliding_window": 15, "sliding_window_pattern": 2, "query_pre_attn_scalar": 12},
    },
    "gemma3_text, scaled rope": {
        **{"sliding_window": 33, "layer_types": _TURNS, "final_logit_softcapping": 9.0},
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 7e3},
        },
    },
    "granite, multipliers": {
        **{"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 0.7},
        **{"attention_multiplier": 0.17, "attention_bias": True},
    },
    "olmo2, norms after": {"num_key_value_heads": 3},
    "olmo2, biases": {"attention_bias": True, "head_dim": None, **_HEADS},
    "mixtral, two of four experts": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral, one of two, window": {
        **{"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 23},
        **{"tie_word_embeddings": True, "num_key_value_heads": 1},
    },
    "qwen3_moe, a layer without experts": {
        **{"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 29},
        **{"mlp_only_layers": [1], "attention_bias": True},
    },
    "qwen3_moe, every second layer": {
        **{"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        **{"decoder_sparse_step": 2, "norm_topk_prob": True, "hidden_size": 48},
    },
    "qwen3_moe, all experts": {
        **{"num_experts": 3, "num_experts_per_tok": 3, "moe_intermediate_size": 64},
        **{"use_sliding_window": True, "sliding_window": 19},
    },
    "gpt2, tied": {},
    "gpt2, scores by layer": {
        **{"scale_attn_by_inverse_layer_idx": True, "n_inner": 51, "activation_function": "relu"},
    },
}
# With logits that depend on what transformers has computed before: see `whole_forward`.
DYNAMIC = "llama, dynamic beyond its length"
_STATEFUL: dict[str, dict[str, Any]] = {
    DYNAMIC: {
        **{"rope_scaling": {"rope_type": "dynamic", "factor": 5.0}, **_HEADS},
        "max_position_embeddings": ORIGINAL,
    }
}
_GPT2_SIZES = {
    **{"vocab_size": VOCAB, "n_embd": 42, "n_head": 3, "n_layer": 3, "n_positions": 256, **_TOKENS}
}


def make_model(case: str) -> Any:
    """The transformers model of a case, float32, with eager attention."""
    model_type = case.partition(",")[0]
    sizes = _GPT2_SIZES if model_type == "gpt2" else _SIZES
    changes = {**CASES, **_STATEFUL}[case]
    fields = deepcopy({**sizes, **changes})  # transformers keeps and changes the dicts
    if fields.get("head_dim", 0) is None:  # left out: the others imply it
        del fields["head_dim"]
    torch.manual_seed(len(case))
    config = transformers.AutoConfig.for_model(model_type, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the default refuses odd widths
    model = model.float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if "norm" in name or ".ln_" in name:
                weight.copy_(weight + 0.25 * noise)
            elif weight.ndim == 1 or "embed" in name or "transformer.w" in name:
                weight.copy_(0.3 * noise)
            else:
                inputs = weight.shape[-1 if weight.ndim == 3 else 1]  # of experts, of a matrix
                weight.copy_(1.2 * noise * inputs**-0.5)
    return model


@cache
def saved_model(case: str) -> tuple[Any, Path]:
    """The model of a case and the directory that transformers saved it in; made once."""
    model = make_model(case)
    directory = _directory() / case.replace(",", "").replace(" ", "-")
    model.save_pretrained(directory)
    return model, directory


@cache
def _directory() -> Path:
    # Deleted with the process, together with what refers to it.
    keep = tempfile.TemporaryDirectory(prefix="octavo-families-")
    _KEPT.append(keep)
    return Path(keep.name)


_KEPT: list[Any] = []


def tokens_of(count: int, seed: int) -> np.ndarray:
    """int32 (count,), random, none of them special."""
    return np.random.default_rng(seed).integers(3, VOCAB, count).astype(np.int32)


def logits_of(model: Any, tokens: Any) -> np.ndarray:
    """transformers' logits at every position, float32 (rows, vocab_size)."""
    with torch.inference_mode():
        ids = torch.from_numpy(np.asarray(tokens, np.int64))[None]
        logits: np.ndarray = model(ids).logits[0].float().numpy()
    return logits


def whole_forward(model: Any, tokens: Any) -> np.ndarray:
    """The same, once the model has seen MAX_MODEL_LEN tokens, by which dynamic rope is chosen."""
    logits_of(model, tokens_of(MAX_MODEL_LEN, 0))
    return logits_of(model, tokens)
