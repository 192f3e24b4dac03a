"""What the verbs share: options with their help texts, messages, and loading a model."""

from __future__ import annotations

import re
import secrets
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.terminal import silent_keys
from octavo.errors import InvalidArgumentError

if TYPE_CHECKING:
    from rich.console import Console

    from octavo.engine.outputs import RequestMetrics
    from octavo.llm import LLM

FAILED = 1  # exit code: it ran, and not everything went well
MISTAKE = 2  # exit code: the user can put it right
INTERRUPTED = 130  # exit code: Ctrl-C, as shells have it

_MODEL_PANEL, _SAMPLING_PANEL, _STOP_PANEL = "Model", "How to choose words", "Where to stop"

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Name of a pulled model (smollm2-135m), ORG/NAME, a folder with a Hugging Face "
        "model, or a GGUF file. Left out: smollm2-135m, fetched on first use.",
        show_default=False,
        rich_help_panel=_MODEL_PANEL,
    ),
]
DTypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Number format of the weights: f32 (exact, slower), bf16 (half the memory), f16 (GPUs "
        "only), or auto: on the CPU bf16 for a bf16 model, else f32; on a GPU f16 for an f16 "
        "model, else bf16.",
        metavar="auto|f32|bf16|f16",
        rich_help_panel=_MODEL_PANEL,
    ),
]
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        help="Round the weights while loading: int8 (half the memory of bf16, next to no loss), "
        "w8a8 (activations too: faster, more loss), int4 (about a third, with some loss) or "
        "int4-nonuniform (half of int4's loss).",
        metavar="int8|w8a8|int4|int4-nonuniform",
        show_default=False,
        rich_help_panel=_MODEL_PANEL,
    ),
]
KeepEmbeddingOption = Annotated[
    bool,
    typer.Option(
        "--keep-embedding",
        help="Of a quantized model, keep embedding and head in --dtype instead of int8.",
        rich_help_panel=_MODEL_PANEL,
    ),
]
KVDTypeOption = Annotated[
    str,
    typer.Option(
        "--kv-dtype",
        help="Number format of the KV cache, the memory of the conversation: f32, bf16, f16 (GPUs "
        "only), int8 (a little over half of bf16), or auto: as the weights' --dtype.",
        metavar="auto|f32|bf16|f16|int8",
        rich_help_panel=_MODEL_PANEL,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        help="Where to compute. auto takes a GPU if there is one.",
        metavar="auto|cpu|cuda",
        rich_help_panel=_MODEL_PANEL,
    ),
]
DeterministicOption = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="On a GPU, compute so that an answer's bits do not depend on what else is computed "
        "with it. On the CPU they never do.",
        rich_help_panel=_MODEL_PANEL,
    ),
]
EnforceEagerOption = Annotated[
    bool,
    typer.Option(
        "--enforce-eager",
        help="On a GPU, launch each kernel by itself instead of replaying recorded steps (CUDA "
        "graphs): slower, easier to debug.",
        rich_help_panel=_MODEL_PANEL,
    ),
]
MaxModelLenOption = Annotated[
    int | None,
    typer.Option(
        "--max-model-len",
        help="Longest prompt and answer together, in tokens. Left out: the model's own limit. "
        "A smaller one needs less memory.",
        show_default=False,
        rich_help_panel=_MODEL_PANEL,
    ),
]
NumThreadsOption = Annotated[
    int,
    typer.Option(
        "--num-threads",
        help="CPU threads. 0: OCTAVO_NUM_THREADS, else one for each physical core.",
        rich_help_panel=_MODEL_PANEL,
    ),
]
LoadFormatOption = Annotated[
    str,
    typer.Option(
        "--load-format",
        help="auto reads the weights; dummy makes random ones from config.json alone, to measure "
        "speed (the text is nonsense).",
        metavar="auto|dummy",
        rich_help_panel=_MODEL_PANEL,
    ),
]
TopKOption = Annotated[
    int,
    typer.Option(
        "--top-k",
        help="Choose among the k most probable tokens only. 0: among all.",
        rich_help_panel=_SAMPLING_PANEL,
    ),
]
MinPOption = Annotated[
    float,
    typer.Option(
        "--min-p",
        help="Leave out tokens less probable than this part of the best one's probability. 0: off.",
        rich_help_panel=_SAMPLING_PANEL,
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed",
        help="A number that makes random choices repeatable: same seed, same text.",
        show_default=False,
        rich_help_panel=_SAMPLING_PANEL,
    ),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        help="End the answer before this text. May be given several times.",
        show_default=False,
        rich_help_panel=_STOP_PANEL,
    ),
]
SystemOption = Annotated[
    str | None,
    typer.Option(
        "--system",
        help='System message: how the model should behave, as in "You are a pirate."',
        show_default=False,
    ),
]
EventLogOption = Annotated[
    Path | None,
    typer.Option(
        "--event-log",
        help="Write every decision of the scheduler to this file, for `octavo explain`, `trace` "
        "and `replay`.",
        metavar="FILE",
        readable=False,  # read_log, check_writable and the like say more of what is wrong
        show_default=False,
    ),
]


