"""Small models in every quantized format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from weights_helpers import encode, random_weights, tiny_config, write_model, write_safetensors

from octavo.models.family import group_by_tensor
from octavo.quantization.plan import Scheme
from octavo.quantize.writer import quantize_directory
from octavo.weights.model_files import read_model
from octavo.weights.reader import whole_tensor

# Widths 96 (divided by 32 alone) and 160, more than one panel of outputs, rows that fill none.
CONFIG: dict[str, Any] = tiny_config(
    vocab_size=67,
    hidden_size=96,
    intermediate_size=160,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
)

SCHEMES = {
    "int8": Scheme("int8"),
    "int4": Scheme("int4"),
    "int4-rtn": Scheme("int4", method="rtn"),
    "int4-asymmetric": Scheme("int4", symmetric=False),
    "int4-asymmetric-rtn": Scheme("int4", symmetric=False, method="rtn"),
    "int4-128": Scheme("int4", group_size=128),
    "int4-nonuniform": Scheme("int4-nonuniform"),
    "int4-mixed": Scheme("int4", int8=("layers.0.?", "layers.0.down")),
}


def write_float_model(path: Path, dtype: str = "BF16", **changes: Any) -> Path:
    """A random model whose weights are not centred, so that zero points have work to do."""
    config = {**CONFIG, **changes}
    weights = random_weights(config, seed=3)
    for name, values in weights.items():
        if values.ndim == 2:
            shift = np.linspace(-0.03, 0.05, values.shape[1], dtype=np.float32)
            weights[name] = values + shift
    write_model(path, config, weights=weights, dtype=dtype)
    return path


# Families whose checkpoints hold fused, turned, stacked or shifted tensors, in CONFIG's sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "phi3": CONFIG
    | {
        **{"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "sliding_window": None},
        **{"original_max_position_embeddings": 128, "pad_token_id": 0},
        "intermediate_size": 164,  # so that up begins within a word of zero points
    },
    "gpt2": {
        **{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 67},
        **{"n_embd": 96, "n_head": 6, "n_layer": 2, "n_positions": 64, "n_inner": 160},
        **{"eos_token_id": 2},
    },
    "mixtral": CONFIG
    | {
        **{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"},
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    },
    "qwen3_moe": CONFIG
    | {
        **{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"},
        **{"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        **{"mlp_only_layers": [0], "num_hidden_layers": 3, "norm_topk_prob": True},
    },
    "gemma2": CONFIG
    | {
        **{"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"},
        **{"query_pre_attn_scalar": 17, "sliding_window": 13, "tie_word_embeddings": True},
        "hidden_activation": "gelu_pytorch_tanh",
    },
}


def write_family_model(
    path: Path, family: str, dtype: str = "BF16", uneven: bool = False, **changes: Any
) -> Path:
    """A random model of a family; norms are around 1, routers float32, biases not 0.

    uneven: some channels are much larger than others.
    """
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({**FAMILIES[family], **changes}))
    generator, files, tensors = np.random.default_rng(5), read_model(path), {}
    for tensor, names in group_by_tensor(files.weight_map).items():
        parts = []
        for name in names:
            place = files.weight_map[name]
            values = generator.standard_normal(place.shape)
            values *= 0.2 if len(place.shape) == 1 else place.shape[1] ** -0.5
            values += 1 if "norm.weight" in name else 0
            if uneven and "norm.weight" in name:
                values *= np.exp(generator.standard_normal(place.shape))
            parts.append((place, values.astype(np.float32)))
        kind = "F32" if names[0].endswith(".router.weight") else dtype
        tensors[tensor] = (kind, encode(whole_tensor(parts), kind))
    write_safetensors(path / "model.safetensors", tensors, metadata={"format": "pt"})
    return path


def write_quantized_model(tmp_path: Path, scheme: str, **changes: Any) -> tuple[Path, Path]:
    """(float model, quantized directory)."""
    source = write_float_model(tmp_path / "float", **changes)
    target = tmp_path / scheme
    quantize_directory(source, target, SCHEMES[scheme])
    return source, target
