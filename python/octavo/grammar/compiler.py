"""From structured outputs to compiled grammars, and those that are kept."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import TYPE_CHECKING

from octavo.errors import InvalidArgumentError
from octavo.grammar.lark import Piece, lark_of
from octavo.grammar.matcher import Grammar, short_error, start_matcher
from octavo.grammar.repair import SchemaRepair
from octavo.grammar.vocabulary import Vocabulary
from octavo.sampling_params import SamplingParams
from octavo.structured_outputs import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from octavo.text.tokenizer import Tokenizer

MAX_GRAMMARS = 256
MAX_KEPT_TEXT = 16 << 20  # characters of what they were made of
_KINDS = ("regex", "choice", "structural_tag", "grammar")
_LARK_PROBLEM = re.compile(r"at (\d+)\((\d+)\): (.*?)(\n +\d+ \| |$)", re.DOTALL)


class Grammars:
    """The compiled grammars of one model, the last used of which are kept. Any thread may ask.

    tokenizer: None for a model without one, which can follow no grammar.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        self.num_compiled = 0
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._vocabulary: Vocabulary | None = None
        self._kept: OrderedDict[StructuredOutputs, tuple[Grammar, int]] = OrderedDict()
        self._kept_text = 0
        self._changing, self._reading = threading.Lock(), threading.Lock()

    def prepare(self) -> Vocabulary:
        """Read the vocabulary, once; otherwise the first grammar does."""
        if self._tokenizer is None:
            raise InvalidArgumentError(
                "structured_outputs is given, but this model has no tokenizer, so octavo does not "
                "know the text of its tokens: put the tokenizer beside the weights"
            )
        with self._reading:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(
                    self._tokenizer, self._vocab_size, self._eos_token_ids
                )
            return self._vocabulary

    def of(self, params: SamplingParams) -> Grammar | None:
        """The grammar that a request is to follow, compiled now if it is new; None: it has none.

        Raises InvalidArgumentError, with the place of the mistake, for what cannot be followed.
        """
        wanted = params.structured_outputs
        if wanted is None:
            return None
        if params.ignore_eos:
            raise InvalidArgumentError(
                "ignore_eos is True beside structured_outputs, or calls of tools that must come or "
                "are strict, whose text has an end: leave one of them out"
            )
        if not self._eos_token_ids and not params.stop_token_ids:
            raise InvalidArgumentError(
                "structured_outputs is given, but this model has no token that ends a text: give "
                "stop_token_ids"
            )
        return self.compile(StructuredOutputs.of(wanted))

    def compile(self, wanted: StructuredOutputs) -> Grammar:
        """The grammar of these structured outputs. Raises InvalidArgumentError."""
        with self._changing:
            found = self._kept.get(wanted)
            if found is not None:
                self._kept.move_to_end(wanted)
                return found[0]
        vocabulary = self.prepare()
        text = lark_of(wanted, vocabulary.special)
        lark = str(text)
        whole = start_matcher(vocabulary.tokens, lark)
        if whole.is_error():
            for piece in text.pieces:
                with piece.named():
                    self._mend(piece)
            lark = str(text)
            whole = start_matcher(vocabulary.tokens, lark)
        if whole.is_error():
            raise _named(whole, wanted)
        first = None if vocabulary.first is None else start_matcher(vocabulary.first, lark)
        grammar = Grammar(vocabulary, whole, first)
        self._keep(wanted, grammar, len(lark))
        return grammar

    def _mend(self, piece: Piece) -> None:
        """Leave out of a schema what cannot be followed, if it may be. Raises if it is wrong."""
        vocabulary = self.prepare()
        if piece.reader is not None:
            SchemaRepair(vocabulary.tokens, piece.reader, piece.wanted).mend()
            return
        alone = start_matcher(vocabulary.tokens, str(lark_of(piece.wanted, vocabulary.special)))
        if alone.is_error():
            raise _named(alone, piece.wanted)

    def _keep(self, wanted: StructuredOutputs, grammar: Grammar, size: int) -> None:
        with self._changing:
            self.num_compiled += 1
            self._kept_text += size - self._kept.pop(wanted, (grammar, 0))[1]
            self._kept[wanted] = grammar, size
            while len(self._kept) > MAX_GRAMMARS or self._kept_text > MAX_KEPT_TEXT:
                _, (_, size) = self._kept.popitem(last=False)
                self._kept_text -= size


def _named(matcher: LLMatcher, wanted: StructuredOutputs) -> InvalidArgumentError:
    """The library's error about a regular expression or a grammar, in octavo's words."""
    problem = short_error(matcher)
    if "NoExtension" in problem:
        problem = "no text meets it"
    where = _LARK_PROBLEM.search(matcher.get_error())
    if where:
        line, column, text, _ = where.groups()
        problem = f"{' '.join(text.split())}, at line {line}, column {column}"
    kind = next((kind for kind in _KINDS if getattr(wanted, kind) is not None), "JSON schema")
    return InvalidArgumentError(f"the {kind} cannot be followed: {problem}")
