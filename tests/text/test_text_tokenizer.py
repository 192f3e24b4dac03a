"""Loading a tokenizer: ids, special tokens, BOS, and every way a file can be bad."""

from __future__ import annotations

import json
import random

import pytest
import tokenizers
from text_helpers import (
    HARD_STRINGS,
    STYLES,
    byte_level_directory,
    sentencepiece_directory,
    write_config,
)

from octavo.errors import InvalidArgumentError, OctavoError, TokenizerError
from octavo.text.chat import ChatTemplate
from octavo.text.tokenizer import Tokenizer, holds_tokenizer


@pytest.mark.parametrize("style", STYLES)
def test_ids_are_the_library_s_and_decoding_round_trips(tmp_path, style):
    path = STYLES[style](tmp_path)
    tokenizer = Tokenizer(path)
    reference = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    for text in HARD_STRINGS:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text).ids
        if style == "byte_level":
            assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_bos_follows_the_post_processor(tmp_path):
    plain = Tokenizer(byte_level_directory(tmp_path / "a"))
    assert plain.bos_token_id == 1 and plain.eos_token_ids == (2,)
    assert plain.encode("hi")[0] != plain.bos_token_id
    llama = Tokenizer(sentencepiece_directory(tmp_path / "b"))
    assert llama.encode("hi")[0] == llama.bos_token_id == 1
    assert llama.encode("hi", add_special_tokens=False)[0] != 1
    assert llama.eos_token_ids == (2,)


def test_add_bos_token_in_the_config_is_ignored_as_in_transformers(tmp_path):
    with_bos = Tokenizer(sentencepiece_directory(tmp_path / "a", add_bos_token=False))
    assert with_bos.encode("hi")[0] == 1
    without = Tokenizer(byte_level_directory(tmp_path / "b", add_bos_token=True))
    assert without.encode("hi")[0] != 1


def test_special_tokens_of_the_config_are_added(tmp_path):
    path = byte_level_directory(
        tmp_path,
        eos_token="<|done|>",
        additional_special_tokens=["<|tool|>", {"content": "<|think|>"}],
        added_tokens_decoder={"500": {"content": "<plain>", "special": False}},
    )
    tokenizer = Tokenizer(path)
    ids = tokenizer.encode("<|tool|>x<|think|><|done|><plain>")
    assert len(ids) == 5
    assert tokenizer.eos_token_ids == (ids[3],)
    assert tokenizer.decode(ids) == "x<plain>"


@pytest.mark.parametrize("declares", [True, False])
def test_a_special_token_keeps_its_flags(tmp_path, declares):
    """Phi-4's <|im_start|> and <|im_end|> take the blanks around them."""
    path = byte_level_directory(tmp_path)
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    for token in content["added_tokens"]:
        token["lstrip"] = token["rstrip"] = not declares
    file.write_text(json.dumps(content))
    declared = {
        str(token["id"]): {**token, "lstrip": True, "rstrip": True}
        for token in content["added_tokens"]
    }
    fields = {"added_tokens_decoder": declared} if declares else {}
    write_config(path, bos_token="<|im_start|>", eos_token={"content": "<|im_end|>"}, **fields)
    tokenizer = Tokenizer(path)
    ids = tokenizer.encode("<|im_start|>\nHi \n<|im_end|>\n")
    assert ids == [1, *tokenizer.encode("Hi"), 2] and tokenizer.special_ids >= {1, 2}


def test_a_named_token_is_special_and_an_additional_one_stays_as_it_is(tmp_path):
    path = byte_level_directory(tmp_path)
    raw = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokens = ["<|a|>", "<|b|>", "<|c|>"]
    raw.add_tokens([tokenizers.AddedToken(t, special=False, rstrip=True) for t in tokens])
    raw.save(str(path / "tokenizer.json"))
    write_config(path, eos_token="<|a|>", additional_special_tokens=["<|b|>"])
    tokenizer = Tokenizer(path)
    ids = tokenizer.encode("<|a|> <|b|> <|c|> ")
    assert [tokenizer.token(i) for i in ids] == tokens
    assert tokenizer.special_ids & {*ids} == {ids[0]}
    assert tokenizer.decode(ids) == "<|b|><|c|>"


def test_special_tokens_map_is_read_in_older_directories(tmp_path):
    path = byte_level_directory(tmp_path)
    (path / "tokenizer_config.json").unlink()
    (path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    tokenizer = Tokenizer(path)
    assert tokenizer.eos_token_ids == (2,) and tokenizer.bos_token_id is None


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    path = byte_level_directory(tmp_path)
    raw = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    raw.enable_truncation(4)
    raw.enable_padding(length=64)
    raw.save(str(path / "tokenizer.json"))
    assert len(Tokenizer(path).encode("1234567890")) == 10


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
        ("", "Expecting value"),
        ("{", "Expecting"),
        ("[1, 2]", "expected a JSON object"),
        ("{}", "model"),
        ('{"model": 5}', "not a tokenizer"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}', "not a tokenizer"),
        ("[" * 100_000, "cannot be read"),
        ("\xff\xfe", "cannot be read"),
    ],
)
def test_malformed_tokenizer_json_is_named_with_its_cause(tmp_path, content, cause):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(TokenizerError, match=cause) as caught:
        Tokenizer(tmp_path)
    assert str(file) in str(caught.value)


