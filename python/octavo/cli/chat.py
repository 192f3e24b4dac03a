"""`octavo chat`: a conversation in the terminal, or over a pipe, a line a turn."""

from __future__ import annotations

import contextlib
import re
import sys
from typing import TYPE_CHECKING, Annotated

from octavo.cli import common
from octavo.cli.options import (
    AdapterOption,
    ModelOption,
    SystemOption,
    engine_options,
    option,
    sampling_options,
)
from octavo.cli.streams import silent_keys
from octavo.cli.wrap import AnswerWriter
from octavo.config import EngineConfig
from octavo.errors import InvalidArgumentError, OctavoError, TokenizerError
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from octavo.engine.outputs import RequestOutput
    from octavo.llm import LLM
    from octavo.prompts import EncodedPrompt

_HELP = """\
  /system TEXT   how the model should behave; begins anew
  /reset         forget the conversation (the system message stays)
  /help          this list
  /exit          leave (so does Ctrl-D)
  Enter          send; what is pasted stays together, and can be edited first
  Alt-Enter      begin another line (so does a backslash at the end of a line, then Enter)
  Ctrl-C         stop the answer, or drop what is typed; leave if nothing is
A line that begins with a space is sent as it is, even with a / behind it."""


@engine_options()
@sampling_options(without=("n",), max_tokens=1024, temperature=0.6, top_p=0.9)
def chat(
    *,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    system: SystemOption = None,
    config: EngineConfig,
    params: SamplingParams,
    quiet: Annotated[bool, option("Leave out the line about speed.", "--quiet", "-q")] = False,
) -> int:
    """Talk with a model in the terminal.

    It remembers the conversation. Enter sends; Alt-Enter, or a backslash before Enter, begins another line, and what is pasted stays together. Ctrl-C stops an answer, Ctrl-D or /exit leaves.

    [bold]octavo chat[/bold]

    [bold]octavo chat --system "You answer in rhymes." --temperature 0.9[/bold]

    [bold]octavo chat < questions.txt[/bold]  takes each line as a turn
    """  # noqa: E501  (typer takes a line break for one)
    interactive = sys.stdin.isatty()
    with _line_reader(interactive) as read_line:
        llm = common.load_llm(model, config, {adapter: adapter} if adapter else None)
        if llm.chat_template is None:
            raise TokenizerError(
                "this model has no chat template (it is a base model, which only continues a "
                "text): use `octavo generate --raw`, or a model that was trained to chat"
            )
        if interactive:
            common.note(
                f"{model or 'smollm2-135m'} · remembers {llm.max_model_len:,} tokens · "
                "Alt-Enter begins another line, a pasted text stays together · "
                "/help lists commands, Ctrl-D leaves"
            )
        quiet = quiet or not interactive
        conversation = Conversation(llm, params, system, adapter, quiet=quiet)
        return conversation.run(read_line)


class Conversation:
    """The turns so far, and the loop that adds to them."""

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        system: str | None,
        adapter: str | None = None,
        *,
        quiet: bool = False,
    ) -> None:
        self.llm = llm
        self.params = params
        self.system = system
        self.adapter = adapter
        self.turns: list[dict[str, str]] = []  # user and assistant by turns, user first
        self.failed = False
        self._quiet = quiet

    def run(self, read_line: Callable[[], str | None]) -> int:
        """Until /exit or the end of the input; returns the exit code."""
        while True:
            line = read_line()
            if line is None or line.strip() in ("/exit", "/quit"):
                return common.FAILED if self.failed else 0
            if line.strip() and not self._command(line):
                self._turn(line.strip())

    def _command(self, line: str) -> bool:
        """Carry out a command; False if the line is not one."""
        found = re.fullmatch(r"/([a-z]*)(?:\s+(.*))?", line.rstrip(), flags=re.DOTALL)
        if found is None:
            return False
        name, rest = found[1], (found[2] or "").strip()
        if name == "reset":
            self.turns.clear()
            common.note("(the conversation is forgotten)")
        elif name == "system":
            self.system = rest or None
            self.turns.clear()
            change = "set" if rest else "the model's own again"
            common.note(f"(system message {change}; the conversation begins anew)")
        elif name == "help":
            common.note(_HELP)
        else:
            common.note(f"(there is no command /{name}; /help lists them)")
        return True

    def _turn(self, text: str) -> None:
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
        else:
            self.turns.append({"role": "assistant", "content": answer})

    def _fit(self) -> EncodedPrompt:
        """The conversation as a prompt, without its oldest turns where it is too long."""
        limit = self.llm.max_model_len
        # Room for the answer; a quarter of a small context is enough.
        room = min(self.params.max_tokens or limit, limit // 4)
        dropped = 0
        prompt = self._encode()
        while len(prompt.token_ids) > limit - room and len(self.turns) > 1:
            del self.turns[:2]
            dropped += 1
            prompt = self._encode()
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

    def _encode(self) -> EncodedPrompt:
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.llm.encode_chat([*first, *self.turns])

    def _answer(self, prompt: EncodedPrompt) -> str | None:
        """Stream one answer; Ctrl-C keeps what there is. None if the model failed."""
        pieces: list[str] = []
        writer = AnswerWriter(sys.stdout)
        result: RequestOutput | None = None
        stopped = False
        try:
            for chunk in self.llm.stream(prompt, self.params, adapter=self.adapter):
                # Some templates end so that every answer begins with a space.
                text = chunk.text if pieces else chunk.text.lstrip()
                if text:
                    pieces.append(text)
                    writer.write(common.printable(text, sys.stdout))
                result = chunk.result or result
        except KeyboardInterrupt:
            stopped = True
        writer.end()
        sys.stdout.write("\n")
        sys.stdout.flush()
        if stopped:
            common.note("(stopped)")
        elif result is not None and result.error is not None:
            common.print_error(result.error)
            self.failed = True
            return None
        elif result is not None:
            self._remark(result)
        return "".join(pieces).strip()

    def _remark(self, result: RequestOutput) -> None:
        if result.outputs[0].finish_reason == "length":
            common.note("(cut off: --max-tokens, or the end of the context, is reached)")
        if not self._quiet:
            common.note(common.speed_line(result.metrics))


@contextlib.contextmanager
def _line_reader(interactive: bool) -> Iterator[Callable[[], str | None]]:
    """A function that gives the next message, None at the end of the input."""
    from rich.console import Console

    screen = Console(file=sys.stdout if sys.stdout.isatty() else sys.stderr)
    if not interactive:
        yield _read_line
    elif screen.is_dumb_terminal or not screen.is_terminal:
        # No terminal that a line could be edited on: read whole lines.
        yield _read_prompted_line
    else:
        from octavo.cli.line_editor import LineEditor

        with silent_keys(), LineEditor() as editor:
            yield editor.read


def _read_prompted_line() -> str | None:
    sys.stderr.write("> ")
    sys.stderr.flush()
    return _read_line()


def _read_line() -> str | None:
    line = sys.stdin.buffer.readline().decode("utf-8", errors="replace")
    return line.rstrip("\r\n") if line else None
