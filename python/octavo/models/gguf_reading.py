"""What llama.cpp's converter writes of most families: metadata as a config.json, tensors' names.

Metadata entries begin with the name of the architecture: `llama.block_count`. A family's own file
(`models/llama_gguf.py`) adds what only it has. An entry that changes the result and that the family
does not read is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from octavo.errors import WeightsError
from octavo.models.family import GgufHeader
from octavo.models.fields import FieldError, Fields, Limit

# The names that most families share, as in `gguf.constants`.
GGUF_TENSORS = {
    "token_embd": "embed",
    "blk.{layer}.attn_norm": "attn_norm",
    "blk.{layer}.attn_q": "q",
    "blk.{layer}.attn_k": "k",
    "blk.{layer}.attn_v": "v",
    "blk.{layer}.attn_output": "o",
    "blk.{layer}.ffn_norm": "mlp_norm",
    "blk.{layer}.ffn_gate": "gate",
    "blk.{layer}.ffn_up": "up",
    "blk.{layer}.ffn_down": "down",
    "output_norm": "final_norm",
    "output": "lm_head",
}
# Experts: the matrices of all of them in one tensor of three axes, which is read as one of two.
GGUF_EXPERTS = {
    "blk.{layer}.ffn_gate_inp": "router",
    "blk.{layer}.ffn_gate_exps": "experts.{expert}.gate",
    "blk.{layer}.ffn_up_exps": "experts.{expert}.up",
    "blk.{layer}.ffn_down_exps": "experts.{expert}.down",
}
EXPERT_ENTRIES = ("expert_count", "expert_used_count")
GGUF_HEAD_NORMS = {
    "blk.{layer}.attn_q_norm": "q_norm",
    "blk.{layer}.attn_k_norm": "k_norm",
}

_NO_EXPERTS, _NO_SCALE = "0 (no experts)", "no scale (the entry left out)"
# Entries that change the result: the values that stand for no change, and why.
_CHANGES: dict[str, tuple[tuple[object, ...], str]] = {
    "expert_count": ((0,), _NO_EXPERTS),
    "expert_used_count": ((0,), _NO_EXPERTS),
    "expert_shared_count": ((0,), "0 (no experts that all tokens share)"),
    "expert_gating_func": ((1,), "1 (softmax)"),
    "expert_weights_scale": ((), _NO_SCALE),
    "leading_dense_block_count": ((0,), "0 (experts in all layers)"),
    "attention.sliding_window": ((0,), "0 (every token attends to all before it)"),
    "attention.sliding_window_pattern": ((), "windows in all layers or in none"),
    "attention.causal": ((True,), "true"),
    "use_parallel_residual": ((False,), "false"),
    "logit_scale": ((), _NO_SCALE),
    "residual_scale": ((), _NO_SCALE),
    "embedding_scale": ((), _NO_SCALE),
    "attention.scale": ((), _NO_SCALE),
    "attn_logit_softcapping": ((0.0,), "0 (scores are not capped)"),
    "final_logit_softcapping": ((0.0,), "0 (logits are not capped)"),
    "rope.freq_base_swa": ((), "one base for all layers (the entry left out)"),
    "rope.scaling.attn_factor": ((1.0,), "1"),
    "rope.scaling.yarn_log_multiplier": ((), _NO_SCALE),
    "rope.scaling.yarn_ext_factor": ((1.0,), "1"),
    "rope.dimension_sections": ((), "text only (the entry left out)"),
}
# Of YaRN: the entries, and their names in a Hugging Face config.
_YARN = {
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}


class Entries(Fields):
    """The metadata entries of one architecture, named without it; messages have the whole name."""

    def __init__(self, header: GgufHeader, architecture: str) -> None:
        self.prefix = architecture + "."
        own = {
            name.removeprefix(self.prefix): value
            for name, value in header.metadata.items()
            if name.startswith(self.prefix)
        }
        super().__init__(own, header.source)

    def error(self, name: str, value: object, expected: str) -> FieldError:
        """As of `Fields`."""
        return super().error(self.prefix + name, value, expected)

    def _get(self, name: str, default: Any, expected: str) -> Any:
        if name not in self.values and default is None:
            whole = self.prefix + name
            raise FieldError(f"{self.source}: {whole} is missing; expected {expected}", whole, True)
        return super()._get(name, default, expected)


def read_common(
    header: GgufHeader, architecture: str, reads: Collection[str] = (), *, partial: bool = False
) -> tuple[Entries, dict[str, Any]]:
    """The entries, and the fields of a Hugging Face config that most families have.

    reads: entries that change the result and that the family reads itself. partial: whether only a
    part of a head may rotate, which becomes partial_rotary_factor.
    """
    entries = Entries(header, architecture)
    for name, (neutral, advice) in _CHANGES.items():
        if name not in reads:
            entries.refuse_unless(name, neutral, advice)
    for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(entries.values.get(name), list):
            raise entries.error(name, entries.values[name], "one number for all layers")
    hidden_size = entries.integer("embedding_length", 1, Limit.WIDTH)
    num_heads = entries.integer("attention.head_count", 1, Limit.HEADS)
    head_dim, rotated = _read_head(entries, hidden_size, num_heads, partial)
    if rotated != head_dim and not partial:
        raise entries.error(
            "rope.dimension_count", rotated, f"{head_dim} (the whole head is rotated)"
        )
    config = {
        "head_dim": head_dim,
        "hidden_size": hidden_size,
        "intermediate_size": entries.integer("feed_forward_length", 1, Limit.INTERMEDIATE),
        "max_position_embeddings": entries.integer("context_length", 1, Limit.POSITIONS),
        "num_attention_heads": num_heads,
        "num_hidden_layers": entries.integer("block_count", 1, Limit.LAYERS),
        "num_key_value_heads": entries.integer(
            "attention.head_count_kv", 1, Limit.HEADS, num_heads
        ),
        "rms_norm_eps": shortest(entries.number("attention.layer_norm_rms_epsilon", 0.0, 1.0)),
        "rope_theta": shortest(read_theta(entries)),
        "tie_word_embeddings": "output.weight" not in header.shapes,
        "vocab_size": _read_vocab_size(header, entries),
    }
    if rotated != head_dim:
        config["partial_rotary_factor"] = rotated / head_dim
    return entries, config


def read_experts(entries: Fields) -> tuple[int, int]:
    """How many experts there are, and how many of them a token goes through."""
    count = entries.integer("expert_count", 1, Limit.HEADS)
    return count, entries.integer("expert_used_count", 1, count)


def read_theta(entries: Fields) -> float:
    """The base of the rope frequencies."""
    return entries.number("rope.freq_base", 0.0, default=10000.0, exclude_low=True)


def read_rope_scaling(entries: Fields) -> dict[str, Any] | None:
    """The `rope_scaling` of config.json: none, linear (as for llama.cpp without a type) or yarn."""
    kind = entries.values.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise entries.error("rope.scaling.type", kind, "none, linear, yarn")
    old = entries.number("rope.scale_linear", 0.0, default=1.0, exclude_low=True)
    factor = entries.number("rope.scaling.factor", 0.0, default=old, exclude_low=True)
    if kind == "yarn":
        name = "rope.scaling.original_context_length"
        scaling = {
            "rope_type": "yarn",
            "factor": shortest(factor),
            "original_max_position_embeddings": entries.integer(name, 1, Limit.POSITIONS),
        }
        for entry, field in _YARN.items():
            if entry in entries.values:
                scaling[field] = shortest(entries.number(entry, 0.0, exclude_low=True))
        return scaling
    if factor != 1.0 and kind == "linear":
        return {"rope_type": "linear", "factor": shortest(factor)}
    return None


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 instead of 9.99999974e-06."""
    return float(str(np.float32(value)))


