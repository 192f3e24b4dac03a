"""How a model writes what is no plain text, and an answer taken apart: thinking, text, calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from octavo.server.reasoning import (
    Reasoning,
    ReasoningParser,
    ReasoningTags,
    Start,
    detect_reasoning,
)
from octavo.server.tool_calls import Arguments, ToolCall
from octavo.server.tools import TAGS, CallMode, ToolFormat, Tools, detect_format, make_parser

if TYPE_CHECKING:
    from octavo.text.chat import ChatTemplate
    from octavo.text.tokenizer import Tokenizer

Piece = str | Reasoning | ToolCall | Arguments


@dataclass(frozen=True)
class Markup:
    """How a model writes calls of tools, and what it thinks; None: it does not."""

    tools: ToolFormat | None = None
    reasoning: ReasoningTags | None = None

    def token_ids(self, tokenizer: Tokenizer | None) -> frozenset[int]:
        """The tokens that an answer's text must keep for its parser, special or not."""
        tags = [] if self.tools is None else [*TAGS[self.tools]]
        tags += [] if self.reasoning is None else [self.reasoning.begin, self.reasoning.end]
        ids = [] if tokenizer is None else map(tokenizer.token_id, tags)
        return frozenset(token_id for token_id in ids if token_id is not None)


def detect_markup(template: str, with_tools: str | None = None) -> Markup:
    """What a chat template teaches; with_tools: the one for messages with tools, if it differs."""
    return Markup(detect_format(with_tools or template), detect_reasoning(template))


def markup_of(template: ChatTemplate | None) -> Markup:
    """What a model's own chat template teaches; None: it has none."""
    if template is None:
        return Markup()
    return detect_markup(template.source, template.source_with_tools)


@dataclass(frozen=True)
class Reading:
    """How answers to one prompt are read.

    markup: what is looked for. start: where an answer begins. calls: how they are in what stands
    behind the thinking. max_calls: further ones are left out. shows_reasoning: the thinking is
    given, too. tools: those of the request, whose schemas say what arguments are.
    """

    markup: Markup = field(default_factory=Markup)
    start: Start = "before"
    calls: CallMode = "free"
    max_calls: int | None = None
    shows_reasoning: bool = True
    tools: Tools = ()


class AnswerParser:
    """Takes one answer apart as it comes.

    num_calls: calls so far. has_thought: whether some of it was thinking, shown or not.
    """

    def __init__(self, reading: Reading) -> None:
        markup = reading.markup
        self._reading = reading
        self._thinking = None
        if markup.reasoning is not None:
            self._thinking = ReasoningParser(markup.reasoning, reading.start)
        self._calls = markup.tools and make_parser(markup.tools, reading.calls, reading.tools)
        self.num_calls = 0
        self.has_thought = False
        self._is_left_out = False  # the last call, and so its arguments

    def push(self, text: str) -> list[Piece]:
        """What this text makes certain."""
        return self._take([text] if self._thinking is None else self._thinking.push(text))

    def finish(self) -> list[Piece]:
        """What is left at the end."""
        pieces = self._take([] if self._thinking is None else self._thinking.finish())
        return pieces if self._calls is None else pieces + self._allowed(self._calls.finish())

    @property
    def ends_with_call(self) -> bool:
        """Whether there are calls, the last of which nothing has cut off so far."""
        return self.num_calls > 0 and self._calls is not None and not self._calls.is_inside

    def _take(self, parts: list[str | Reasoning]) -> list[Piece]:
        pieces: list[Piece] = []
        for part in parts:
            if isinstance(part, Reasoning):
                self.has_thought = True
                pieces += [part] if self._reading.shows_reasoning else []
            elif self._calls is not None:
                pieces += self._allowed(self._calls.push(part))
            elif part:
                pieces.append(part)
        return pieces

    def _allowed(self, pieces: list[str | ToolCall | Arguments]) -> list[Piece]:
        kept: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, ToolCall):
                self._is_left_out = self.num_calls == self._reading.max_calls
                self.num_calls += not self._is_left_out
            if isinstance(piece, str) or not self._is_left_out:
                kept.append(piece)
        return kept
