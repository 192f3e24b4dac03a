"""Tokenizers of GGUF files: text is split as llama.cpp splits it, or the file is refused."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders
from weights_helpers import (
    convert,
    gguf_config,
    sentencepiece_metadata,
    tiny_vocabulary,
    write_gguf,
)

from octavo.errors import OctavoError, TokenizerError
from octavo.folder import MemoryFolder
from octavo.text.chat import ChatTemplate
from octavo.text.tokenizer import Tokenizer as OwnTokenizer
from octavo.weights.gguf_pre_tokenizers import SPLITTINGS
from octavo.weights.model_files import read_model


def tokenizer_of(tmp_path: Path, **options: Any) -> Tokenizer:
    return Tokenizer.from_file(str(convert(tmp_path, **options) / "tokenizer.json"))


def test_smollm_splits_single_digits(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    # There is a merge "1 2", which must never apply; " the" is one token through two merges.
    assert tokenizer.encode("12 the").tokens == ["1", "2", "Ġthe"]
    assert tokenizer.encode("<|turn|>12").tokens == ["<|turn|>", "1", "2"]
    assert tokenizer.encode("x<|end|>").ids[-1] == 1
    text = "Zwölf 中文 🙂\n\tend"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


# What each way makes of one text: checked by hand against the expressions in llama.cpp, and those
# of gpt-2, smollm, llama-bpe, qwen2 and deepseek-coder with its test vectors (docs/models.md).
TEXT = "I'LL a.b 12345 $x  \n\nÉtéNY/\n"
PIECES = {
    "gpt-2": "I|'|LL| a|.|b| 12345| $|x|  \n|\n|ÉtéNY|/|\n",
    "default": "I|'|LL| a|.|b| |123|45| |$|x|  \n|\n|ÉtéNY|/|\n",
    "smollm": "I|'|LL| a|.|b| |1|2|3|4|5| $|x|  \n|\n|ÉtéNY|/|\n",
    "llama-bpe": "I|'LL| a|.b| |123|45| $|x|  \n\n|ÉtéNY|/\n",
    "smaug-bpe": "I|'LL| a|.b| |123|45| $|x|  \n\n|ÉtéNY|/\n",
    "qwen2": "I|'LL| a|.b| |1|2|3|4|5| $|x|  \n\n|ÉtéNY|/\n",
    "seed-coder": "I|'LL| a|.b| |1|2|3|4|5| $|x|  \n\n|ÉtéNY|/|\n",
    "minicpm5": "I|'LL| a|.b| |123|45| $|x|  \n\n|ÉtéNY|/\n",
    "tekken": "I|'LL| a|.b| |1|2|3|4|5| $|x|  \n\n|Été|NY|/\n",
    "gpt-4o": "I'LL| a|.b| |123|45| $|x|  \n\n|Été|NY|/\n",
    "qwen35": "I|'LL| a|.b| |1|2|3|4|5| $|x|  \n\n|ÉtéNY|/\n",
    "deepseek-coder": "I|'|LL| a|.|b| |1|2|3|4|5| $|x|  |\n|\n|ÉtéNY|/|\n",
}


@pytest.mark.parametrize("pre", PIECES)
def test_ways_of_splitting(pre: str) -> None:
    pieces = SPLITTINGS[pre].pre_tokenizer().pre_tokenize_str(TEXT)
    decoder = decoders.ByteLevel()
    assert "|".join(decoder.decode([piece]) for piece, _ in pieces) == PIECES[pre]


def test_marks_belong_to_words_in_qwen35_only() -> None:
    text = "cafe\u0301s"
    for pre, pieces in (("qwen35", [text]), ("qwen2", ["cafe", "\u0301s"])):
        found = SPLITTINGS[pre].pre_tokenizer().pre_tokenize_str(text)
        assert [decoders.ByteLevel().decode([piece]) for piece, _ in found] == pieces


def test_every_way_of_splitting_is_one_that_is_tested() -> None:
    assert set(SPLITTINGS.values()) == {SPLITTINGS[pre] for pre in PIECES}


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("gpt-2", ["12", "Ġ", "3"]),
        # Llama 3: a begin token unless the file says otherwise, and words that are tokens whole.
        ("llama-bpe", ["<|start|>", "12", "Ġ", "3"]),
        ("falcon3", ["<|start|>", "12", "Ġ", "3"]),
        ("smaug-bpe", ["12", "Ġ", "3"]),
        ("starcoder", ["1", "2", "Ġ", "3"]),
        ("default", ["12", "Ġ", "3"]),
    ],
)
def test_tokens_by_way_of_splitting(pre: str, tokens: list[str], tmp_path: Path) -> None:
    assert tokenizer_of(tmp_path, pre=pre).encode("12 3").tokens == tokens


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("smaug-bpe", False)])
def test_words_that_no_merge_leads_to(pre: str, whole: bool, tmp_path: Path) -> None:
    tokens, kinds, merges = tiny_vocabulary()
    metadata = {
        "tokenizer.ggml.tokens": [*tokens, "xyz"],
        "tokenizer.ggml.token_type": [*kinds, 1],
        "tokenizer.ggml.merges": merges,
        "llama.vocab_size": len(tokens) + 1,
    }
    config = gguf_config(vocab_size=len(tokens) + 1)
    tokenizer = tokenizer_of(tmp_path, pre=pre, config=config, metadata=metadata)
    found = tokenizer.encode("xyz", add_special_tokens=False).tokens
    assert found == (["xyz"] if whole else ["x", "y", "z"])


@pytest.mark.parametrize("pre", [None, ""])
def test_a_missing_way_of_splitting_is_llama_cpps_default(pre: str | None, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.pre is missing"):
        tokenizer = tokenizer_of(tmp_path, metadata={"tokenizer.ggml.pre": pre})
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a+b 1234")]
    assert pieces == ["a", "+", "b", "Ġ", "123", "4"]
    # Signs that are no punctuation to Unicode, one that is left out, and other scripts' digits.
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("<|x ` \u0661\u0662")]
    assert pieces == ["<|", "x", "Ġ`", "Ġ", "Ù¡Ù¢"]


@pytest.mark.parametrize(
    ("bos", "eos", "single", "pair"),
    [
        (True, True, [0, 3, 1], [0, 3, 1, 0, 4, 1]),
        (True, False, [0, 3], [0, 3, 0, 4]),
        (False, True, [3, 1], [3, 1, 4, 1]),
        (False, False, [3], [3, 4]),
    ],
)
def test_begin_and_end_tokens(
    bos: bool, eos: bool, single: list[int], pair: list[int], tmp_path: Path
) -> None:
    flags = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    tokenizer = tokenizer_of(tmp_path, metadata=flags)
    first, second = tokenizer.decode([3]), tokenizer.decode([4])
    assert tokenizer.encode(first).ids == single
    assert tokenizer.encode(first, second).ids == pair
    assert tokenizer.encode(first, add_special_tokens=False).ids == [3]


def test_the_tokenizer_configuration(tmp_path: Path) -> None:
    config = json.loads((convert(tmp_path) / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "<|start|>"
    assert config["eos_token"] == "<|end|>"
    assert "pad_token" not in config
    assert config["chat_template"].startswith("{% for m in messages %}")
    assert config["model_max_length"] == 128
    assert set(config["added_tokens_decoder"]) == {"0", "1", "2"}


def with_tokens(tokens: list[str], kind: int, **metadata: Any) -> dict[str, Any]:
    """The options of `write_gguf` for the tiny vocabulary with these tokens behind it."""
    own, kinds, _ = tiny_vocabulary()
    entries = {
        "tokenizer.ggml.tokens": [*own, *tokens],
        "tokenizer.ggml.token_type": [*kinds, *([kind] * len(tokens))],
        "tokenizer.ggml.eot_token_id": None,
        "llama.vocab_size": len(own) + len(tokens),
        **metadata,
    }
    return {"config": gguf_config(vocab_size=len(own) + len(tokens)), "metadata": entries}


@pytest.mark.parametrize("kind", [1, 3, 4])
def test_an_answer_ends_with_tokens_that_the_file_does_not_name(kind: int, tmp_path: Path) -> None:
    """They are known by their texts, and are control tokens whatever their type in the file."""
    path = tmp_path / "model.gguf"
    write_gguf(path, **with_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "x</s>"], kind))
    files = read_model(path)
    tokens = OwnTokenizer(files.folder)
    ends = {tokens.token_id(text) for text in ("<|im_end|>", "<|endoftext|>")}
    assert {*files.eos_token_ids} == {1, *ends} and files.eos_token_ids[0] == 1
    assert tokens.encode("x<|im_end|>")[1:] == [tokens.token_id("<|im_end|>")]
    assert ends <= tokens.special_ids
    assert (tokens.token_id("<|im_start|>") in tokens.special_ids) == (kind == 3)
    pulled = read_model(convert(tmp_path, **with_tokens(["<|im_end|>"], kind)))
    assert pulled.eos_token_ids == (1, 263)
    assert OwnTokenizer(pulled.folder).encode("x<|im_end|>")[1:] == [263]


def test_an_answer_of_gpt_oss_goes_on_behind_a_message(tmp_path: Path) -> None:
    path, eos = tmp_path / "model.gguf", {"tokenizer.ggml.eos_token_id": 263}
    for tokens, ends in (
        (["<|return|>"], {263, 1}),  # 1 is <|end|>
        (["<|return|>", "<|call|>"], {263, 264}),
    ):
        write_gguf(path, **with_tokens(tokens, 3, **eos))
        assert {*read_model(path).eos_token_ids} == ends


@pytest.mark.parametrize(
    ("name", "swallows"),
    [("Phi3", True), ("Phi 3.5 mini", True), ("Phi-3-medium", True), ("Phi 4", False)],
)
def test_phi3s_tokens_swallow_the_blanks_behind_them(
    name: str, swallows: bool, tmp_path: Path
) -> None:
    metadata = sentencepiece_metadata() | {"general.name": name}
    metadata["tokenizer.ggml.tokens"] += ["<|endoftext|>", "<|user|>", "<|end|>"]
    metadata["tokenizer.ggml.token_type"] += [3, 3, 4]
    metadata["tokenizer.ggml.scores"] += [-1000.0] * 3
    config = gguf_config(vocab_size=len(metadata["tokenizer.ggml.tokens"]))
    pulled = convert(tmp_path, config=config, metadata=metadata)
    for folder in (read_model(tmp_path / "model.gguf").folder, pulled):
        tokens = OwnTokenizer(folder)

        def count(token: str, tokens: OwnTokenizer = tokens) -> int:
            return len(tokens.encode(f"{token} \n", add_special_tokens=False))

        for token in ("<|user|>", "<|end|>", "</s>"):
            assert (count(token) == 1) == swallows, token
        for token in ("<|endoftext|>", "<s>", "<unk>"):
            assert count(token) > 1


def test_templates_with_names(tmp_path: Path) -> None:
    entries = {"tokenizer.chat_template.tool_use": "t", "tokenizer.chat_templates": ["tool_use"]}
    template = ChatTemplate.load(convert(tmp_path, metadata=entries))
    assert template is not None
    messages = [{"role": "user", "content": "x"}]
    assert template.render(messages) == "x" and template.render(messages, tools=[1]) == "t"
    # Without a default there is none, as for a base model.
    entries["tokenizer.chat_template"] = ""
    assert ChatTemplate.load(convert(tmp_path, metadata=entries)) is None


@pytest.mark.parametrize(
    ("metadata", "cause"),
    [
        ({"tokenizer.ggml.pre": "viking"}, r"pre is 'viking'; supported: default, gpt-2"),
        ({"tokenizer.ggml.pre": 7}, "pre is 7"),
        ({"tokenizer.ggml.model": "t5"}, r"model is 't5'; supported: gpt2"),
        ({"tokenizer.ggml.model": "llama"}, "token_type"),
        ({"tokenizer.ggml.tokens": None}, "tokens is None"),
        ({"tokenizer.ggml.tokens": ["a"] * 263}, "twice"),
        ({"tokenizer.ggml.merges": ["ab"]}, "'ab'; expected two parts"),
        ({"tokenizer.ggml.merges": ["no pair"]}, "merges do not fit"),
        ({"tokenizer.ggml.token_type": [1, 2, 3]}, "token_type"),
        ({"tokenizer.ggml.add_bos_token": "yes"}, "add_bos_token"),
        (
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None},
            "bos_token_id is missing",
        ),
    ],
)
def test_tokenizers_that_are_refused(metadata: dict[str, Any], cause: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=cause):
        convert(tmp_path, metadata=metadata)


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    tokens, kinds, _ = tiny_vocabulary()
    metadata = {
        "tokenizer.ggml.tokens": [*tokens, "zzz"],
        "tokenizer.ggml.token_type": [*kinds, 1],
    }
    with pytest.raises(OctavoError, match="264"):
        convert(tmp_path, metadata=metadata)


def test_sentencepiece_bpe(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata()
    config = gguf_config(vocab_size=len(metadata["tokenizer.ggml.tokens"]))
    tokenizer = tokenizer_of(tmp_path, config=config, metadata=metadata)
    assert tokenizer.encode("the hello").tokens == ["<s>", "▁the", "▁", "he", "llo"]
    assert tokenizer.encode("Ä").tokens == ["<s>", "▁", "<0xC3>", "<0x84>"]
    for text in ("the hello", "in 中 out", "  two spaces", "a\nb"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    scores = metadata["tokenizer.ggml.scores"]
    same = [*scores[:259], scores[262], *scores[260:]]
    for wrong in (same, scores[:-1], [*scores[:-1], math.nan], "scores", None):
        cause = "the same score" if wrong is same else "expected one number for each token"
        with pytest.raises(TokenizerError, match=cause):
            convert(tmp_path, config=config, metadata={**metadata, "tokenizer.ggml.scores": wrong})


def test_a_vocabulary_as_gemma_has_it(tmp_path: Path) -> None:
    """No space before a text, runs of spaces as tokens of their own, and tokens that fill up.

    Runs of spaces and line breaks are matched before merges; what fills up the embedding has one
    score and is never used.
    """
    metadata = sentencepiece_metadata()
    runs = ["  ", "   ", "\n\n"]
    padding = ["he the", "thethe", "aa"]
    metadata["tokenizer.ggml.tokens"] += [*runs, *padding]
    metadata["tokenizer.ggml.token_type"] += [4] * len(runs) + [5] * len(padding)
    metadata["tokenizer.ggml.scores"] += [-1000.0] * (len(runs) + len(padding))
    metadata["tokenizer.ggml.add_space_prefix"] = False
    config = gguf_config(vocab_size=len(metadata["tokenizer.ggml.tokens"]))
    tokenizer = tokenizer_of(tmp_path, config=config, metadata=metadata)
    for text, tokens in (
        ("he the", ["<s>", "he", "▁the"]),
        ("  the", ["<s>", "  ", "t", "he"]),
        ("a     in", ["<s>", "a", "   ", "  ", "in"]),
        ("aa\n\n\nhe", ["<s>", "a", "a", "\n\n", "<0x0A>", "he"]),
    ):
        encoded = tokenizer.encode(text)
        assert encoded.tokens == tokens
        assert tokenizer.decode(encoded.ids) == text


def test_the_tokenizer_of_a_file_is_that_of_its_text(tmp_path: Path) -> None:
    """Used as it lies, tokenizer.json is neither written nor read."""
    for name, metadata in (("bpe", {}), ("sentencepiece", sentencepiece_metadata())):
        tokens = metadata.get("tokenizer.ggml.tokens")
        config = gguf_config(**({"vocab_size": len(tokens)} if tokens else {}))
        path = tmp_path / f"{name}.gguf"
        write_gguf(path, config, metadata=metadata)
        folder = read_model(path).folder
        assert isinstance(folder, MemoryFolder) and folder.make_tokenizer is not None
        ours = OwnTokenizer(folder)
        folder.make_tokenizer = None
        theirs = OwnTokenizer(folder)
        assert ours.special_ids == theirs.special_ids and ours.vocab_size == theirs.vocab_size
        for text in ("the hello", "12 <s>the", "  Ä in\n<|turn|>", "x"):
            ids = ours.encode(text)
            assert ids == theirs.encode(text)
            assert ours.decode(ids) == theirs.decode(ids)


def merge_from_the_left(text: str, scores: dict[str, float]) -> list[str]:
    """Sentencepiece by its definition: the best score first, of equal ones the leftmost."""
    pieces = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        pairs = [scores.get(a + b, -math.inf) for a, b in pairwise(pieces)]
        if not pairs or max(pairs) == -math.inf:
            return pieces
        place = pairs.index(max(pairs))
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


def test_runs_of_spaces_may_share_a_score(tmp_path: Path) -> None:
    """As in Llama 2's own vocabulary, where they come in no order of their lengths."""
    metadata = sentencepiece_metadata()
    runs = ["\u2581" * length for length in (2, 4, 8, 5, 3, 6, 7)]
    metadata["tokenizer.ggml.tokens"] += runs
    metadata["tokenizer.ggml.token_type"] += [1] * len(runs)
    metadata["tokenizer.ggml.scores"] += [-1e9] * len(runs)
    tokens = metadata["tokenizer.ggml.tokens"]
    config = gguf_config(vocab_size=len(tokens))
    tokenizer = tokenizer_of(tmp_path, config=config, metadata=metadata)
    scores = dict(zip(tokens[259:], metadata["tokenizer.ggml.scores"][259:], strict=True))
    for length in range(40):
        for text in (" " * length + "the", "a" + " " * length + "he" + " " * (length // 2)):
            encoded = tokenizer.encode(text, add_special_tokens=False)
            assert encoded.tokens == merge_from_the_left(text, scores), repr(text)