def _read_head(
    entries: Entries, hidden_size: int, num_heads: int, partial: bool
) -> tuple[int, int]:
    """The size of a head, and how many of its elements rotate."""
    rotated = entries.optional_integer("rope.dimension_count", 1, Limit.HEAD_DIM)
    head_dim = entries.optional_integer("attention.key_length", 1, Limit.HEAD_DIM)
    if head_dim is None and not partial:
        head_dim = rotated
    if head_dim is None:
        if hidden_size % num_heads:
            raise entries.error(
                "embedding_length", hidden_size, f"a multiple of {num_heads}, the heads"
            )
        head_dim = hidden_size // num_heads
    value = entries.optional_integer("attention.value_length", 1, Limit.HEAD_DIM)
    if value not in (None, head_dim):
        raise entries.error("attention.value_length", value, f"{head_dim}, as keys have")
    if rotated is not None and rotated > head_dim:
        raise entries.error("rope.dimension_count", rotated, f"at most {head_dim}, a head")
    return head_dim, head_dim if rotated is None else rotated


def _read_vocab_size(header: GgufHeader, entries: Entries) -> int:
    embedding = header.shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise WeightsError(f"{header.source} holds no token_embd.weight of two dimensions")
    stated = entries.optional_integer("vocab_size", 1, Limit.VOCAB)
    if stated not in (None, embedding[0]):
        raise entries.error("vocab_size", stated, f"{embedding[0]}, the rows of token_embd")
    return embedding[0]
