"""A GGUF file of the Llama architecture as a Hugging Face checkpoint: configuration and weights.

llama.cpp's converter changes three things on the way from Hugging Face to GGUF, undone here:

- Names: `blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`.
- The rows of q and k (weights and biases). Hugging Face rotates element i of a head together with
  element i + d/2; the rotation llama.cpp uses for Llama takes neighbours, 2i and 2i + 1. So the
  converter moves row h * d/2 + i of each head (h: which half) to row 2 * i + h.
- Llama 3's rope scaling becomes a tensor `rope_freqs.weight` that divides the frequencies.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from octavo.errors import UnsupportedModelError, WeightsError
from octavo.models.fields import Fields, describe
from octavo.models.llama import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_INTERMEDIATE,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    MAX_WIDTH,
)
from octavo.weights.gguf_parts import GgufParts
from octavo.weights.source import TensorInfo
from octavo.weights.tensor import ITEM_SIZE, Tensor, TensorDType, float32_to_bf16

ROPE_FREQS = "rope_freqs.weight"
OutputDType = Literal["auto", "f32", "bf16"]
_KEPT: Mapping[str, TensorDType] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hugging_face_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor; None where there is no such tensor in a Llama."""
    match = re.fullmatch(r"(?:blk\.(0|[1-9]\d{0,4})\.)?([a-z_]+)\.(weight|bias)", name)
    if match is None:
        return None
    layer, part, kind = match.groups()
    if layer is None:
        return f"{_TOP_NAMES[part]}.{kind}" if part in _TOP_NAMES else None
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}" if part in _LAYER_NAMES else None


