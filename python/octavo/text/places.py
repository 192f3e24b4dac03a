"""What a token is at its place in an answer: its bytes, a name for it, and where it begins.

A token by itself says less: half a character is no text, and sentencepiece drops the space before
the first word of a text, so before every token that is decoded alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.text.stream import StreamDecoder

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer


class TokenPlaces:
    """Follows one answer, token by token, for its log-probabilities.

    The bytes of an answer's tokens, put together, are the UTF-8 of its text, as far as a stop
    string has not cut the text. offset: how many characters of the text come before the next token;
    for the parts of a character, where the character begins.
    tokenizer: None for a model without one; tokens then have numbers for names, and no bytes.
    skip_special_tokens, continues: as at `StreamDecoder`.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, skip_special_tokens: bool = True, *, continues: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._decoder: StreamDecoder | None = None
        if tokenizer is not None:
            self._decoder = StreamDecoder(tokenizer, skip_special_tokens, continues=continues)
        self._at_start = not continues
        self.offset = 0

    def data(self, token_id: int) -> bytes:
        """The bytes that the token would bring to the text here; none if it is hidden."""
        if self._tokenizer is None or self._is_hidden(token_id):
            return b""
        return self._tokenizer.token_bytes(token_id, at_start=self._at_start)

    def name(self, token_id: int) -> str:
        r"""The token as text: what it reads here, or "bytes:\xf0\x9f" for a part of a character.

        A special token is called as it is written, also where the text hides it; an id that the
        vocabulary does not have is "token_id:17".
        """
        token = None if self._tokenizer is None else self._tokenizer.token(token_id)
        if token is None:
            return f"token_id:{token_id}"
        if self._is_hidden(token_id):
            return token
        data = self.data(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def advance(self, token_id: int) -> None:
        """The answer goes on with this token."""
        if self._decoder is None or self._tokenizer is None or self._is_hidden(token_id):
            return
        self.offset += len(self._decoder.push(token_id))
        if self._tokenizer.token(token_id) is not None:
            self._at_start = False

    def _is_hidden(self, token_id: int) -> bool:
        return self._decoder is not None and bool(self._decoder.skipped(token_id))
