"""Random Llama models made by transformers, small and odd, and what goes on inside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import ModelFiles, read_model

torch.set_num_threads(1)

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Small, so that among a few dozen pairs some are kept, some scaled and some in between.
    "original_max_position_embeddings": 64,
}

# heads, KV heads and head_dim, then whatever else is unusual. hidden_size is heads * head_dim
# unless given.
SHAPES: dict[str, dict[str, Any]] = {
    "plain_4x32": {"heads": 4, "kv": 4, "head_dim": 32, "tie_word_embeddings": True},
    "smollm_9_3x64": {"heads": 9, "kv": 3, "head_dim": 64, "tie_word_embeddings": True},
    "mqa_5_1x80": {"heads": 5, "kv": 1, "head_dim": 80},
    "plain_3x128": {"heads": 3, "kv": 3, "head_dim": 128},
    "gqa4_8_2x32_biases": {
        **{"heads": 8, "kv": 2, "head_dim": 32},
        **{"attention_bias": True, "mlp_bias": True},
    },
    "gqa8_8_1x64_llama3": {"heads": 8, "kv": 1, "head_dim": 64, "rope_parameters": _LLAMA3},
    "gqa3_6_2x32_linear": {
        **{"heads": 6, "kv": 2, "head_dim": 32, "hidden_act": "gelu"},
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    },
    # hidden_size says nothing of head_dim; odd widths everywhere else.
    "wide_heads_7x32": {
        **{"heads": 7, "kv": 7, "head_dim": 32, "hidden_size": 105, "intermediate_size": 157},
        **{"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "mlp_bias": True},
    },
    "gqa8_16_2x80_llama3_biases": {
        **{"heads": 16, "kv": 2, "head_dim": 80, "hidden_size": 96, "attention_bias": True},
        **{"rope_parameters": {**_LLAMA3, "rope_theta": 500000.0, "factor": 32.0}},
    },
    "relu_1x128": {"heads": 1, "kv": 1, "head_dim": 128, "hidden_act": "relu"},
}


def make_config(shape: dict[str, Any]) -> LlamaConfig:
    """The configuration of an entry of SHAPES."""
    rest = dict(shape)
    heads, kv, head_dim = rest.pop("heads"), rest.pop("kv"), rest.pop("head_dim")
    settings: dict[str, Any] = {
        "vocab_size": 307,
        "hidden_size": heads * head_dim,
        "intermediate_size": 211,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
        **rest,
    }
    return LlamaConfig(**settings)


def make_hf_model(shape: dict[str, Any], seed: int = 0) -> LlamaForCausalLM:
    """A random float32 model whose every weight matters: norms are not 1, biases not 0."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(make_config(shape)).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.25 * torch.randn_like(weight))
            elif name.endswith("bias"):
                weight.copy_(0.3 * torch.randn_like(weight))
            elif "embed" in name:
                weight.copy_(0.5 * torch.randn_like(weight))
            else:  # so that what comes out has the size of what went in
                weight.copy_(torch.randn_like(weight) * weight.shape[1] ** -0.5)
    return model


def save_and_read(model: LlamaForCausalLM, path: Path) -> tuple[ModelFiles, dict[str, np.ndarray]]:
    """Save as Hugging Face does, read as octavo does: the files and the float32 weights."""
    model.save_pretrained(path)
    files = read_model(path)
    weights = {name: tensor.to_float32() for name, tensor in open_checkpoint(files).items()}
    return files, weights


def hf_logits(model: LlamaForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """(rows, vocab_size) for one sequence, in the model's own precision (bf16 as float32)."""
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
    return (logits.float() if logits.dtype == torch.bfloat16 else logits).numpy()


def hf_taps(model: LlamaForCausalLM, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Every tap of octavo, from inside transformers: name -> float32 (rows, width)."""
    taps: dict[str, np.ndarray] = {}

    def record(name: str, value: torch.Tensor) -> None:
        taps[name] = value.detach()[0].float().reshape(value.shape[1], -1).numpy()

    def output(name: str) -> Any:
        return lambda _module, _args, value: record(
            name, value[0] if isinstance(value, tuple) else value
        )

    def argument(name: str) -> Any:
        return lambda _module, args: record(name, args[0])

    inner = model.model
    handles = [inner.embed_tokens.register_forward_hook(output("embed"))]
    for index, layer in enumerate(inner.layers):
        attention, mlp, prefix = layer.self_attn, layer.mlp, f"layers.{index}."
        outputs = {
            **{"attn_norm": layer.input_layernorm, "q": attention.q_proj, "k": attention.k_proj},
            **{"v": attention.v_proj, "attn_out": attention.o_proj, "up": mlp.up_proj},
            **{"mlp_norm": layer.post_attention_layernorm, "gate": mlp.gate_proj},
            **{"mlp_out": mlp, "out": layer},
        }
        handles += [
            module.register_forward_hook(output(prefix + name)) for name, module in outputs.items()
        ]
        handles.append(attention.o_proj.register_forward_pre_hook(argument(prefix + "attn")))
        handles.append(mlp.down_proj.register_forward_pre_hook(argument(prefix + "act")))
    handles.append(inner.norm.register_forward_hook(output("final_norm")))
    handles.append(model.lm_head.register_forward_hook(output("logits")))
    try:
        with _recorded_rope(record):
            hf_logits(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return taps


@contextmanager
def _recorded_rope(record: Any) -> Iterator[None]:
    """Rope is a function in transformers, not a module: watch it by putting one in its place."""
    original = modeling_llama.apply_rotary_pos_emb
    layer = 0

    def watched(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal layer
        q, k = original(q, k, *args, **kwargs)
        record(f"layers.{layer}.q_rope", q.transpose(1, 2))
        record(f"layers.{layer}.k_rope", k.transpose(1, 2))
        layer += 1
        return q, k

    modeling_llama.apply_rotary_pos_emb = watched
    try:
        yield
    finally:
        modeling_llama.apply_rotary_pos_emb = original
