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
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from octavo.config import read_environment
from octavo.text.chat import ChatTemplate
from octavo.text.stream import StreamDecoder
from octavo.text.tokenizer import Tokenizer

pytestmark = pytest.mark.hf

CODE = [
    "def f(x: int) -> str:\n    return f'{x:>10}'  # Zahl\n",
    "#include <vector>\nint main() { return v[0]->x << 2; }",
    "SELECT * FROM t WHERE a >= 10.5 AND b != 'it''s';",
    '{"key": [1, 2.50, null, true], "πλ": "\\u00e9"}',
    "\tif [ -z \"$X\" ]; then\r\n\t\techo 'no'\r\n\tfi",
    "\\frac{\\partial^2 u}{\\partial x^2} = 0",
]
WORDS = [
    *("the", "The", "THE", "don't", "we'll", "naïve", "straße", "Ёлка", "привет", "こんにちは"),
    *("안녕하세요", "สวัสดี", "नमस्ते", "مرحبا", "人工智能", "计算机", "１２３", "42", "007", "3.14"),
    *("1,000,000", "x²", "½", "€", "https://a.b/c?d=e#f", "user@example.org", "🎉", "👩‍👩‍👧‍👦"),
    *("🏳️‍🌈", "e\u0301", "ﬁ", "\ufffd", "\u200b", "\u2581", "<|im_start|>", "<|im_end|>"),
    *("<|endoftext|>", "<repo_name>", "<|im_start", "<s>", "</s>", "<0x0A>", "[INST]", "\x00"),
    *("\x1b[31m", "\x7f"),
]
BLANKS = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "    ", "", "\u3000", "\u00a0", " \n "]


def varied_strings(count: int, seed: int = 20_240) -> list[str]:
    """Code, digits, scripts, emoji, control characters, runs of white space, special tokens."""
    generator = random.Random(seed)
    strings = [*HARD_STRINGS, *CODE]
    while len(strings) < count:
        kind = generator.randrange(4)
        if kind == 0:  # words with any blanks between
            parts = [
                generator.choice(WORDS) + generator.choice(BLANKS)
                for _ in range(generator.randrange(1, 30))
            ]
        elif kind == 1:  # any characters, weighted towards the planes that occur
            planes = [(0, 0x80), (0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0x1F300, 0x1FAFF)]
            ranges = [generator.choice(planes) for _ in range(generator.randrange(1, 40))]
            parts = [chr(generator.randrange(*bounds)) for bounds in ranges]
        elif kind == 2:  # numbers
            parts = [
                str(generator.randrange(10 ** generator.randrange(1, 15)))
                + generator.choice([".", ",", " ", "-", "e", "%\n"])
                for _ in range(generator.randrange(1, 12))
            ]
        else:  # pieces of code with the indentation shifted
            lines = generator.choice(CODE).splitlines(keepends=True)
            parts = [generator.choice(BLANKS) + line for line in lines]
        strings.append("".join(parts))
        if len(strings) == count:
            strings = list(dict.fromkeys(strings))
    return strings


@pytest.fixture(scope="module")
def smollm2() -> Path:
    from octavo.weights.hub import resolve_model

    return resolve_model("smollm2-135m", read_environment())


def compare(path: Path, strings: list[str]) -> None:
    ours = Tokenizer(path)
    theirs = AutoTokenizer.from_pretrained(path)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids == {i for i, t in theirs.added_tokens_decoder.items() if t.special}
    for text in strings:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), repr(text)
        for skip in (True, False):
            decoded = ours.decode(ids, skip_special_tokens=skip)
            assert decoded == theirs.decode(ids, skip_special_tokens=skip), repr(text)
            decoder = StreamDecoder(ours, skip)
            assert "".join(map(decoder.push, ids)) + decoder.flush() == decoded


def test_smollm2_on_1000_strings(smollm2):
    strings = varied_strings(1_000)
    assert len(set(strings)) == 1_000
    compare(smollm2, strings)
    ours = Tokenizer(smollm2)
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
            {"name": "rag", "template": "other"},
        ],
    )
    theirs = AutoTokenizer.from_pretrained(path)
    text = ChatTemplate.load(path).render(CHATS[0])
    assert text == theirs.apply_chat_template(CHATS[0], tokenize=False) == "named"