def test_malformed_tokenizer_config_is_named(tmp_path):
    path = byte_level_directory(tmp_path)
    (path / "tokenizer_config.json").write_text("{oops")
    with pytest.raises(TokenizerError, match="tokenizer_config.json cannot be read"):
        Tokenizer(path)


@pytest.mark.parametrize("model_type", ["mistral", "llama", None])
@pytest.mark.parametrize("digits", [r"\p{N}{1,3}", r"\p{N}"])
def test_mistrals_tokens_with_llama3s_splitting_are_warned_of(tmp_path, model_type, digits):
    path = byte_level_directory(tmp_path)
    content = json.loads((path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"<filler{i}>": i for i in range(len(vocabulary), 100_001)}
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    split["pattern"] = {"Regex": rf"\p{{L}}+|{digits}|\s+"}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split]}
    (path / "tokenizer.json").write_text(json.dumps(content))
    if model_type is not None:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    if model_type == "mistral" and "{1,3}" in digits:
        with pytest.warns(UserWarning, match=r"tokenizer.json splits digits in threes.*Mistral's"):
            Tokenizer(path)
    else:
        Tokenizer(path)  # a warning would be an error


def test_missing_tokenizer_says_what_to_do(tmp_path):
    assert not holds_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="no tokenizer.json; expected .*\n.*AutoTokenizer"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.model", "tekken.json", "vocab.json"])
def test_a_tokenizer_in_another_form_is_refused_by_name(tmp_path, file):
    (tmp_path / file).write_text("{}")
    assert holds_tokenizer(tmp_path)  # so that a model is not loaded as one without a tokenizer
    with pytest.raises(TokenizerError, match=f"but {file}, which octavo does not read"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": [{"type": "CTC"}]},
        {"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""},
    ],
)
def test_an_unknown_decoder_is_refused_by_name(tmp_path, decoder):
    path = byte_level_directory(tmp_path)
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["decoder"] = {"pad_token": "", "word_delimiter_token": "", **decoder}
    for part in content["decoder"].get("decoders", []):
        part.update(pad_token="<pad>", word_delimiter_token="|", cleanup=True)
    file.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="not supported; octavo implements ByteLevel"):
        Tokenizer(path)


def test_a_tokenizer_without_decoder_joins_with_spaces(tmp_path):
    path = byte_level_directory(tmp_path)
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["decoder"] = None
    file.write_text(json.dumps(content))
    tokenizer = Tokenizer(path)
    ids = tokenizer.encode("fox dog")
    assert tokenizer.decode(ids) == tokenizers.Tokenizer.from_file(str(file)).decode(ids)


def test_lone_surrogates_and_other_types_are_refused(tmp_path):
    tokenizer = Tokenizer(byte_level_directory(tmp_path))
    with pytest.raises(InvalidArgumentError, match="surrogate at character 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(InvalidArgumentError, match="expected str"):
        tokenizer.encode(b"bytes")


def test_ids_outside_of_the_vocabulary_decode_to_nothing(tmp_path):
    tokenizer = Tokenizer(byte_level_directory(tmp_path))
    assert tokenizer.decode([-1, 10**6]) == ""
    assert tokenizer.token(-1) is None and tokenizer.token(10**6) is None


def mutate(value: object, generator: random.Random) -> None:
    """Replace one node somewhere in a JSON document."""
    places = []
    pending = [value]
    while pending:
        node = pending.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in list(keys)[:40]:
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                pending.append(node[key])
    node, key = generator.choice(places)
    node[key] = generator.choice(
        [None, -1, 1e30, 10**25, "", [], {}, "x", True, 0, [[1]], {"type": "BPE"}]
    )


@pytest.mark.parametrize("style", STYLES)
def test_mutated_files_give_errors_and_nothing_else(tmp_path, style):
    generator = random.Random(style)
    path = STYLES[style](tmp_path, chat_template="x", extra_special_tokens=["<e>"])
    files = [path / "tokenizer.json", path / "tokenizer_config.json"]
    whole = [file.read_bytes() for file in files]
    loaded = 0
    for attempt in range(120):
        for file, content in zip(files, whole, strict=True):
            file.write_bytes(content)
        chosen = generator.randrange(2)
        data = bytearray(whole[chosen])
        if attempt % 3 == 0:
            data[generator.randrange(len(data))] = generator.randrange(256)
        elif attempt % 3 == 1:
            del data[generator.randrange(len(data)) :]
        else:
            content = json.loads(data)
            mutate(content, generator)
            data = bytearray(json.dumps(content).encode())
        files[chosen].write_bytes(data)
        try:
            tokenizer = Tokenizer(path)
            tokenizer.decode(tokenizer.encode("Hello, 人 🎉 world 123"))
            tokenizer.decode(range(0, tokenizer.vocab_size, 7))
            ChatTemplate.load(path)
            loaded += 1
        except OctavoError as error:
            assert str(error)
    assert 0 < loaded < 100