def temperature_option(default_meaning: str) -> Any:
    """--temperature; the verbs have different defaults."""
    return typer.Option(
        "--temperature",
        "-t",
        help="0 always takes the most probable token; around 1 is varied, above 1.5 wild. "
        + default_meaning,
        rich_help_panel=_SAMPLING_PANEL,
    )


def top_p_option() -> Any:
    """--top-p; the verbs have different defaults."""
    return typer.Option(
        "--top-p",
        help="Choose among the most probable tokens that together reach this probability. 1: "
        "among all.",
        rich_help_panel=_SAMPLING_PANEL,
    )


def max_tokens_option(help_text: str = "Longest answer, in tokens (a word is one or two).") -> Any:
    """--max-tokens; the verbs have different defaults."""
    return typer.Option("--max-tokens", "-n", help=help_text, rich_help_panel=_STOP_PANEL)


def stderr_console() -> Console:
    """For everything that is not the answer itself: stdout stays clean for pipes."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_error(message: str) -> None:
    """`error: …` on stderr, in red where the terminal has colours."""
    from rich.text import Text

    with suppress(OSError):  # what has become of standard output is told at the end
        sys.stdout.flush()
    console, start = stderr_console(), "error: "
    rest = _fit(start + message, console).removeprefix(start)
    console.print(Text.assemble((start, "bold red"), rest))


def note(message: str) -> None:
    """A dim line on stderr."""
    console = stderr_console()
    console.print(_fit(message, console), style="dim")


def _fit(message: str, console: Console) -> str:
    """On a terminal broken between words; a path stays whole, to be copied."""
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
        # Bytes that the locale could not decode came as surrogates; here they are UTF-8's.
        text = argument.encode("utf-8", "surrogateescape").decode("utf-8", errors="replace")
    else:
        if sys.stdin.isatty():
            note("Type the prompt, then Ctrl-D:")
        text = sys.stdin.buffer.read().decode("utf-8", errors="replace")
    if not text.strip():
        raise InvalidArgumentError("the prompt is empty; expected some text")
    return text


def load_llm(model: str | None, **options: Any) -> LLM:
    """The model in memory, with a bar on a terminal; fetches smollm2-135m where it is missing.

    options: fields of EngineConfig.
    """
    from octavo.config import EngineConfig, read_environment
    from octavo.llm import LLM
    from octavo.weights.hub import resolve_model

    config = EngineConfig(**options)  # a wrong option is told of before anything is fetched
    with silent_keys():
        path = resolve_model(model, read_environment())
        with _loading_bar(path.name) as on_load:
            return LLM(path, config=config, on_load=on_load)


@contextmanager
def _loading_bar(name: str) -> Iterator[Any]:
    """A callback of (bytes done, bytes in all): a bar that vanishes at the end, or LogLines."""
    console = stderr_console()
    if not console.is_terminal:
        from octavo.weights.progress import log_bytes

        yield log_bytes(console.print, f"loading {name}")
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"loading {name}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def random_seed() -> int:
    """A seed for whoever names none: random, and short enough to be typed again."""
    return secrets.randbelow(10**9)


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
    parts = [_count(metrics.num_prompt_tokens, "prompt token")]
    if metrics.time_to_first_token is not None:
        parts.append(f"first token after {metrics.time_to_first_token:.2f} s")
    tokens = _count(metrics.num_output_tokens, "token")
    speed = metrics.tokens_per_second
    parts.append(tokens if speed is None else f"{tokens} at {speed:.1f} tokens/s")
    return " · ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
