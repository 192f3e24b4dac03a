"""Tokens at their places: their bytes are the text, their names are told apart."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_helpers import HARD_STRINGS, STYLES

from octavo.text.places import TokenPlaces
from octavo.text.stream import StreamDecoder
from octavo.text.tokenizer import Tokenizer

UNICORN = "🦄"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {style: Tokenizer(make(root / style)) for style, make in STYLES.items()}


def text_of(tokenizer: Tokenizer, ids: list[int], skip: bool, continues: bool) -> str:
    decoder = StreamDecoder(tokenizer, skip, continues=continues)
    return "".join([decoder.push(token) for token in ids] + [decoder.flush()])


def check(tokenizer: Tokenizer, ids: list[int], skip: bool, continues: bool) -> None:
    places = TokenPlaces(tokenizer, skip, continues=continues)
    text = text_of(tokenizer, ids, skip, continues)
    data, offsets = [], []
    for token in ids:
        data.append(places.data(token))
        offsets.append(places.offset(token))
        places.advance(token)
    assert b"".join(data).decode("utf-8", errors="replace") == text
    # A token begins where the text before it ends, as far as its characters are whole.
    before = b""
    for own, offset in zip(data, offsets, strict=True):
        whole = before.decode("utf-8", errors="ignore")
        if "\ufffd" not in text:
            assert offset == len(whole)
        with suppress(UnicodeDecodeError):  # a token of whole characters is read where it begins
            assert text[offset:].startswith(own.decode())
        before += own


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("continues", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_bytes_put_together_are_the_text(loaded, style, continues, skip):
    for text in [*HARD_STRINGS, "a🎉b 人工 🦄"]:
        check(loaded[style], loaded[style].encode(text), skip, continues)


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_bytes_of_any_tokens_are_their_text(loaded, style, data):
    tokenizer = loaded[style]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=30))
    check(tokenizer, ids, data.draw(st.booleans()), data.draw(st.booleans()))


@pytest.mark.parametrize("style", ["byte_level", "sentencepiece"])
def test_parts_of_a_character_have_their_own_bytes_and_names(loaded, style):
    tokenizer = loaded[style]
    ids = tokenizer.encode("ab" + UNICORN, add_special_tokens=False)
    places = TokenPlaces(tokenizer, continues=True)
    found = []
    for token in ids:
        found.append((places.name(token), places.data(token), places.offset(token)))
        places.advance(token)
    parts = [entry for entry in found if entry[0].startswith("bytes:")]
    assert b"".join(data for _, data, _ in parts) == UNICORN.encode()
    assert [name for name, _, _ in parts] == [
        "bytes:" + "".join(f"\\x{byte:02x}" for byte in data) for _, data, _ in parts
    ]
    assert len(parts) > 1
    assert len({name for name, _, _ in parts}) == len(parts)
    start = parts[0][2]
    assert all(offset == start for _, _, offset in parts)  # where the character begins
    assert places.offset(ids[0]) == start + 1


def test_a_character_that_is_never_finished_counts_as_one(loaded):
    tokenizer = loaded["byte_level"]
    begin = tokenizer.encode(UNICORN)[0]
    word = tokenizer.encode("a")[0]
    places = TokenPlaces(tokenizer, continues=True)
    assert tokenizer.token_bytes(begin)[0] == 0xF0
    offsets = []
    for token in (word, begin, begin, word, begin):
        offsets.append(places.offset(token))
        places.advance(token)
    assert offsets == [0, 1, 2, 3, 4]  # of a��a�


def test_a_token_that_ends_the_answer_brings_nothing(loaded):
    tokenizer = loaded["byte_level"]
    end, word = tokenizer.encode("<|im_end|>")[0], tokenizer.encode("a")[0]
    places = TokenPlaces(tokenizer, False, continues=True, ends={end, word})
    assert [places.data(token) for token in (end, word)] == [b"", b""]
    assert [places.name(token) for token in (end, word)] == ["<|im_end|>", "a"]
    kept = TokenPlaces(tokenizer, continues=True, kept={end})
    assert (kept.name(end), kept.data(end)) == ("<|im_end|>", b"<|im_end|>")


def test_a_space_is_lost_at_the_start_of_a_text_alone(loaded):
    tokenizer = loaded["sentencepiece"]
    first = tokenizer.encode("Paris", add_special_tokens=False)[0]
    spelled = tokenizer.token(first)
    assert spelled is not None and spelled[0] == "▁" and len(spelled) > 1
    word = spelled[1:]
    at_start = TokenPlaces(tokenizer, continues=False)
    assert (at_start.name(first), at_start.data(first)) == (word, word.encode())
    at_start.advance(first)
    assert (at_start.name(first), at_start.data(first)) == (" " + word, b" " + word.encode())
    assert TokenPlaces(tokenizer, continues=True).name(first) == " " + word


def test_a_hidden_token_has_a_name_and_no_bytes(loaded):
    tokenizer = loaded["byte_level"]
    end = tokenizer.encode("<|im_end|>")[0]
    hidden = TokenPlaces(tokenizer, continues=False)
    assert (hidden.name(end), hidden.data(end)) == ("<|im_end|>", b"")
    hidden.advance(end)
    assert hidden.offset(end) == 0
    shown = TokenPlaces(tokenizer, skip_special_tokens=False, continues=False)
    assert (shown.name(end), shown.data(end)) == ("<|im_end|>", b"<|im_end|>")
    shown.advance(end)
    assert shown.offset(end) == len("<|im_end|>")


def test_tokens_that_nobody_can_spell(loaded):
    beyond = loaded["byte_level"].vocab_size + 7
    assert TokenPlaces(loaded["byte_level"], continues=True).name(beyond) == f"token_id:{beyond}"
    without = TokenPlaces(None, continues=True)
    assert (without.name(17), without.data(17), without.offset(17)) == ("token_id:17", b"", 0)
