"""The tokens of a model as the grammar library wants them: their bytes."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from octavo.errors import InvalidArgumentError

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from octavo.text.tokenizer import Tokenizer


class _Tokens:
    """What LLTokenizer reads. The last token is none of the model's: it says "the text may end"."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], tokenizer: Tokenizer) -> None:
        self.tokens = [*tokens, b""]
        self.eos_token_id = len(tokens)
        self.special_token_ids = special
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


class Vocabulary:
    """The tokens of one model.

    end: the number of the token that stands for the end of the text, one past the model's last.
    special: the tokens that no text is made of, but for the ends of text, by what they read.
    tokens: by it the bytes of every token are known. first: the same for the first token of an
    answer that is no continuation, where sentencepiece drops a space; None where nothing changes.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Collection[int]) -> None:
        """end_ids: the model's ends of text. Takes 0.3 s for 49,000 tokens."""
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise InvalidArgumentError(
                "structured outputs need llguidance, which is not installed: pip install llguidance"
            ) from error

        self.end = vocab_size
        special = sorted(i for i in tokenizer.special_ids.union(end_ids) if i < vocab_size)
        self.special = {str(tokenizer.token(i)): i for i in special if i not in end_ids}

        def make(data: list[bytes]) -> LLTokenizer:
            for token in special:
                data[token] = (tokenizer.token(token) or f"token {token}").encode()
            return LLTokenizer(_Tokens(data, special, tokenizer))  # type: ignore[arg-type]

        # An id that the tokenizer does not have brings no bytes, and is never allowed.
        data = [tokenizer.bytes_of(token) for token in range(vocab_size)]
        spaced = [token for token, text in enumerate(data) if text[:1] == b" "][:8]
        self._first_data: list[bytes] | None = None
        self.first: LLTokenizer | None = None
        if any(tokenizer.bytes_of(token, at_start=True) != data[token] for token in spaced):
            self._data = data
            self._first_data = [tokenizer.bytes_of(t, at_start=True) for t in range(vocab_size)]
            self.first = make(list(self._first_data))
        self.tokens = make(list(data))

    def spell(self, token: int) -> list[int]:
        """Tokens that bring anywhere what `token` brings to the start of an answer."""
        if self._first_data is None or self._first_data[token] == self._data[token]:
            return [token]
        return list(self.tokens.greedy_tokenize(self._first_data[token].decode()))
