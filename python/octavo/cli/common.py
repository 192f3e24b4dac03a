"""What the commands share: messages, the prompt, and loading a model."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from octavo.cli.streams import silent_keys
from octavo.errors import InvalidArgumentError
from octavo.progress import Bar, Unit, stderr_console

if TYPE_CHECKING:
    from rich.console import Console

    from octavo.config import EngineConfig
    from octavo.engine.outputs import RequestMetrics
    from octavo.llm import LLM

FAILED = 1  # exit code: it ran, and not everything went well
MISTAKE = 2  # exit code: the user can put it right
INTERRUPTED = 130  # exit code: Ctrl-C, as shells have it


def print_error(message: str) -> None:
    """`error: …` on stderr, in red where the terminal has colours."""
    from rich.text import Text

    with suppress(OSError):  # `app.run` reports it at the end
        sys.stdout.flush()
    console, start = stderr_console(), "error: "
    rest = _fit(start + message, console).removeprefix(start)
    console.print(Text.assemble((start, "bold red"), rest))


def note(message: str) -> None:
    """A dim line on stderr."""
    console = stderr_console()
    console.print(_fit(message, console), style="dim")


def _fit(message: str, console: Console) -> str:
    """The message with lines broken between words on a terminal; paths stay whole."""
    if not console.is_terminal:
        return message
    lines = []
    for line in message.split("\n"):
        columns = re.match(r" +\S+(?: \S+)* {2,}", line)  # of a list of commands
        lines.append(
            textwrap.fill(
                line,
                console.width,
                subsequent_indent=" " * len(columns[0]) if columns else "",
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
    return "\n".join(lines)


def read_prompt(argument: str) -> str:
    """The prompt itself, or all of standard input for "-"."""
    if argument != "-":
        text = decoded(argument)
    else:
        if sys.stdin.isatty():
            note("Type the prompt, then Ctrl-D:")
        text = sys.stdin.buffer.read().decode("utf-8", errors="replace")
    if not text.strip():
        raise InvalidArgumentError("the prompt is empty; expected some text")
    return text


def decoded(argument: str) -> str:
    """An argument's text. Python passes bytes that the locale cannot decode as surrogates."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", errors="replace")


@contextmanager
def progress_bar(unit: Unit = "percent", **options: Any) -> Iterator[Bar]:
    """A `Bar`; keys that are typed meanwhile are not shown, but kept for the next read."""
    with silent_keys(), Bar(unit, **options) as bar:
        yield bar


def load_llm(
    model: str | None,
    config: EngineConfig,
    adapters: Mapping[str, str | Path] | None = None,
    *,
    quiet: bool = False,
    needs: Literal["texts", "vectors"] | None = "texts",
) -> LLM:
    """The model in memory, with a bar on a terminal; fetches smollm2-135m where it is missing.

    adapters: LoRA adapters, name -> folder. quiet: no bar, and no notes about the weights.
    needs: a model without a tokenizer is a TokenizerError, and one that does not make these an
    InvalidArgumentError, before the weights are read. None: any model.
    """
    from octavo.config import read_environment
    from octavo.llm import LLM
    from octavo.text.tokenizer import Tokenizer, holds_tokenizer
    from octavo.weights.hub import DEFAULT_MODEL, resolve_model
    from octavo.weights.model_files import read_model
    from octavo.weights.pooling import refuse_embeddings, refuse_texts

    files = read_model(resolve_model(model, read_environment()))
    if needs is not None:
        (refuse_embeddings if needs == "texts" else refuse_texts)(files, config.runner)
        if not holds_tokenizer(files.folder):
            Tokenizer(files.folder)  # its error has the commands that make one
    stage = f"loading {Path(model or DEFAULT_MODEL).name}"
    with progress_bar("bytes", quiet=quiet) as bar:
        on_load = partial(bar.update, stage)
        llm = LLM(files, config=config, on_load=on_load, adapters=adapters)
    for line in () if quiet else llm.notes:
        note(line)
    return llm


def named_adapters(given: Sequence[str] | None, taken: Sequence[str]) -> dict[str, Path]:
    """From --adapter NAME=PATH, given any number of times: name -> folder.

    taken: names of the model, which no adapter may have. Raises InvalidArgumentError.
    """
    found: dict[str, Path] = {}
    for entry in given or ():
        name, _, path = entry.partition("=")
        if not name or not path or name in found or name in taken:
            raise InvalidArgumentError(
                f"--adapter is {entry!r}; expected NAME=PATH with a name of its own (not that of "
                "the model)"
            )
        found[name] = Path(path)
    return found


def printable(text: str, stream: IO[str]) -> str:
    """Text for a terminal with its control characters made visible; unchanged for a pipe.

    A model may draw an escape sequence; it must not move the cursor or rename the window.
    """
    return text.translate(_VISIBLE) if stream.isatty() else text


# Control characters but for tab and newline, as the pictures that Unicode has for them.
_VISIBLE = {
    **{code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)},
    **dict.fromkeys(range(0x7F, 0xA0), 0xFFFD),
}


def speed_line(metrics: RequestMetrics) -> str:
    """The line at the end of a generation."""
    parts = [count(metrics.num_prompt_tokens, "prompt token")]
    if metrics.time_to_first_token is not None:
        parts.append(f"first token after {metrics.time_to_first_token:.2f} s")
    tokens = count(metrics.num_output_tokens, "token")
    speed = metrics.tokens_per_second
    parts.append(tokens if speed is None else f"{tokens} at {speed:.1f} tokens/s")
    return " · ".join(parts)


def count(number: int, what: str) -> str:
    """ "1 token", "2 tokens"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
