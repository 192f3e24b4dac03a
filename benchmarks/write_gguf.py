"""A GGUF file in a model's shape, for llama.cpp to be timed on: weights as octavo has them.

    python benchmarks/write_gguf.py MODEL smollm2-f32.gguf --form f32 --vocabulary smollm

Without --vocabulary the tokens are made up, so that a shape without a tokenizer can be measured:
such a file takes token ids, and is of no other use. With it, the tokens are those of the model's
byte-level BPE, and its value names llama.cpp's rule for cutting text into words ("smollm",
"llama-bpe"): for llama-perplexity and llama-quantize. The tensors lie as llama.cpp has those of the
family (rows of q and k, stacked experts); the numbers are the model's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from common import ROOT, make_parser
from numpy.typing import NDArray

from octavo.config import read_environment
from octavo.errors import UnsupportedModelError
from octavo.models.family import WeightSource
from octavo.models.spec import ModelSpec
from octavo.weights.checkpoint import Checkpoint, open_checkpoint
from octavo.weights.gguf_folder import GgufFolder
from octavo.weights.hub import resolve_model
from octavo.weights.model_files import ModelFiles, read_folder, read_model

FORMATS = {
    "f32": gguf.GGMLQuantizationType.F32,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q4_k_m": gguf.GGMLQuantizationType.Q4_K,
}
# The matrices that llama.cpp's Q4_K_M has in 6 bits: these, and of some layers (`has_six_bits`).
ENDS, SIX_BITS_OF_LAYERS = ("token_embd.weight", "output.weight"), ("attn_v", "ffn_down")


def stored_tensors(
    checkpoint: Checkpoint, sources: Mapping[str, WeightSource]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Name and values of every tensor of a checkpoint's file: `weights/reader.py` backwards.

    sources: octavo's name -> where the weight lies, as `TensorNames.weight_map` has it.
    """
    parts: dict[str, list[str]] = {}
    for name, source in sources.items():
        parts.setdefault(source.tensor, []).append(name)
    for tensor, names in parts.items():
        names.sort(key=lambda name: sources[name].rows or (0, 0))
        first = sources[names[0]]
        values = checkpoint[names[0]].to_float32()
        if len(names) > 1:
            values = np.concatenate([checkpoint[name].to_float32() for name in names])
        if first.transform == "plus_one":
            values = values - np.float32(1)
        elif first.transform == "transpose":
            values = np.ascontiguousarray(values.T)
        elif first.transform == "unpermute":
            values = permute(values, first.head_dim)
        yield tensor, values


def permute(weight: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Rows of q or k from "rotate half" to llama.cpp's order of neighbouring pairs."""
    heads = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(weight.shape)


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
    writer.add_add_space_prefix(False)


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


def _add_shape(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    layer, windows = spec.layers[0], {each.window for each in spec.layers}
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
    writer.add_layer_norm_rms_eps(layer.norm.eps)
    bases = {each.window: each.rope.theta for each in spec.layers if each.rope is not None}
    if bases:
        writer.add_rope_freq_base(bases[min(bases)])
    if max(windows):
        writer.add_sliding_window(max(windows))
        writer.add_rope_freq_base_swa(bases.get(max(windows), 0.0))
    if layer.moe is not None:
        writer.add_expert_count(layer.moe.num_experts)
        writer.add_expert_used_count(layer.moe.experts_per_token)
        writer.add_expert_feed_forward_length(layer.intermediate_size)


def write_gguf(
    path: Path, files: ModelFiles, checkpoint: Checkpoint, kind: str, vocabulary: str | None = None
) -> None:
    """Write the model with its matrices in one of FORMATS; head and embedding too, at q4_0 as q8_0.

    q4_k_m has blocks of 6 bits for some matrices (`has_six_bits`), and of 4 bits for the rest.

    vocabulary: llama.cpp's name for how the model's own tokenizer splits text; None makes tokens
    up. llama3's scaling of rope is left out: it changes no speed. Raises UnsupportedModelError for
    a model that the file does not describe, or a tokenizer that is no BPE.
    """
    spec, family = files.spec, files.family.gguf
    if family is None:
        raise UnsupportedModelError(
            f"{files.path} is {spec.architecture}; expected a family whose GGUF files octavo reads"
        )
    writer = gguf.GGUFWriter(path, family.architecture)
    _add_shape(writer, spec)
    if vocabulary is None:
        _add_vocabulary(writer, spec.vocab_size)
    else:
        _add_bpe(writer, files.path, spec.vocab_size, vocabulary)
    for name, values in stored_tensors(checkpoint, family.tensors.weight_map(spec)):
        form = FORMATS["q8_0" if kind == "q4_0" and name in ENDS else kind]
        if kind == "q4_k_m" and has_six_bits(name, len(spec.layers)):
            form = gguf.GGMLQuantizationType.Q6_K
        if values.ndim == 1 or "ffn_gate_inp" in name:  # llama.cpp keeps routers so, too
            form = FORMATS["f32"]
        elif values.shape[1] % gguf.GGML_QUANT_SIZES[form][0]:
            form = FORMATS["bf16"]
        if "_exps" in name and spec.layers[0].moe is not None:
            values = values.reshape(spec.layers[0].moe.num_experts, -1, values.shape[1])
        data = values if form == FORMATS["f32"] else _encode(values, form)
        writer.add_tensor(name, data, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if _comparable(read_folder(GgufFolder(path)).spec) != _comparable(spec):
        raise UnsupportedModelError(
            f"{files.path} has what this script does not write as GGUF; expected a model whose "
            "layers follow from sizes, windows and experts"
        )


def has_six_bits(name: str, num_layers: int) -> bool:
    """Whether Q4_K_M has a matrix in 6 bits; in layers `use_more_bits` of llama.cpp's choice.

    That is the first and the last eighth of them, and every third in between (llama-quant.cpp).
    """
    if not name.startswith("blk."):
        return name in ENDS
    _, layer, matrix, _ = name.split(".")
    eighth, index = num_layers // 8, int(layer)
    is_chosen = index < eighth or index >= 7 * num_layers // 8 or (index - eighth) % 3 == 2
    return matrix in SIX_BITS_OF_LAYERS and is_chosen


def _encode(values: NDArray[np.float32], form: gguf.GGMLQuantizationType) -> NDArray[np.generic]:
    if not form.name.endswith("_K"):
        return gguf.quants.quantize(values, form)
    sys.path.append(str(ROOT / "tests" / "helpers"))
    from gguf_blocks_helpers import encode_blocks  # the package has no encoder for these

    rows = values.reshape(-1, values.shape[-1])
    pieces = np.array_split(rows, -(-rows.size // 2**22))
    blocks = np.concatenate([encode_blocks(piece, form.name, seed=0) for piece in pieces])
    return blocks.reshape(*values.shape[:-1], -1)


def _comparable(spec: ModelSpec) -> ModelSpec:
    """Without the name, which a GGUF file lacks, and without rope's scaling."""
    layers = [
        replace(layer, rope=layer.rope and replace(layer.rope, frequencies=(), kind="", factor=1.0))
        for layer in spec.layers
    ]
    return replace(spec, architecture="", layers=tuple(layers))


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
