"""The tokenizer and the chat templates against transformers on the same directories."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from text_helpers import (
    CHATML_TEMPLATE,
    HARD_STRINGS,
    LLAMA3_TEMPLATE,
    STYLES,
    byte_level_directory,
    sentencepiece_directory,
    write_config,
)
from text_strings import varied_strings
from tokenizers import AddedToken
from tokenizers import Tokenizer as TokenizersTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf.hf_tokenizers import check_special_tokens, check_texts
from octavo.config import read_environment
from octavo.text.chat import ChatTemplate
from octavo.text.tokenizer import Tokenizer

pytestmark = pytest.mark.hf


@pytest.fixture(scope="module")
def smollm2() -> Path:
    from octavo.weights.hub import resolve_model

    return resolve_model("smollm2-135m", read_environment())


def compare(path: Path, strings: list[str]) -> Tokenizer:
    """octavo's tokenizer of a directory, which was compared with the one of transformers."""
    ours, theirs = Tokenizer(path), AutoTokenizer.from_pretrained(path)
    check_special_tokens(ours, theirs)
    check_texts(ours, theirs, strings)
    return ours


def test_smollm2_on_1000_strings(smollm2):
    strings = varied_strings(1_000)
    assert len(set(strings)) == 1_000
    ours = compare(smollm2, strings)
    # Byte-level: decoding is the inverse of encoding, but for the few control characters that
    # SmolLM2's vocabulary has no token for (transformers drops them all the same).
    unknown = {chr(byte) for byte in range(0x80) if not ours.encode(chr(byte))}
    assert unknown and all(not character.isprintable() for character in unknown)
    for text in strings:
        kept = "".join(character for character in text if character not in unknown)
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == kept


def test_smollm2_splits_digits_one_by_one(smollm2):
    ours = Tokenizer(smollm2)
    ids = ours.encode("1234567")
    assert [ours.decode([i]) for i in ids] == list("1234567")


def test_smollm2_random_ids_decode_alike(smollm2):
    ours, theirs = Tokenizer(smollm2), AutoTokenizer.from_pretrained(smollm2)
    generator = random.Random(7)
    for _ in range(200):
        ids = [generator.randrange(ours.vocab_size) for _ in range(generator.randrange(50))]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("style", STYLES)
def test_other_styles(tmp_path, style):
    # The class that reads tokenizer.json as it is; LlamaTokenizer would rebuild parts of it.
    path = STYLES[style](tmp_path, tokenizer_class="PreTrainedTokenizerFast")
    strings = varied_strings(150)
    ours, theirs = Tokenizer(path), PreTrainedTokenizerFast.from_pretrained(path)
    for text in strings:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), repr(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), repr(text)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_eos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": None},
    ],
)
@pytest.mark.parametrize("make", [byte_level_directory, sentencepiece_directory])
def test_bos_and_eos_options(tmp_path, make, options):
    path = make(tmp_path, tokenizer_class="PreTrainedTokenizerFast", **options)
    theirs = AutoTokenizer.from_pretrained(path)
    for text in ("hi there", "", "<s> 12"):
        assert Tokenizer(path).encode(text) == theirs.encode(text)


def test_tokens_declared_in_the_config(tmp_path):
    path = byte_level_directory(
        tmp_path,
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token="<|done|>",
        pad_token="ship",  # an ordinary word that becomes special
        extra_special_tokens=["<|tool|>"],
        added_tokens_decoder={
            "421": {"content": "<plain>", "special": False, "rstrip": True},
            "422": {"content": "<other>", "special": True},
        },
    )
    compare(path, ["x<|done|>y ship <|tool|> z<plain>  q<other>", *HARD_STRINGS])


@pytest.mark.parametrize("place", ["tokenizer.json", "added_tokens_decoder", "both"])
@pytest.mark.parametrize("role", ["eos_token", "additional_special_tokens", None])
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("flag", ["lstrip", "rstrip", None])
def test_flags_of_added_tokens(tmp_path, place, role, special, flag):
    path = byte_level_directory(tmp_path)
    raw = TokenizersTokenizer.from_file(str(path / "tokenizer.json"))
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    flags = {**plain, **({flag: True} if flag else {}), "special": special}
    others = {**plain, "lstrip": True, "special": False} if place == "both" else flags
    number = raw.get_vocab_size()
    if place != "added_tokens_decoder":
        raw.add_tokens([AddedToken("<|a|>", **others)])
        raw.save(str(path / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>"}
    fields |= {"eos_token": "<|im_end|>"} | ({role: "<|a|>"} if role == "eos_token" else {})
    fields |= {role: ["<|a|>"]} if role == "additional_special_tokens" else {}
    if place != "tokenizer.json":
        fields["added_tokens_decoder"] = {str(number): {"content": "<|a|>", **flags}}
    write_config(path, **fields)
    compare(path, ["x <|a|> y<|a|>\n ship <|a|>", "<|im_start|> \n<|a|>"])


CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "  Be <brief> & 'kind'.\n"},
        {"role": "user", "content": "人生 🎉\n\nsecond paragraph  "},
        {"role": "assistant", "content": "<|im_end|> not an end"},
        {"role": "user", "content": ""},
    ],
]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("template", [LLAMA3_TEMPLATE, CHATML_TEMPLATE, None])
def test_chat_templates_render_alike(tmp_path, smollm2, template, chat, prompt):
    path = smollm2
    if template is not None:
        path = byte_level_directory(tmp_path, chat_template=template)
    ours = ChatTemplate.load(path)
    theirs = AutoTokenizer.from_pretrained(path)
    text = ours.render(chat, add_generation_prompt=prompt)
    assert text == theirs.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
    ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
    assert Tokenizer(path).encode(text, add_special_tokens=False) == ids


def test_tools_render_alike(tmp_path):
    path = byte_level_directory(tmp_path, chat_template=LLAMA3_TEMPLATE)
    tools = [{"type": "function", "function": {"name": "größe", "parameters": {"b": 1, "a": 2}}}]
    ours = ChatTemplate.load(path).render(CHATS[0], tools=tools)
    theirs = AutoTokenizer.from_pretrained(path)
    assert ours == theirs.apply_chat_template(
        CHATS[0], tools=tools, add_generation_prompt=True, tokenize=False
    )


def test_template_files_win_over_the_config(tmp_path):
    path = byte_level_directory(tmp_path, chat_template="from the config")
    (path / "chat_template.jinja").write_text("from the file {{ bos_token }}", encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(path)
    text = ChatTemplate.load(path).render(CHATS[0])
    assert text == theirs.apply_chat_template(CHATS[0], tokenize=False)
    (path / "chat_template.jinja").unlink()
    write_config(
        path,
        bos_token="<|im_start|>",
        chat_template=[
            {"name": "default", "template": "named"},
            {"name": "tool_use", "template": "other"},
        ],
    )
    theirs = AutoTokenizer.from_pretrained(path)
    for tools, expected in ((None, "named"), ([], "other"), ([{"name": "f"}], "other")):
        text = ChatTemplate.load(path).render(CHATS[0], tools=tools)
        assert text == theirs.apply_chat_template(CHATS[0], tools=tools, tokenize=False) == expected
