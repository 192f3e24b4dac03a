"""The conversation of `octavo chat`: its turns, how they fit the context, and one answer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from octavo.cli import chat_commands, common
from octavo.cli.thinking import ShownAnswer, Thinker, Thinking, cut_off
from octavo.cli.wrap import AnswerWriter
from octavo.errors import InvalidArgumentError, OctavoError
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo.engine.outputs import RequestOutput
    from octavo.llm import LLM
    from octavo.prompts import EncodedPrompt


class Conversation:
    """The turns so far, and the loop that adds to them."""

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        system: str | None,
        adapter: str | None = None,
        *,
        model: str = "",
        thinking: Thinking | None = None,
        quiet: bool = False,
    ) -> None:
        """model: its name, for files of `/save`. InvalidArgumentError as of `Thinker`."""
        self.llm = llm
        self.think(thinking or Thinking())
        self.params = params
        self.system = system
        self.adapter = adapter
        self.model = model
        self.turns: list[dict[str, str]] = []  # user and assistant by turns, user first
        self.failed = False
        self._quiet = quiet

    def run(self, read_message: Callable[[], str | None]) -> int:
        """Until /exit or the end of the input; returns the exit code."""
        while True:
            line = read_message()
            if line is None or line.strip() in ("/exit", "/quit"):
                return common.FAILED if self.failed else 0
            if not line.strip():
                continue
            try:
                is_command = chat_commands.carry_out(self, line)
            except (OctavoError, OSError) as error:
                common.print_error(str(error))
            else:
                if not is_command:
                    self.turn(line.strip())

    def think(self, asked: Thinking) -> None:
        """From now on so. InvalidArgumentError as of `Thinker`."""
        self.thinker = Thinker(self.llm, asked)

    def turn(self, text: str) -> bool:
        """Ask, show the answer as it comes, remember both. A failed turn is not remembered."""
        self.turns.append({"role": "user", "content": text})
        try:
            answer = self._answer(self._fit())
        except OctavoError as error:
            common.print_error(str(error))
            self.failed = True
            answer = None
        except KeyboardInterrupt:  # before the answer began
            common.note("(stopped)")
            answer = None
        if answer is None:
            self.turns.pop()
            return False
        self.turns.append(answer)
        return True

    def retry(self) -> None:
        """Ask the last question again, with the next seed."""
        if not self.turns:
            raise InvalidArgumentError("nothing was asked yet; expected a question before /retry")
        if self.params.temperature == 0:
            common.note("(temperature is 0: the same answer comes; /set temperature 0.8 varies it)")
        elif self.params.seed is not None:
            self.params = replace(self.params, seed=(self.params.seed + 1) % 2**64)
        last = self.turns[-2:]
        del self.turns[-2:]
        if not self.turn(last[0]["content"]):
            self.turns += last

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns, after the system message if there is one."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *self.turns]

    def _fit(self) -> EncodedPrompt:
        """The conversation as a prompt, without its oldest turns where it is too long."""
        limit = self.llm.max_model_len
        # Room for the answer; a quarter of a small context is enough.
        room = min(self.params.max_tokens or limit, limit // 4)
        dropped = 0
        prompt = self.thinker.encode(self.messages)
        while len(prompt.token_ids) > limit - room and len(self.turns) > 1:
            del self.turns[:2]
            dropped += 1
            prompt = self.thinker.encode(self.messages)
        if dropped:
            common.note(
                f"(dropped from memory: the oldest {dropped} turn{'s' if dropped > 1 else ''}; "
                f"the model sees {limit:,} tokens)"
            )
        if len(prompt.token_ids) >= limit:
            raise InvalidArgumentError(
                f"the message has {len(prompt.token_ids):,} tokens with its frame; expected fewer "
                f"than the model's context of {limit:,}: shorten it"
            )
        return prompt

    def _answer(self, prompt: EncodedPrompt) -> dict[str, str] | None:
        """Stream one answer; Ctrl-C keeps what there is. None if the model failed."""
        # Some templates end so that every answer begins with a space.
        answer = self.thinker.shown(prompt, AnswerWriter(sys.stdout), strip=True)
        result: RequestOutput | None = None
        stopped = False
        try:
            for chunk in self.llm.stream(prompt, self.params, adapter=self.adapter):
                answer.write(chunk.text)
                result = chunk.result or result
        except KeyboardInterrupt:
            stopped = True
        answer.end()
        if stopped:
            common.note("(stopped)")
        elif result is not None and result.error is not None:
            common.print_error(result.error)
            self.failed = True
            return None
        elif result is not None:
            self._remark(result, answer)
        thought = {"reasoning": answer.thought} if answer.thought else {}
        return {"role": "assistant", "content": answer.text.strip(), **thought}

    def _remark(self, result: RequestOutput, answer: ShownAnswer) -> None:
        if result.outputs[0].finish_reason == "length":
            where = cut_off(answer.thought, answer.text)
            common.note(f"({where}: --max-tokens, or the end of the context, is reached)")
        if not self._quiet:
            common.note(common.speed_line(result.metrics))
