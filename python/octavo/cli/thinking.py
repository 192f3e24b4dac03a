"""What a model thinks before it answers: asking for it, and showing it apart from the answer.

The answer goes to stdout, what is thought to stderr, dim on a terminal: a file of answers holds
nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from octavo.cli.common import note, printable
from octavo.cli.options import option
from octavo.cli.wrap import AnswerWriter, dimmed
from octavo.errors import InvalidArgumentError
from octavo.sampling_params import SamplingParams
from octavo.server.reasoning import Reasoning, ReasoningParser, ReasoningTags, detect_reasoning
from octavo.structured_outputs import StructuredOutputs

if TYPE_CHECKING:
    from octavo.llm import LLM
    from octavo.prompts import EncodedPrompt
    from octavo.text.chat import ChatTemplate


@dataclass(frozen=True)
class Thinking:
    """Whether a model thinks before it answers, and whether that is shown."""

    think: Annotated[
        bool | None,
        option(
            "Think before the answer, or do not. For a model that can do both; left out: as its "
            "chat template has it.",
            "--think/--no-think",
        ),
    ] = None
    hide_thinking: Annotated[
        bool,
        option("Do not show what the model thinks.", "--hide-thinking", panel="Output"),
    ] = False


class Thinker:
    """A model's chat prompts, and its answers taken apart."""

    def __init__(self, llm: LLM, asked: Thinking) -> None:
        """InvalidArgumentError for thinking that the chat template has not, or cannot turn off."""
        template = llm.chat_template
        self.asked = asked
        self._llm = llm
        self._tags = None if template is None else detect_reasoning(template.source)
        if asked.think is None or (template is not None and _has_switch(template)):
            return
        if asked.think and self._tags is None:
            raise InvalidArgumentError(
                "thinking is asked for (--think), but this model has no chat template with a place "
                "for it: leave it out, or use a model that was trained to think"
            )
        if not asked.think and self._tags is not None:
            raise InvalidArgumentError(
                "thinking is turned off (--no-think), but this model's chat template has no "
                "enable_thinking to do so: leave it out. --hide-thinking does not show it"
            )

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> EncodedPrompt:
        """A conversation as a prompt. What was thought in earlier turns is their "reasoning".

        Templates know it as reasoning_content, and say which of it the model sees again.
        """
        named = [
            {**one, "reasoning_content": one["reasoning"]} if "reasoning" in one else one
            for one in messages
        ]
        wanted = self.asked.think
        prompt = self._llm.encode_chat(named, **({} if wanted is None else _switch(wanted)))
        tags, tokenizer = self._tags, self._llm.tokenizer
        if tags is None or tokenizer is None:
            return prompt
        ids = map(tokenizer.token_id, (tags.begin, tags.end))
        return replace(prompt, kept_special_ids={each for each in ids if each is not None})

    def steer(self, params: SamplingParams, prompt: EncodedPrompt) -> SamplingParams:
        """The same, with structured outputs that hold for what stands behind the thinking."""
        tags, wanted = self._tags_of(prompt), params.structured_outputs
        start = tags and tags.start(prompt.text)
        if tags is None or wanted is None or start == "behind":
            return params
        from octavo.server.structured import after_reasoning

        wanted = after_reasoning(StructuredOutputs.of(wanted), tags, start == "inside")
        return replace(params, structured_outputs=wanted)

    def shown(
        self, prompt: EncodedPrompt, writer: AnswerWriter, *, strip: bool = False
    ) -> ShownAnswer:
        """What shows an answer to a prompt; writer, strip: as of `ShownAnswer`."""
        return ShownAnswer(self._parser(prompt), self.asked.hide_thinking, writer, strip)

    def split(self, prompt: EncodedPrompt, text: str) -> tuple[str, str]:
        """What was thought in a whole answer, and the rest of it."""
        parser = self._parser(prompt)
        pieces = [text] if parser is None else [*parser.push(text), *parser.finish()]
        thoughts = [piece.text for piece in pieces if isinstance(piece, Reasoning)]
        return "".join(thoughts), "".join(piece for piece in pieces if isinstance(piece, str))

    def _parser(self, prompt: EncodedPrompt) -> ReasoningParser | None:
        tags = self._tags_of(prompt)
        return None if tags is None else ReasoningParser(tags, tags.start(prompt.text))

    def _tags_of(self, prompt: EncodedPrompt) -> ReasoningTags | None:
        return self._tags if prompt.is_chat else None


def _has_switch(template: ChatTemplate) -> bool:
    trial = [{"role": "user", "content": "x"}]
    return template.render(trial, **_switch(True)) != template.render(trial, **_switch(False))


def _switch(thinks: bool) -> dict[str, Any]:
    """What templates call it: Qwen3 and SmolLM3 the one, Granite and DeepSeek-V3.1 the other."""
    return {"enable_thinking": thinks, "thinking": thinks}


def cut_off(thought: str, text: str) -> str:
    """What to say of an answer that has reached its limit."""
    return "cut off within the thinking" if thought and not text else "cut off"


class ShownAnswer:
    """One answer as it comes. thought, text: what there is of it so far.

    parser: takes it apart; None: there is no thinking. hide: do not show what is thought. writer:
    of the answer itself. strip: leave out white space at its beginning.
    """

    def __init__(
        self,
        parser: ReasoningParser | None,
        hide: bool,
        writer: AnswerWriter,
        strip: bool,
    ) -> None:
        self.thought = self.text = ""
        self._parser, self._hide = parser, hide
        self._writer, self._strip = writer, strip
        self._thoughts: AnswerWriter | None = None  # while it thinks

    def write(self, text: str) -> None:
        """Show some more."""
        self._show([text] if self._parser is None else self._parser.push(text))

    def end(self) -> None:
        """Show what was held back, and end the line."""
        self._show([] if self._parser is None else self._parser.finish())
        self._end_thinking()
        self._writer.end()
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _show(self, pieces: Iterable[str | Reasoning]) -> None:
        for piece in pieces:
            if isinstance(piece, Reasoning):
                self._think(piece.text)
            elif piece := piece.lstrip() if self._strip and not self.text else piece:
                self._end_thinking()
                self.text += piece
                self._writer.write(printable(piece, sys.stdout))

    def _think(self, text: str) -> None:
        if self._thoughts is None:
            note("(thinking)")
            self._thoughts = AnswerWriter(sys.stderr)
        self.thought += text
        if not self._hide:
            with dimmed(sys.stderr):
                self._thoughts.write(printable(text, sys.stderr))

    def _end_thinking(self) -> None:
        if self._thoughts is not None and not self._hide:
            with dimmed(sys.stderr):
                self._thoughts.end()
                sys.stderr.write("\n")
            note("(done thinking)")
        self._thoughts = None
