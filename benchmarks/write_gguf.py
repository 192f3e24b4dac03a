"""A GGUF file in a model's shape, for llama.cpp to be timed on: weights as octavo has them.

    python benchmarks/write_gguf.py MODEL smollm2-f32.gguf --form f32 --vocabulary smollm

Without --vocabulary the tokens are made up, so that a shape without a tokenizer can be measured:
such a file takes token ids, and is of no other use. With it, the tokens are those of the model's
byte-level BPE, and its value names llama.cpp's rule for cutting text into words ("smollm",
"llama-bpe"): for llama-perplexity and llama-quantize. Rows of q and k are in llama.cpp's order; the
numbers are the model's.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from common import make_parser
from numpy.typing import NDArray

from octavo.config import read_environment
from octavo.errors import UnsupportedModelError
from octavo.models.llama_gguf import GGUF
from octavo.models.spec import ModelSpec
from octavo.weights.checkpoint import Checkpoint, open_checkpoint
from octavo.weights.hub import resolve_model
from octavo.weights.model_files import ModelFiles, read_model

FORMATS = {
    "f32": gguf.GGMLQuantizationType.F32,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}


def permute(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows of q or k from "rotate half" to llama.cpp's order of neighbouring pairs."""
    heads = weight.reshape(num_heads, 2, -1, weight.shape[-1])
    return np.ascontiguousarray(heads.swapaxes(1, 2).reshape(weight.shape))


def _add_vocabulary(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    """Tokens in the style of SentencePiece: three special ones, all bytes, then numbered ones."""
    special = ["<unk>", "<s>", "</s>"]
    tokens = (special + [f"<0x{byte:02X}>" for byte in range(256)])[:vocab_size]
    tokens += [f"t{number}" for number in range(len(tokens), vocab_size)]
    types = [gguf.TokenType.NORMAL] * vocab_size
    types[0] = gguf.TokenType.UNKNOWN
    types[1:3] = [gguf.TokenType.CONTROL] * 2
    types[3:259] = [gguf.TokenType.BYTE] * len(types[3:259])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * vocab_size)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def _add_bpe(writer: gguf.GGUFWriter, folder: Path, vocab_size: int, rule: str) -> None:
    """The tokens of a byte-level BPE in tokenizer.json; those it lacks get names of their own."""
    read = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = read["model"]
    if model["type"] != "BPE":
        raise UnsupportedModelError(
            f"{folder}'s tokenizer is {model['type']}; expected BPE to write as GGUF"
        )
    tokens = [f"[unused {number}]" for number in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for added in read["added_tokens"]:
        special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], special
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(int(config.get("bos_token_id") or 0))
    writer.add_eos_token_id(int(config.get("eos_token_id") or 0))
    writer.add_add_bos_token(False)


def _add_shape(writer: gguf.GGUFWriter, spec: ModelSpec, rope_theta: float) -> None:
    layer = spec.layers[0]
    writer.add_vocab_size(spec.vocab_size)
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(len(spec.layers))
    writer.add_feed_forward_length(layer.intermediate_size)
    writer.add_head_count(layer.num_heads)
    writer.add_head_count_kv(layer.num_kv_heads)
    writer.add_rope_dimension_count(layer.head_dim)
    writer.add_key_length(layer.head_dim)
    writer.add_value_length(layer.head_dim)
    writer.add_rope_freq_base(rope_theta)
    writer.add_layer_norm_rms_eps(layer.norm.eps)


def write_gguf(
    path: Path, files: ModelFiles, checkpoint: Checkpoint, kind: str, vocabulary: str | None = None
) -> None:
    """Write the model with its matrices in one of FORMATS; head and embedding too, at q4_0 as q8_0.

    vocabulary: llama.cpp's name for how the model's own tokenizer splits text; None makes tokens
    up. llama3's scaling of rope is left out: it changes no speed. Raises UnsupportedModelError for
    a layer with biases, or a tokenizer that is no BPE.
    """
    spec = files.spec
    layer = spec.layers[0]
    if layer.qkv_bias or layer.mlp_bias or layer.rope is None:
        raise UnsupportedModelError(
            f"{files.path} has biases or no rope; expected a plain Llama to write as GGUF"
        )
    writer = gguf.GGUFWriter(path, "llama")
    _add_shape(writer, spec, layer.rope.theta)
    if vocabulary is None:
        _add_vocabulary(writer, spec.vocab_size)
    else:
        _add_bpe(writer, files.path, spec.vocab_size, vocabulary)
    sources = GGUF.tensors.weight_map(spec)
    for name, tensor in checkpoint.items():
        values = tensor.to_float32()
        part = name.split(".")[-2]
        if part in ("q", "k"):
            values = permute(values, layer.num_heads if part == "q" else layer.num_kv_heads)
        wanted = "q8_0" if kind == "q4_0" and part in ("embed", "lm_head") else kind
        form = FORMATS[wanted] if values.ndim == 2 else FORMATS["f32"]
        if values.ndim == 2 and values.shape[1] % gguf.GGML_QUANT_SIZES[form][0]:
            form = FORMATS["bf16"]
        data = values if form == FORMATS["f32"] else gguf.quants.quantize(values, form)
        writer.add_tensor(sources[name].tensor, data, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Write one file."""
    parser = make_parser(__doc__)
    parser.add_argument("model", help="a name or folder, as octavo takes it")
    parser.add_argument("output", type=Path)
    parser.add_argument("--form", choices=tuple(FORMATS), default="bf16")
    parser.add_argument("--load-format", default="auto", choices=("auto", "dummy"))
    parser.add_argument("--vocabulary", help="the model's own, split by this rule of llama.cpp's")
    arguments = parser.parse_args()
    files = read_model(resolve_model(arguments.model, read_environment()))
    checkpoint = open_checkpoint(files, arguments.load_format)
    write_gguf(arguments.output, files, checkpoint, arguments.form, arguments.vocabulary)


if __name__ == "__main__":
    main()
