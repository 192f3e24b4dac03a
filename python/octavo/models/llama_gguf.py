"""A GGUF file of the Llama architecture: its metadata as a config.json, the names of its tensors.

llama.cpp's converter from Hugging Face to GGUF changes three things, which are undone here:

- Names: `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`.
- The rows of q and k (weights and biases). Hugging Face rotates element i of a head together with
  element i + d/2; the rotation llama.cpp uses for Llama takes neighbours, 2i and 2i + 1. So the
  converter moves row h * d/2 + i of each head (h: which half) to row 2 * i + h.
- Llama 3's rope scaling becomes a tensor `rope_freqs.weight` that divides the frequencies.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.errors import UnsupportedModelError, WeightsError
from octavo.models.family import GgufFamily, GgufHeader, TensorNames
from octavo.models.fields import Fields, Limit, describe
from octavo.models.rope import default_rope, llama3_rope

_ROPE_FREQS = "rope_freqs.weight"


def read_config(header: GgufHeader) -> dict[str, Any]:
    """The `config.json` of a GGUF file; UnsupportedModelError names what octavo cannot run."""
    fields = Fields(header.metadata, header.source)
    _refuse_variants(fields)
    hidden_size = fields.integer("llama.embedding_length", 1, Limit.WIDTH)
    num_heads = fields.integer("llama.attention.head_count", 1, Limit.HEADS)
    num_kv_heads = fields.integer("llama.attention.head_count_kv", 1, Limit.HEADS, num_heads)
    head_dim = _head_dim(fields, hidden_size, num_heads)
    embedding = header.shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise WeightsError(f"{header.source} holds no token_embd.weight of two dimensions")
    vocab_size = embedding[0]
    stated = fields.optional_integer("llama.vocab_size", 1, Limit.VOCAB)
    if stated not in (None, vocab_size):
        raise fields.error("llama.vocab_size", stated, f"{vocab_size}, the rows of token_embd")
    theta = fields.number("llama.rope.freq_base", 0.0, default=10000.0, exclude_low=True)
    return {
        "attention_bias": "blk.0.attn_q.bias" in header.shapes,
        "attention_dropout": 0.0,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("llama.feed_forward_length", 1, Limit.INTERMEDIATE),
        "max_position_embeddings": fields.integer("llama.context_length", 1, Limit.POSITIONS),
        "mlp_bias": "blk.0.ffn_up.bias" in header.shapes,
        "num_attention_heads": num_heads,
        "num_hidden_layers": fields.integer("llama.block_count", 1, Limit.LAYERS),
        "num_key_value_heads": num_kv_heads,
        "rms_norm_eps": _shortest(
            fields.number("llama.attention.layer_norm_rms_epsilon", 0.0, 1.0)
        ),
        "rope_scaling": _rope_scaling(header, fields, head_dim, theta),
        "rope_theta": _shortest(theta),
        "tie_word_embeddings": "output.weight" not in header.shapes,
        "vocab_size": vocab_size,
    }


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 instead of 9.99999974e-06."""
    return float(str(np.float32(value)))


def _head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    rotated = fields.optional_integer("llama.rope.dimension_count", 1, Limit.HEAD_DIM)
    key = fields.optional_integer("llama.attention.key_length", 1, Limit.HEAD_DIM)
    head_dim = key or rotated or hidden_size // num_heads
    if rotated not in (None, head_dim):
        raise fields.error(
            "llama.rope.dimension_count", rotated, f"{head_dim} (the whole head is rotated)"
        )
    value = fields.optional_integer("llama.attention.value_length", 1, Limit.HEAD_DIM)
    if value not in (None, head_dim):
        raise fields.error("llama.attention.value_length", value, f"{head_dim}, as keys have")
    if key is None and rotated is None and hidden_size % num_heads:
        raise fields.error(
            "llama.embedding_length", hidden_size, f"a multiple of {num_heads}, the heads"
        )
    return head_dim


