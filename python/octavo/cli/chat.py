"""`octavo chat`: a conversation in the terminal, or over a pipe, a line a turn."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli import common
from octavo.cli.conversation import Conversation
from octavo.cli.options import (
    AdapterOption,
    ModelOption,
    SystemOption,
    engine_options,
    grouped,
    option,
)
from octavo.cli.sampling_options import sampling_options
from octavo.cli.streams import silent_keys
from octavo.cli.thinking import Thinking
from octavo.config import EngineConfig, read_environment
from octavo.errors import TokenizerError
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_QUOTES = '"""'


@engine_options("runner")
@sampling_options(without=("n",), max_tokens=1024, temperature=0.6, top_p=0.9)
@grouped
def chat(
    *,
    context: typer.Context,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    system: SystemOption = None,
    thinking: Thinking,
    config: EngineConfig,
    params: SamplingParams,
    quiet: Annotated[bool, option("Leave out the line about speed.", "--quiet", "-q")] = False,
) -> int:
    """Talk with a model in the terminal.

    It remembers the conversation. Enter sends; Alt-Enter, or a backslash before Enter, begins
    another line, and what is pasted stays together. Ctrl-C stops an answer, Ctrl-D or /exit leaves.

    [bold]octavo chat[/bold]

    [bold]octavo chat --system "You answer in rhymes." --temperature 0.9[/bold]

    [bold]octavo chat < questions.txt[/bold]   # each line is a turn
    """
    from octavo.weights.hub import DEFAULT_MODEL

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
                f"{model or DEFAULT_MODEL} · remembers {llm.max_model_len:,} tokens · "
                "Alt-Enter begins another line, a pasted text stays together · "
                "/help lists commands, Ctrl-D leaves"
            )
        params = _as_recommended(params, context, model)
        name, quiet = model or DEFAULT_MODEL, quiet or not interactive
        conversation = Conversation(
            llm, params, system, adapter, model=name, thinking=thinking, quiet=quiet
        )
        return conversation.run(partial(read_message, read_line))


def _as_recommended(
    params: SamplingParams, context: typer.Context, model: str | None
) -> SamplingParams:
    """With what the model's authors recommend in place of the options that were left out."""
    from octavo.server.options import read_defaults
    from octavo.weights.hub import resolve_model

    recommended = read_defaults(resolve_model(model, read_environment()))
    taken: dict[str, Any] = {
        name: value for name, value in recommended.items() if _is_left_out(context, name)
    }
    return replace(params, **taken)


def _is_left_out(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is None or source.name == "DEFAULT"


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


def read_message(read_line: Callable[[], str | None]) -> str | None:
    """The next message, of several lines where a line ends with a backslash or begins with \"\"\".

    A message between two marks of three quotes comes with a space before it: it is no command.
    None at the end of the input.
    """
    line = read_line()
    if line is None:
        return None
    if "\n" not in line and line.lstrip().startswith(_QUOTES):  # a pasted text is whole
        line = line.lstrip().removeprefix(_QUOTES)
        while not line.rstrip().endswith(_QUOTES):
            if (more := read_line()) is None:
                break
            line += "\n" + more
        return " " + line.rstrip().removesuffix(_QUOTES).strip("\n")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + (read_line() or "")
    return line
