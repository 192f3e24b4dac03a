"""What a grammar allows, token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from text_helpers import STYLES

from octavo.grammar.compiler import Grammars
from octavo.grammar.matcher import Matcher
from octavo.structured_outputs import StructuredOutputs
from octavo.text.tokenizer import Tokenizer


def grammars_of_style(style: str, folder: Path) -> tuple[Tokenizer, Grammars]:
    """A tokenizer, and the grammars of a model with three more tokens than it has."""
    tokenizer = Tokenizer(STYLES[style](folder))
    return tokenizer, Grammars(tokenizer, tokenizer.vocab_size + 3, tokenizer.eos_token_ids)


def allowed_tokens(matcher: Matcher) -> tuple[set[int], bool]:
    words, may_end = matcher.allowed()
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist()), may_end


def follows(grammars: Grammars, wanted: StructuredOutputs, text: str) -> bool:
    """Whether the text is in the grammar, whose tokens are those of single bytes."""
    matcher = grammars.compile(wanted).matcher(continues=True)
    tokenizer = grammars._tokenizer
    assert tokenizer is not None
    of_byte = {tokenizer.bytes_of(t): t for t in reversed(range(tokenizer.vocab_size))}
    for byte in text.encode():
        token = of_byte[bytes([byte])]
        if token not in allowed_tokens(matcher)[0]:
            return False
        matcher.accept(token)
    return matcher.allowed()[1]
