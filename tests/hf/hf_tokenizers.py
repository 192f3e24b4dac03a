"""A tokenizer of octavo beside one of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octavo.text.stream import StreamDecoder
from octavo.text.tokenizer import Tokenizer


def check_special_tokens(ours: Tokenizer, theirs: Any) -> None:
    """The same number of tokens, and the same that are special."""
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.vocab_size == len(theirs)
    special = {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.special_ids == special


def check_texts(ours: Tokenizer, theirs: Any, texts: Sequence[str]) -> None:
    """The same ids with and without special tokens around a text, and the same text of them.

    Every second text is read back with the special tokens among its ids, the others without.
    octavo's own stream, one id after the other, must give what `decode` gives.
    """
    different = find_id_differences(ours, theirs, texts)
    assert not different, f"{len(different)} texts differ; the first: {different[0]}"
    for number, text in enumerate(texts):
        ids, skip = ours.encode(text), number % 2 == 0
        decoded = ours.decode(ids, skip_special_tokens=skip)
        assert decoded == theirs.decode(ids, skip_special_tokens=skip), (ids, skip)
        stream = StreamDecoder(ours, skip)
        assert "".join(map(stream.push, ids)) + stream.flush() == decoded, (ids, skip)


def find_id_differences(ours: Tokenizer, theirs: Any, texts: Sequence[str]) -> list[str]:
    """The texts whose ids are not the same."""
    different = []
    for special in (True, False):
        expected = theirs(list(texts), add_special_tokens=special)["input_ids"]
        different += [
            text
            for text, ids in zip(texts, expected, strict=True)
            if ours.encode(text, add_special_tokens=special) != ids
        ]
    return list(dict.fromkeys(different))