def unpermute_rows(values: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """Undo the permutation of q or k: (num_heads * d, ...) in llama.cpp's order to HF's.

    num_heads: the number of heads in this tensor, so the KV heads for k.
    """
    half = values.shape[0] // num_heads // 2
    pairs = values.reshape(num_heads, half, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


class GgufLlamaSource:
    """A `TensorSource` under Hugging Face's names, rows in Hugging Face's order.

    dtype: "f32" or "bf16" for every weight. "auto" keeps F32, F16 and BF16 as they are and rounds
    decoded block formats to bf16 (to nearest, so each weight by at most one part in 512; "f32"
    keeps the decoded values exactly). `rope_freqs.weight` is left out (see `rope_scaling`).
    """

    def __init__(self, file: GgufParts, config: Mapping[str, Any], dtype: OutputDType) -> None:
        """Raises WeightsError listing all tensors that have no place in a Llama model."""
        self._file = file
        self._heads = {
            "q_proj": config["num_attention_heads"],
            "k_proj": config["num_key_value_heads"],
        }
        self._names: dict[str, str] = {}
        problems = []
        infos: dict[str, TensorInfo] = {}
        for name, tensor in file.tensors.items():
            theirs = hugging_face_name(name)
            if theirs is not None:
                self._names[theirs] = name
                kind = _KEPT.get(tensor.kind, "bf16") if dtype == "auto" else dtype
                size = ITEM_SIZE[kind] * math.prod(tensor.shape)
                infos[theirs] = TensorInfo(kind, tensor.shape, size)
            elif name != ROPE_FREQS:
                problems.append(f"{describe(name)} (shape {tensor.shape})")
        if problems:
            raise WeightsError(f"{file.path} holds tensors that no Llama model has:", problems)
        self.infos: Mapping[str, TensorInfo] = infos

    def read(self, name: str) -> Tensor:
        """The whole tensor, decoded in runs of rows: memory holds it once, and one run."""
        parts = self.read_parts(name)
        first = next(parts)
        shape = self.infos[name].shape
        if first.shape == shape:
            return first
        whole = np.empty(shape, first.data.dtype)
        row = 0
        for part in chain((first,), parts):
            whole[row : row + part.shape[0]] = part.data
            row += part.shape[0]
        return Tensor(whole, first.dtype)

    def read_parts(self, name: str) -> Iterator[Tensor]:
        """The tensor in runs of rows, at least one, so that a big table needs little memory."""
        gguf_name = self._names[name]
        shape = self._file.tensors[gguf_name].shape
        num_rows = shape[0] if shape else 1
        num_heads = self._heads.get(name.split(".")[-2])
        as_it_is = _KEPT.get(self._file.tensors[gguf_name].kind) == self.infos[name].dtype
        in_runs = len(shape) >= 2 and (num_heads is not None or not as_it_is)
        step = self._file.rows_at_once(gguf_name) if in_runs else num_rows
        if num_heads is not None:
            head_dim = num_rows // num_heads
            if head_dim == 0 or head_dim % 2 or num_rows % num_heads:
                raise WeightsError(
                    f"{self._file.path}: {gguf_name} has {num_rows} rows, which are not "
                    f"{num_heads} heads of an even size"
                )
            step = max(1, step // head_dim) * head_dim  # whole heads
        for first in range(0, max(1, num_rows), max(1, step)):
            part = self._file.decode(gguf_name, first, step)
            if num_heads is not None:
                heads = part.data.shape[0] // (num_rows // num_heads)
                part = Tensor(unpermute_rows(part.data, heads), part.dtype)
            yield _cast(part, self.infos[name].dtype)


def _cast(tensor: Tensor, dtype: str) -> Tensor:
    """The values as "f32", "bf16", or as they are."""
    if tensor.dtype == dtype:
        return tensor
    values = tensor.to_float32()
    return Tensor(values, "f32") if dtype == "f32" else Tensor(float32_to_bf16(values), "bf16")


def read_config(file: GgufParts) -> dict[str, Any]:
    """The `config.json` of a GGUF file; UnsupportedModelError names what octavo cannot run."""
    source = str(file.path)
    fields = Fields(file.metadata, source)
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise fields.error("general.architecture", architecture, "'llama'")
    _refuse_variants(fields)
    hidden_size = fields.integer("llama.embedding_length", 1, MAX_WIDTH)
    num_heads = fields.integer("llama.attention.head_count", 1, MAX_HEADS)
    num_kv_heads = fields.integer("llama.attention.head_count_kv", 1, MAX_HEADS, num_heads)
    head_dim = _head_dim(fields, hidden_size, num_heads)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise WeightsError(f"{source} holds no token_embd.weight of two dimensions")
    vocab_size = embedding.shape[0]
    stated = fields.optional_integer("llama.vocab_size", 1, MAX_VOCAB)
    if stated not in (None, vocab_size):
        raise fields.error("llama.vocab_size", stated, f"{vocab_size}, the rows of token_embd")
    theta = fields.number("llama.rope.freq_base", 0.0, default=10000.0, exclude_low=True)
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "attention_dropout": 0.0,
        "bos_token_id": _token_id(fields, "bos", vocab_size),
        "eos_token_id": _token_id(fields, "eos", vocab_size),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("llama.feed_forward_length", 1, MAX_INTERMEDIATE),
        "max_position_embeddings": fields.integer("llama.context_length", 1, MAX_POSITIONS),
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "model_type": "llama",
        "num_attention_heads": num_heads,
        "num_hidden_layers": fields.integer("llama.block_count", 1, MAX_LAYERS),
        "num_key_value_heads": num_kv_heads,
        "pad_token_id": _token_id(fields, "padding", vocab_size),
        "rms_norm_eps": _shortest(
            fields.number("llama.attention.layer_norm_rms_epsilon", 0.0, 1.0)
        ),
        "rope_scaling": _rope_scaling(file, fields, head_dim, theta),
        "rope_theta": _shortest(theta),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": vocab_size,
    }


def end_of_text_ids(file: GgufParts, vocab_size: int) -> list[int]:
    """The tokens that end a text, a turn or a message, each once."""
    fields = Fields(file.metadata, str(file.path))
    found = [_token_id(fields, kind, vocab_size) for kind in ("eos", "eot", "eom")]
    return list(dict.fromkeys(token for token in found if token is not None))


def _token_id(fields: Fields, kind: str, vocab_size: int) -> int | None:
    return fields.optional_integer(f"tokenizer.ggml.{kind}_token_id", 0, vocab_size - 1)


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 instead of 9.99999974e-06."""
    return float(str(np.float32(value)))


def _head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    rotated = fields.optional_integer("llama.rope.dimension_count", 1, MAX_HEAD_DIM)
    key = fields.optional_integer("llama.attention.key_length", 1, MAX_HEAD_DIM)
    head_dim = key or rotated or hidden_size // num_heads
    if rotated not in (None, head_dim):
        raise fields.error(
            "llama.rope.dimension_count", rotated, f"{head_dim} (the whole head is rotated)"
        )
    value = fields.optional_integer("llama.attention.value_length", 1, MAX_HEAD_DIM)
    if value not in (None, head_dim):
        raise fields.error("llama.attention.value_length", value, f"{head_dim}, as keys have")
    if key is None and rotated is None and hidden_size % num_heads:
        raise fields.error(
            "llama.embedding_length", hidden_size, f"a multiple of {num_heads}, the heads"
        )
    return head_dim


def _refuse_variants(fields: Fields) -> None:
    """Metadata of models that go by the name of llama but compute something else."""
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
    file: GgufParts, fields: Fields, head_dim: int, theta: float
) -> dict[str, Any] | None:
    """The `rope_scaling` of config.json, from the metadata or from `rope_freqs.weight`."""
    kind = file.metadata.get("llama.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise fields.error("llama.rope.scaling.type", kind, "none, linear")
    # The older spelling is a factor on its own.
    old = fields.number("llama.rope.scale_linear", 0.0, default=1.0, exclude_low=True)
    factor = fields.number("llama.rope.scaling.factor", 0.0, default=old, exclude_low=True)
    linear = factor != 1.0 and (kind == "linear" or "llama.rope.scale_linear" in file.metadata)
    llama3 = _llama3_scaling(file, fields, head_dim, theta)
    if linear and llama3:
        raise UnsupportedModelError(
            f"{file.path}: {ROPE_FREQS} and linear rope scaling (factor {factor:g}) together; "
            "supported: one of them"
        )
    return {"rope_type": "linear", "factor": _shortest(factor)} if linear else llama3


def _llama3_scaling(
    file: GgufParts, fields: Fields, head_dim: int, theta: float
) -> dict[str, Any] | None:
    """Recognize Llama 3's rule in `rope_freqs.weight`; anything else there is refused."""
    if ROPE_FREQS not in file.tensors:
        return None
    divisors = file.decode(ROPE_FREQS).to_float32().reshape(-1)
    if divisors.size == head_dim // 2:
        if np.all(divisors == 1.0):
            return None
        # The largest divisor is the factor. The other three are the same in every Llama 3.x,
        # which the comparison proves for this file, except that the length may be stated.
        name = "llama.rope.scaling.original_context_length"
        original = fields.optional_integer(name, 1, MAX_POSITIONS) or 8192
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
        f"{file.path}: {ROPE_FREQS} is {describe(divisors.tolist())}; supported: {head_dim // 2} "
        "divisors that follow Llama 3's rule (low factor 1, high factor 4), or all ones"
    )


def llama3_divisors(
    theta: float, head_dim: int, factor: float, low: float, high: float, original: int
) -> npt.NDArray[np.float64]:
    """(head_dim / 2,): by how much Llama 3's rule divides each rope frequency."""
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = original * frequencies / (2 * math.pi)  # within the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)