def _refuse_variants(fields: Fields) -> None:
    """Refuse metadata of models that are named llama but compute something else."""
    for name in ("expert_count", "expert_used_count", "attention.sliding_window"):
        fields.refuse_unless(f"llama.{name}", (0,), "0")
    fields.refuse_unless("llama.attention.causal", (True,), "true")
    fields.refuse_unless("llama.use_parallel_residual", (False,), "false")
    for name in ("logit_scale", "residual_scale", "embedding_scale", "attention.scale"):
        fields.refuse_unless(f"llama.{name}", (), "no scale (the entry left out)")
    for name in ("head_count", "head_count_kv"):
        value = fields.values.get(f"llama.attention.{name}")
        if isinstance(value, list):
            raise fields.error(f"llama.attention.{name}", value, "one number for all layers")


def _rope_scaling(
    header: GgufHeader, fields: Fields, head_dim: int, theta: float
) -> dict[str, Any] | None:
    """The `rope_scaling` of config.json, from the metadata or from `rope_freqs.weight`."""
    kind = header.metadata.get("llama.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise fields.error("llama.rope.scaling.type", kind, "none, linear")
    # The older spelling is a factor on its own.
    old = fields.number("llama.rope.scale_linear", 0.0, default=1.0, exclude_low=True)
    factor = fields.number("llama.rope.scaling.factor", 0.0, default=old, exclude_low=True)
    linear = factor != 1.0 and (kind == "linear" or "llama.rope.scale_linear" in header.metadata)
    llama3 = _llama3_scaling(header, fields, head_dim, theta)
    if linear and llama3:
        raise UnsupportedModelError(
            f"{header.source}: {_ROPE_FREQS} and linear rope scaling (factor {factor:g}) together; "
            "supported: one of them"
        )
    return {"rope_type": "linear", "factor": _shortest(factor)} if linear else llama3


def _llama3_scaling(
    header: GgufHeader, fields: Fields, head_dim: int, theta: float
) -> dict[str, Any] | None:
    """Recognize Llama 3's rule in `rope_freqs.weight`; anything else there is refused."""
    if _ROPE_FREQS not in header.constants:
        return None
    divisors = header.constants[_ROPE_FREQS]
    if divisors.size == head_dim // 2:
        if np.all(divisors == 1.0):
            return None
        # The largest divisor is the factor. The other three parameters are the same in every
        # Llama 3.x, as the comparison proves for this file; only the length may be given.
        name = "llama.rope.scaling.original_context_length"
        original = fields.optional_integer(name, 1, Limit.POSITIONS) or 8192
        factor = _shortest(float(divisors.max()))
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        with np.errstate(all="ignore"):  # a damaged tensor may hold zeros or NaN
            expected = llama3_divisors(theta, head_dim, factor, 1.0, 4.0, original)
        if np.allclose(divisors, expected, rtol=1e-4, atol=0.0):
            return scaling
    raise UnsupportedModelError(
        f"{header.source}: {_ROPE_FREQS} is {describe(divisors.tolist())}; supported: "
        f"{head_dim // 2} divisors that follow Llama 3's rule (low factor 1, high factor 4), or "
        "all ones"
    )


def llama3_divisors(
    theta: float, head_dim: int, factor: float, low: float, high: float, original: int
) -> npt.NDArray[np.float64]:
    """(head_dim / 2,): by how much Llama 3's rule divides each rope frequency."""
    plain = default_rope(theta, head_dim).frequencies
    scaled = llama3_rope(theta, head_dim, factor, low, high, original).frequencies
    divisors: npt.NDArray[np.float64] = np.array(plain) / np.array(scaled)
    return divisors


GGUF = GgufFamily(
    architecture="llama",
    read_config=read_config,
    tensors=TensorNames(
        {
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
        },
        transforms={"q": "unpermute", "k": "unpermute"},
    ),
    constants=(_ROPE_FREQS,),
)
