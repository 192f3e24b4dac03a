"""Answers drawn at random from the grammar of a request with tools, and what is read in them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grammar_helpers import allowed_tokens
from parrot import END, write_parrot
from tool_texts import MARKS, SCRAPS

from octavo.llm import LLM
from octavo.server import prepare
from octavo.server.answer_grammar import answer_grammar
from octavo.server.answers import AnswerParser, Markup, Reading
from octavo.server.protocol import ChatBody
from octavo.server.reasoning import Reasoning
from octavo.server.structured import structured_outputs
from octavo.server.tool_calls import Arguments, ToolCall
from octavo.server.tools import TAGS, ToolFormat

HIDDEN = "<hidden>"  # a special token that no parser knows, and that is not shown
_PIECES = [
    *SCRAPS,
    *('{"name": "f"', '{"name": "g", ', '"arguments": ', '"parameters": ', '{"x": 12}', '{"x": '),
    *("[f(", "[g(", "x=", "f(x=12)", "12", "true", "None", ", ", "; ", ": ", "<think>", "</think>"),
    *("<function=f>\n", "<parameter=x>\n", "\n</parameter>\n", "</function>\n</tool_call>"),
    *("</parameter><parameter=z>", "</function></tool_call>", '{"parameters": {}, "name": "f"}'),
]
# What opens calls of a format, so that many answers have some.
_OPENINGS = {
    "llama3_json": ['{"name": "f"', '{"name": "g", '],
    "pythonic": ["[f(", "[g("],
    "phi4_mini_json": ["functools["],
    "qwen3_coder": ["<function=f>\n"],
}


def load(folder: Path, *, special: bool) -> LLM:
    """A model with tokens for pieces of calls; special: those of marks are special tokens."""
    chain = {"<go>": "no", "no": END, **dict.fromkeys(_PIECES, "no")}
    tokens = [HIDDEN, *(mark for mark in MARKS if special and mark != "functools[")]
    return LLM(write_parrot(folder, chain, special=tokens, context=64), num_threads=1)


@dataclass
class Read:
    """What is read in an answer."""

    shown: str
    calls: list[tuple[str, str]]
    is_whole: bool


class CallWalk:
    """Draws answers to a request with tools. prompt: what they stand behind."""

    def __init__(self, llm: LLM, markup: Markup, prompt: str, **body: Any) -> None:
        assert llm.tokenizer is not None
        self._tokenizer = llm.tokenizer
        chat = ChatBody.model_validate({"messages": [], **body})
        wanted = answer_grammar(chat, structured_outputs(chat), markup, prompt)
        assert wanted is not None
        self._grammar = llm.engine.grammars.compile(wanted)
        self.reading: Reading = prepare.reading_of(chat, markup, prompt)
        self._kept = markup.token_ids(llm.tokenizer)
        openings = [] if markup.tools is None else _openings(markup.tools)
        closing = ['"', "}", "]", ")", "</think>"]
        names = [*_PIECES, HIDDEN, *6 * openings, *3 * closing]
        self._liked = [llm.tokenizer.token_id(name) for name in names]
        tokens = range(llm.tokenizer.vocab_size)
        self._plain = {token for token in tokens if llm.tokenizer.bytes_of(token).isascii()}

    def draw(self, rng: random.Random, most: int = 90) -> Read:
        """One answer of at most so many tokens, read whole and letter by letter."""
        matcher, tokens = self._grammar.matcher(continues=False), list[int]()
        is_whole, length = False, rng.randrange(most // 3, most)
        while not is_whole and len(tokens) < length:
            allowed, may_end = allowed_tokens(matcher)
            is_whole = may_end and (not allowed or rng.random() < 0.05)
            if not is_whole:
                liked = [token for token in self._liked if token in allowed]
                plain = [] if liked and rng.random() < 0.85 else sorted(self._plain & allowed)
                tokens.append(rng.choice(plain or liked or sorted(allowed)))
                matcher.accept(tokens[-1])
        special = self._tokenizer.special_ids - self._kept
        shown = [token for token in tokens if token not in special]
        text = self._tokenizer.decode(shown, skip_special_tokens=False)
        found = self._read([text], is_whole)
        assert self._read(text, is_whole) == found, text
        return found

    def _read(self, pieces: Sequence[str], is_whole: bool) -> Read:
        parser = AnswerParser(self.reading)
        found = Read("", [], is_whole)
        for piece in [each for text in pieces for each in parser.push(text)] + parser.finish():
            if isinstance(piece, ToolCall):
                found.calls.append((piece.name, piece.arguments))
            elif isinstance(piece, Arguments):
                name, begun = found.calls[-1]
                found.calls[-1] = name, begun + piece.text
            elif not isinstance(piece, Reasoning):
                found.shown += piece
        return found


def _openings(tool_format: ToolFormat) -> list[str]:
    return [TAGS[tool_format][0], *_OPENINGS.get(tool_format, [])]
