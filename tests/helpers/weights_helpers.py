"""Small Llama checkpoints and GGUF files, made on the spot with chosen defects."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from gguf_blocks_helpers import encode_blocks

from octavo.models import llama
from octavo.models.family import TensorNames
from octavo.models.spec import ModelSpec
from octavo.weights.convert import convert_gguf
from octavo.weights.tensor import Tensor, float32_to_bf16

FORMATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
NUMPY_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8}


def tiny_config(**changes: Any) -> dict[str, Any]:
    """config.json of a model with odd sizes everywhere; None deletes a field."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 37,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    }
    config.update(changes)
    return {name: value for name, value in config.items() if value is not DELETED}


DELETED = object()


def hf_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face's name of every weight of a configuration -> its shape."""
    spec = llama.read_spec(config)
    return {each.tensor: each.shape for each in llama.FAMILY.tensors.weight_map(spec).values()}


def random_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights by Hugging Face's names: normal numbers, norms around 1."""
    generator = np.random.default_rng(seed)
    weights = {}
    for name, shape in hf_shapes(config).items():
        values = generator.standard_normal(shape).astype(np.float32)
        weights[name] = values * 0.1 + 1 if "norm" in name else values / math.sqrt(shape[-1])
    return weights


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 values in the bytes of a safetensors type."""
    if dtype == "BF16":
        return float32_to_bf16(values)
    return np.asarray(values).astype(NUMPY_TYPES[dtype])


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[str, np.ndarray]],
    *,
    pad: int = 0,
    metadata: Any = None,
) -> None:
    """name -> (type, encoded values). pad: spaces behind the header, to misalign the data."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    offset, content = 0, b""
    for name, (dtype, values) in tensors.items():
        raw = np.ascontiguousarray(values).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [offset, offset + len(raw)],
        }
        offset += len(raw)
        content += raw
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def write_model(
    directory: Path,
    config: Mapping[str, Any] | None = None,
    *,
    weights: Mapping[str, np.ndarray] | None = None,
    dtype: str = "F32",
    dtypes: Mapping[str, str] | None = None,
    num_shards: int = 1,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """A whole model directory without tokenizer; returns its float32 weights as stored."""
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny_config() if config is None else config
    weights = random_weights(config, seed) if weights is None else weights
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    encoded = {}
    for name, values in weights.items():
        kind = (dtypes or {}).get(name, dtype)
        encoded[name] = (kind, encode(values, kind))
    if num_shards == 1:
        write_safetensors(directory / "model.safetensors", encoded, metadata={"format": "pt"})
    else:
        places = {}
        names = list(encoded)
        for shard in range(num_shards):
            file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
            mine = names[shard::num_shards]  # neighbours lie in different files
            places.update(dict.fromkeys(mine, file))
            write_safetensors(directory / file, {name: encoded[name] for name in mine})
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return {
        name: Tensor(values, FORMATS[kind]).to_float32()
        for name, (kind, values) in encoded.items()
        if kind in FORMATS
    }


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face weight."""
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def permute_rows(values: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: row (half, i) of a head becomes row (i, half).

    Written as a loop over rows, so that it shares nothing with the code under test.
    """
    head_dim = values.shape[0] // num_heads
    permuted = np.empty_like(values)
    for head in range(num_heads):
        for half in range(2):
            for i in range(head_dim // 2):
                source = head * head_dim + half * (head_dim // 2) + i
                permuted[head * head_dim + 2 * i + half] = values[source]
    return permuted


# Bytes, a few merges, and two control tokens: the smallest tokenizer that can say anything.
def tiny_vocabulary() -> tuple[list[str], list[int], list[str]]:
    """(tokens, token types, merges) of a byte-level BPE with 2 control tokens."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["Ġ t", "h e", "Ġt he", "1 2"]
    tokens = ["<|start|>", "<|end|>", "<|turn|>", *alphabet]
    tokens += [merge.replace(" ", "") for merge in merges]
    return tokens, [3, 3, 3] + [1] * (len(tokens) - 3), merges


def sentencepiece_metadata() -> dict[str, Any]:
    """A vocabulary as Llama 2 has it: unknown, begin, end, 256 bytes, letters, merged pieces."""
    pieces = ["he", "▁t", "▁the", "ll", "llo", "▁a", "in"]
    letters = [*"▁abcdefghijklmnopqrstuvwxyz"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3] + [6] * 256
    scores = [0.0] * 259
    tokens += pieces + letters
    kinds += [1] * (len(pieces) + len(letters))
    scores += [-float(rank) for rank in range(len(pieces) + len(letters))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "llama.vocab_size": None,
    }


def gguf_config(**changes: Any) -> dict[str, Any]:
    """A configuration whose rows are whole 256-wide blocks, with the tiny vocabulary's size."""
    sizes = {
        **{"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 64, "vocab_size": len(tiny_vocabulary()[0])},
    }
    return tiny_config(**{**sizes, **changes})


def write_gguf(
    path: Path,
    config: Mapping[str, Any] | None = None,
    *,
    weights: Mapping[str, np.ndarray] | None = None,
    kind: str = "F32",
    kinds: Mapping[str, str] | None = None,
    pre: str = "smollm",
    metadata: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, np.ndarray] | None = None,
    architecture: str = "llama",
    seed: int = 0,
    tensors_per_part: int = 0,
) -> dict[str, np.ndarray]:
    """A GGUF of a Llama as llama.cpp's converter lays it out; returns HF's float32 weights.

    kind: the type of every matrix; vectors are F32, as the converter has them. kinds: other types
    of matrices, by Hugging Face's name of the part. metadata: entries to add or replace (str, bool,
    int, float, or lists); None leaves one out. tensors_per_part: split it so, into
    STEM-0000K-of-0000N.gguf; 0 writes one file.
    """
    import gguf

    config = gguf_config() if config is None else config
    weights = random_weights(config, seed) if weights is None else weights
    tokens, token_types, merges = tiny_vocabulary()
    entries: dict[str, Any] = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.vocab_size": config["vocab_size"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": token_types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        **(metadata or {}),
    }
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_per_part)
    for name, value in entries.items():
        add_entry(writer, name, value)
    for name, values in weights.items():
        if ".q_proj." in name:
            values = permute_rows(values, config["num_attention_heads"])
        elif ".k_proj." in name:
            values = permute_rows(values, config["num_key_value_heads"])
        own = (kinds or {}).get(name.split(".")[-2], kind)
        add_tensor(writer, gguf_name(name), values, own if values.ndim == 2 else "F32")
    for name, values in (extra_tensors or {}).items():
        add_tensor(writer, name, values, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict(weights)


def add_entry(writer: Any, name: str, value: Any) -> None:
    """One metadata entry in the type that its Python value suggests."""
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    elif value is not None:
        writer.add_array(name, value)


def add_tensor(writer: Any, name: str, values: np.ndarray, kind: str) -> None:
    """One tensor, quantized to `kind` (a name of gguf.GGMLQuantizationType)."""
    import gguf

    if kind == "F32":
        writer.add_tensor(name, values.astype(np.float32))
        return
    data = encode_blocks(values, kind, seed=len(name))
    writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])


def convert(tmp_path: Path, dtype: str = "auto", **options: Any) -> Path:
    """Write a GGUF with these options, convert it, and return the new directory."""
    path, directory = tmp_path / "model.gguf", tmp_path / "converted"
    write_gguf(path, **options)
    directory.mkdir(exist_ok=True)
    convert_gguf(path, directory, dtype)  # type: ignore[arg-type]
    return directory


@contextmanager
def memory_below(num_bytes: float) -> Iterator[None]:
    """At no moment of the block may Python's objects and NumPy's arrays take more."""
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < num_bytes


def check_fused_rows(names: TensorNames, spec: ModelSpec) -> None:
    """The weights in one tensor follow each other, without a gap, up to its end."""
    sources = names.weight_map(spec).values()
    for name in {source.tensor for source in sources}:
        pieces = sorted(
            (source.rows[0], source.rows[0] + source.shape[0], source.rows[1])
            for source in sources
            if name == source.tensor and source.rows
        )
        ends = [0, *(last for _, last, _ in pieces)]
        assert [first for first, _, _ in pieces] == ends[:-1], name
        assert {total for _, _, total in pieces} <= {ends[-1]}, name
