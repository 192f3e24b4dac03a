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

from octavo.errors import UnsupportedModelError
from octavo.models.family import GgufFamily, GgufHeader, TensorNames, Transform
from octavo.models.fields import Fields, Limit, describe
from octavo.models.gguf_reading import (
    EXPERT_ENTRIES,
    GGUF_EXPERTS,
    GGUF_TENSORS,
    read_common,
    read_experts,
    read_rope_scaling,
    read_theta,
    shortest,
)
from octavo.models.rope import default_rope, llama3_rope

_ROPE_FREQS = "rope_freqs.weight"


def read_config(header: GgufHeader) -> dict[str, Any]:
    """The `config.json` of a GGUF file; UnsupportedModelError names what octavo cannot run."""
    entries, config = read_common(header, "llama")
    scaling = read_rope_scaling(entries)
    llama3 = _llama3_scaling(header, entries, config["head_dim"], read_theta(entries))
    if scaling and llama3:
        raise UnsupportedModelError(
            f"{header.source}: {_ROPE_FREQS} and {scaling['rope_type']} rope scaling (factor "
            f"{scaling['factor']:g}) together; supported: one of them"
        )
    return {
        **config,
        "attention_bias": "blk.0.attn_q.bias" in header.shapes,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "mlp_bias": "blk.0.ffn_up.bias" in header.shapes,
        "rope_scaling": scaling or llama3,
    }


def _llama3_scaling(
    header: GgufHeader, entries: Fields, head_dim: int, theta: float
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
        name = "rope.scaling.original_context_length"
        original = entries.optional_integer(name, 1, Limit.POSITIONS) or 8192
        factor = shortest(float(divisors.max()))
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


def read_mixtral(header: GgufHeader) -> dict[str, Any]:
    """The same of Mixtral, whose files say that they are Llama's."""
    entries, config = read_common(header, "llama", reads=EXPERT_ENTRIES)
    count, used = read_experts(entries)
    return {
        **config,
        "hidden_act": "silu",
        "num_experts_per_tok": used,
        "num_local_experts": count,
        "rope_scaling": read_rope_scaling(entries),
        "sliding_window": None,
    }


_PERMUTED: dict[str, Transform] = {"q": "unpermute", "k": "unpermute"}
MIXTRAL = GgufFamily(
    architecture="llama",
    read_config=read_mixtral,
    tensors=TensorNames({**GGUF_TENSORS, **GGUF_EXPERTS}, _PERMUTED),
    has_experts=True,
)
GGUF = GgufFamily(
    architecture="llama",
    read_config=read_config,
    tensors=TensorNames(GGUF_TENSORS, _PERMUTED),
    constants=(_ROPE_FREQS,),
)
