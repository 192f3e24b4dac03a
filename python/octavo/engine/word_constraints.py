"""Tokens and words that a request allows or bans by name."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

import numpy as np

from octavo.engine.constraints import Constraint, UInt32, clear_bits
from octavo.engine.request import Request, Sequence
from octavo.errors import InvalidArgumentError

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer


class AllowedTokens:
    """None but these tokens."""

    is_active = True
    watches_answer = False

    def __init__(self, token_ids: SequenceOf[int]) -> None:
        tokens = np.array(token_ids)
        self._words = np.zeros(int(tokens.max()) // 32 + 1, np.uint32)
        np.bitwise_or.at(self._words, tokens // 32, np.uint32(1) << (tokens % 32).astype(np.uint32))

    def forbid(self, words: UInt32) -> None:
        """Keep the bits of the allowed tokens alone."""
        words[: len(self._words)] &= self._words
        words[len(self._words) :] = 0


class BadWords:
    """No sequence of tokens that spells one of the words: its last token is forbidden.

    As in vLLM, a word counts from the answer's first token on, whatever the prompt ends with.
    """

    is_active = True

    def __init__(self, sequence: Sequence, words: SequenceOf[list[int]]) -> None:
        self._sequence = sequence
        self._single = [word[0] for word in words if len(word) == 1]
        self._longer = [word for word in words if len(word) > 1]
        self.watches_answer = bool(self._longer)

    def forbid(self, words: UInt32) -> None:
        """Clear the last token of each word whose other tokens the answer ends with."""
        clear_bits(words, self._single)
        tokens, start = self._sequence.token_ids, self._sequence.num_prompt_tokens
        for word in self._longer:
            begin = len(tokens) - len(word) + 1
            if begin >= start and tokens[begin:] == word[:-1]:
                clear_bits(words, word[-1:])


def tokens_of_words(words: SequenceOf[str], tokenizer: Tokenizer | None) -> list[list[int]]:
    """Each word as tokens, as it is and after a space.

    Raises InvalidArgumentError without a tokenizer.
    """
    if not words:
        return []
    if tokenizer is None:
        raise InvalidArgumentError(
            f"bad_words is {tuple(words)!r}, but this model has no tokenizer to make tokens with: "
            f"use logit_bias"
        )
    found: list[list[int]] = []
    for word in words:
        plain = word.lstrip(" ")
        for text in (plain, " " + plain) if plain else (word,):
            tokens = tokenizer.encode(text, add_special_tokens=False)
            if tokens and tokens not in found:
                found.append(tokens)
    return found


def word_constraints(request: Request, sequence: Sequence) -> list[Constraint]:
    """What allowed_token_ids and bad_words ask of an answer; nearly always nothing."""
    constraints: list[Constraint] = []
    if request.params.allowed_token_ids is not None:
        constraints.append(AllowedTokens(request.params.allowed_token_ids))
    if request.bad_words:
        constraints.append(BadWords(sequence, request.bad_words))
    return constraints
