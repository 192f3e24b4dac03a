"""What a token is at its place in an answer: its bytes, a name for it, and where it begins.

A token by itself says less: half a character is no text, and sentencepiece drops the space before
the first word of a text, so before every token that is decoded alone.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer


class TokenPlaces:
    """Follows one answer, token by token, for its log-probabilities.

    The bytes of an answer's tokens, put together, are the UTF-8 of its text, as far as a stop
    string has not cut the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        skip_special_tokens: bool = True,
        *,
        continues: bool,
        kept: Collection[int] = (),
        ends: Collection[int] = (),
    ) -> None:
        """Begin an answer.

        tokenizer: None for a model without one; tokens then have numbers for names, and no bytes.
        skip_special_tokens, continues, kept: as at `StreamDecoder`. ends: tokens that end the
        answer and are not in its text.
        """
        self._tokenizer = tokenizer
        self._special = frozenset() if tokenizer is None else tokenizer.special_ids
        skipped = self._special.difference(kept) if skip_special_tokens else frozenset()
        self._hidden = skipped.union(ends)
        self._at_start = not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._length = 0  # of the text so far, without a character that is not whole yet

    @property
    def length(self) -> int:
        """How many characters of the text are whole so far."""
        return self._length

    def data(self, token_id: int) -> bytes:
        """The bytes that the token would bring to the text here; none if it is hidden."""
        return b"" if token_id in self._hidden else self._data(token_id)

    def name(self, token_id: int) -> str:
        r"""The token as text: what it reads here, or "bytes:\xf0\x9f" for a part of a character.

        A special token that is hidden is called as it is written; an id that the vocabulary does
        not have is "token_id:17".
        """
        token = None if self._tokenizer is None else self._tokenizer.token(token_id)
        if token is None:
            return f"token_id:{token_id}"
        if token_id in self._hidden and token_id in self._special:
            return token
        data = self._data(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def offset(self, token_id: int) -> int:
        """How many characters of the text come before this token.

        For a part of a character: where the character begins. A character that this token leaves
        unfinished for ever counts as the U+FFFD which it becomes.
        """
        begun, data = self._utf8.getstate()[0], self.data(token_id)
        if not begun or not data:
            return self._length
        rest = codecs.getincrementaldecoder("utf-8")()
        try:
            rest.decode(begun + data[:1])
        except UnicodeDecodeError:
            return self._length + len(begun.decode("utf-8", errors="replace"))
        return self._length

    def advance(self, token_id: int) -> None:
        """The answer goes on with this token."""
        if token_id in self._hidden or self._tokenizer is None:
            return
        self._length += len(self._utf8.decode(self._data(token_id)))
        if self._tokenizer.token(token_id) is not None:
            self._at_start = False

    def _data(self, token_id: int) -> bytes:
        if self._tokenizer is None:
            return b""
        return self._tokenizer.token_bytes(token_id, at_start=self._at_start)
