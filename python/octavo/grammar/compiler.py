"""From structured outputs to compiled grammars, and those that are kept."""

from __future__ import annotations

import copy
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from octavo.errors import InvalidArgumentError
from octavo.grammar.lark import lark_of, lark_of_schema
from octavo.grammar.matcher import Grammar, short_error
from octavo.grammar.schema import SchemaReader, children, problem_at
from octavo.grammar.vocabulary import Vocabulary
from octavo.sampling_params import SamplingParams
from octavo.structured_outputs import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from octavo.text.tokenizer import Tokenizer

MAX_GRAMMARS = 256
MAX_KEPT_TEXT = 16 << 20  # characters of what they were made of
_LOCATE_SECONDS = 0.5  # to find the part of a schema that is wrong
_JSON_PROBLEM = re.compile(r"failed to compile JSON schema: (.*?)(\n +\d+ \| |$)", re.DOTALL)
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
                "ignore_eos is True beside structured_outputs, whose text has an end: leave one of "
                "them out"
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
        lark, reader = lark_of(wanted)
        whole = _start(vocabulary.tokens, lark)
        problem = short_error(whole)
        if problem:
            raise _named(whole.get_error(), problem, reader, vocabulary, wanted)
        first = None if vocabulary.first is None else _start(vocabulary.first, lark)
        grammar = Grammar(vocabulary, whole, first)
        self._keep(wanted, grammar, len(lark))
        return grammar

    def _keep(self, wanted: StructuredOutputs, grammar: Grammar, size: int) -> None:
        with self._changing:
            self.num_compiled += 1
            self._kept_text += size - self._kept.pop(wanted, (grammar, 0))[1]
            self._kept[wanted] = grammar, size
            while len(self._kept) > MAX_GRAMMARS or self._kept_text > MAX_KEPT_TEXT:
                _, (_, size) = self._kept.popitem(last=False)
                self._kept_text -= size


def _start(tokens: LLTokenizer, lark: str) -> LLMatcher:
    """A matcher at its start; its error, if any, is found here and not at the first token."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(tokens, lark, log_level=0, limits=limits)  # releases Python's lock
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher


def _named(
    message: str,
    problem: str,
    reader: SchemaReader | None,
    vocabulary: Vocabulary,
    wanted: StructuredOutputs,
) -> InvalidArgumentError:
    """The library's error in octavo's words, with the place of what is wrong."""
    if "NoExtension" in problem:
        problem = "no text meets it"
    if "coerce_one_of" in problem:
        message = ""
        problem = (
            '"oneOf" cannot be enforced where a text may meet two of its schemas: write "anyOf", '
            "or ask without strict to read it as such"
        )
    found = _JSON_PROBLEM.search(message)
    if found:
        problem = " ".join(found.group(1).split())
    if reader is not None:
        return problem_at(_locate(reader, vocabulary, wanted), problem)
    where = None if found else _LARK_PROBLEM.search(message)
    if where:
        line, column, text, _ = where.groups()
        problem = f"{' '.join(text.split())}, at line {line}, column {column}"
    kind = "regex" if wanted.regex is not None else "grammar"
    return InvalidArgumentError(f"the {kind} cannot be followed: {problem}")


def _locate(reader: SchemaReader, vocabulary: Vocabulary, wanted: StructuredOutputs) -> str:
    """The JSON pointer of the innermost schema without which the whole would be right.

    Each schema on the way down is replaced by {}, which anything meets, to see whether that helps.
    """
    schema: Mapping[str, Any] = reader.schema
    pointer = reader.pointers[id(schema)]
    root = copy.copy(schema)
    end = time.monotonic() + _LOCATE_SECONDS
    node = root
    while True:
        for holder, key in children(node):
            below = holder[key]
            holder[key] = {}
            helps = not _start(vocabulary.tokens, lark_of_schema(root, wanted)).is_error()
            holder[key] = below
            if helps and isinstance(below, Mapping):
                node, pointer = below, reader.pointers.get(id(below), pointer)
                break
            if time.monotonic() > end:
                return pointer
        else:
            return pointer
