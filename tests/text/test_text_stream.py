"""Streaming: pieces put together are the whole, wherever the text is cut."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from text_helpers import HARD_STRINGS, STYLES

from octavo.errors import InvalidArgumentError
from octavo.text.stream import StopChecker, StreamDecoder
from octavo.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Path]]:
    root = tmp_path_factory.mktemp("tokenizers")
    made = {style: make(root / style) for style, make in STYLES.items()}
    return {style: (Tokenizer(path), path) for style, path in made.items()}


def library(path: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    decoder = StreamDecoder(tokenizer, skip)
    return [decoder.push(token) for token in ids] + [decoder.flush()]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("skip", [True, False])
def test_hard_strings_stream_as_the_library_decodes(loaded, style, skip):
    tokenizer, path = loaded[style]
    reference = library(path)
    for text in HARD_STRINGS:
        ids = tokenizer.encode(text)
        whole = reference.decode(ids, skip_special_tokens=skip)
        assert "".join(stream(tokenizer, ids, skip)) == whole
        assert tokenizer.decode(ids, skip) == whole


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=150, deadline=None)
@given(
    text=st.text(
        alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("人工智🎉👩‍🏳️ a\n▁")),
        max_size=30,
    )
)
def test_any_text_streams_as_the_library_decodes(loaded, style, text):
    tokenizer, path = loaded[style]
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids)) == library(path).decode(ids)


@pytest.mark.parametrize("style", ["byte_level", "metaspace"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_ids_stream_as_the_library_decodes(loaded, style, data):
    tokenizer, path = loaded[style]
    # Beyond the vocabulary too: models pad their embeddings, and dummy weights draw anything.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=60))
    skip = data.draw(st.booleans())
    assert "".join(stream(tokenizer, ids, skip)) == library(path).decode(
        ids, skip_special_tokens=skip
    )


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_ids_with_byte_fallback(loaded, data):
    """Equal to the library unless a run of bytes is broken; then whole characters survive."""
    tokenizer, path = loaded["sentencepiece"]
    token = st.one_of(
        st.integers(3, 258).map(lambda byte: [byte]),
        st.integers(0, tokenizer.vocab_size).map(lambda token: [token]),
        st.sampled_from("人é🎉\n").map(lambda c: [3 + byte for byte in c.encode()]),
    )
    ids = [i for part in data.draw(st.lists(token, max_size=30)) for i in part]
    streamed = "".join(stream(tokenizer, ids))
    whole = library(path).decode(ids)
    assert streamed == tokenizer.decode(ids)
    if "\ufffd" not in whole:
        assert streamed == whole
    else:
        assert "\ufffd" in streamed
        kept = streamed.replace("\ufffd", "")
        assert set(whole.replace("\ufffd", "")) <= set(kept) | {" "}


def test_a_broken_run_of_bytes_keeps_its_whole_characters(loaded):
    tokenizer, path = loaded["sentencepiece"]
    ids = [3 + byte for byte in "人".encode() + b"\xff" + "é".encode()]
    assert library(path).decode(ids) == "\ufffd" * 6
    assert tokenizer.decode(ids) == "人\ufffdé"


@pytest.mark.parametrize("style", ["byte_level", "sentencepiece"])
def test_a_character_over_several_tokens_comes_out_whole(loaded, style):
    tokenizer, _ = loaded[style]
    ids = tokenizer.encode("a🎉b", add_special_tokens=False)
    pieces = stream(tokenizer, ids)
    assert len(ids) > 4  # the emoji is not in the vocabulary
    assert "".join(pieces) == "a🎉b"
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum("🎉" in piece for piece in pieces) == 1
    # Cut within the emoji: silence until the flush, and only then the replacement character.
    cut = ids[: ids.index(tokenizer.encode("b", False)[-1]) - 1]
    pieces = stream(tokenizer, cut)
    assert "".join(pieces[:-1]) == "a"
    assert pieces[-1] == "\ufffd"


def test_leading_space_is_kept_when_the_text_goes_on(loaded):
    tokenizer, _ = loaded["sentencepiece"]
    ids = tokenizer.encode("Paris is", add_special_tokens=False)
    assert "".join(stream(tokenizer, ids)) == "Paris is"
    decoder = StreamDecoder(tokenizer, continues=True)
    assert "".join([decoder.push(i) for i in ids] + [decoder.flush()]) == " Paris is"


def test_special_tokens_are_skipped_or_shown(loaded):
    tokenizer, _ = loaded["byte_level"]
    ids = tokenizer.encode("<|im_start|>hi<|im_end|><tool call 🎉>")
    assert "".join(stream(tokenizer, ids)) == "hi<tool call 🎉>"
    assert "".join(stream(tokenizer, ids, skip=False)) == "<|im_start|>hi<|im_end|><tool call 🎉>"


def test_cost_does_not_grow_with_the_length(loaded):
    tokenizer, _ = loaded["sentencepiece"]
    ids = [3 + byte for byte in "🎉".encode()] * 5_000  # one endless run of bytes

    def seconds(count: int) -> float:
        start = time.process_time()
        stream(tokenizer, ids[:count])
        return time.process_time() - start

    seconds(2_000)
    # Ten times the tokens; quadratic cost would take a hundred times the time.
    assert seconds(20_000) < 40 * max(seconds(2_000), 1e-3)


def naive_stop(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    """By definition: the shortest prefix of the text that ends with a stop string."""
    for end in range(len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text("ab🎉\n", max_size=5), max_size=12),
    stop=st.lists(st.text("ab🎉\n", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_stop_strings_are_found_as_by_naive_search(pieces, stop, include):
    checker = StopChecker(stop, include)
    shown = ""
    for piece in pieces:
        shown += checker.push(piece)
        # Never shown what a stop string takes back, whatever comes later.
        assert "".join(pieces).startswith(shown)
        if checker.matched is not None:
            break
    else:
        shown += checker.flush()
    assert (shown, checker.matched) == naive_stop("".join(pieces), stop, include)


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.text("ab🎉", max_size=4), st.booleans()), max_size=12),
    stop=st.lists(st.text("ab🎉", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_hidden_text_is_looked_at_and_not_shown(pieces, stop, include):
    checker = StopChecker(stop, include)
    shown = ""
    for piece, hidden in pieces:
        shown += checker.push(piece, hidden=hidden)
        if checker.matched is not None:
            break
    else:
        shown += checker.flush()
    whole = "".join(piece for piece, _ in pieces)
    kept, matched = naive_stop(whole, stop, include)
    visible = [not hidden for piece, hidden in pieces for _ in piece]
    if include and matched is not None:  # a stop string that is kept is shown whole
        visible[len(kept) - len(matched) : len(kept)] = [True] * len(matched)
    assert checker.matched == matched
    assert shown == "".join(itertools.compress(kept, visible))


def test_stop_checker_holds_back_only_what_it_must():
    checker = StopChecker(["</answer>"])
    assert checker.push("Paris</ans") == "Paris"
    assert checker.push("er? No") == "</anser? No"
    assert checker.push("<") == ""
    assert checker.push("/answer>rest") == ""
    assert checker.matched == "</answer>"
    assert checker.push("more") == ""


def test_stop_checker_disarmed_lets_matches_pass():
    checker = StopChecker(["ab"])
    assert checker.push("xaby", armed=False) == "xaby"
    assert checker.push("a", armed=False) == ""
    assert checker.push("b", armed=True) == ""
    assert checker.matched == "ab"


def test_stop_checker_refuses_empty_strings():
    with pytest.raises(InvalidArgumentError, match="non-empty"):
        StopChecker(["a", ""])
