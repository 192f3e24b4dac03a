"""The table of verbs, and how a command line ends: exit codes and error messages."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import typer

from octavo.cli import streams
from octavo.cli.common import FAILED, INTERRUPTED, MISTAKE, print_error
from octavo.cli.completion import asked_words
from octavo.cli.help import ScreenCommand, ScreenGroup, with_common_options
from octavo.errors import InsufficientMemoryError, OctavoError


class Verb(NamedTuple):
    """A command of one word or two.

    Its module, by default of the same name, has a function of this name (an underscore for the
    space), annotated for typer.
    """

    name: str
    summary: str
    panel: str
    module: str = ""

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        name = self.name.replace(" ", "_")
        function: Callable[..., Any] = getattr(
            importlib.import_module(f"octavo.cli.{self.module or name}"), name
        )
        return function


_RUN, _MODELS, _MEASURE, _SCHEDULING = "Run", "Models", "Measure", "Explain"

# In the order of `octavo --help`. The summaries stand here so that help need not import the verbs;
# each fits beside its name in 80 columns.
VERBS = (
    Verb("generate", "Answer one prompt, or continue a text.", _RUN),
    Verb("chat", "Talk with a model in the terminal.", _RUN),
    Verb("serve", "Serve a model over HTTP, with OpenAI's API.", _RUN),
    Verb("batch", "Answer a file of prompts; can be stopped and resumed.", _RUN),
    Verb("embed", "Make vectors of texts, with an embedding model.", _RUN),
    Verb("slurm", "Write, check and collect jobs for a cluster with Slurm.", _RUN),
    Verb("pull", "Fetch a model, or convert a GGUF file, into the cache.", _MODELS),
    Verb("list", "Show the models in the cache.", _MODELS, "models"),
    Verb("remove", "Delete a model from the cache.", _MODELS, "models"),
    Verb("info", "Show what a model is, and whether it fits in memory.", _MODELS),
    Verb("plan", "Tell what a model needs on a GPU, and how fast it is.", _MODELS),
    Verb("quantize", "Write a model with its weights in 8 or 4 bits.", _MODELS),
    Verb("merge", "Write a model with a LoRA adapter in its weights.", _MODELS),
    Verb("diff", "Compare with Hugging Face, or with the NumPy reference.", _MODELS),
    Verb("bench", "Measure speed beside the machine's limits.", _MEASURE),
    Verb("bench serve", "Measure a server under load.", _MEASURE),
    Verb("bench spec", "Measure what drafts save.", _MEASURE),
    Verb("eval", "Measure perplexity, and what a number format costs.", _MEASURE),
    Verb("report", "Show results as tables, or as a page with plots.", _MEASURE),
    Verb("explain", "Tell where a request's time went.", _SCHEDULING, "event_log"),
    Verb("trace", "Draw an event log, for ui.perfetto.dev.", _SCHEDULING, "event_log"),
    Verb("replay", "Try a log's requests on a simulated device.", _SCHEDULING, "event_log"),
)

_EPILOG = """Start here:  [bold]octavo generate "What is the capital of France?"[/bold]

Each command explains itself:  [bold]octavo generate --help[/bold]

Tab completes commands, options and models after  [bold]octavo --install-completion[/bold]"""


def run(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; every expected failure becomes one message on stderr and an exit code."""
    if arguments is None:
        streams.make_usable()
        streams.keep_interrupts()
        arguments = sys.argv[1:]
    code = _run(list(arguments))
    lost = streams.output_error()
    if lost is None:
        return code
    streams.forget_output()
    if isinstance(lost, BrokenPipeError):
        return FAILED  # the reader has gone (`octavo … | head`): no message
    print_error(
        f"standard output cannot be written ({lost.strerror or lost}), and what was meant for it "
        "is lost; expected a terminal, a pipe, or a file on a disk with room"
    )
    return MISTAKE


def _run(arguments: list[str]) -> int:
    """The exit code, after a message where one is due; standard output is not flushed yet."""
    try:
        words = asked_words(os.environ)
        app = build_app(arguments if words is None else words)
        result = app(arguments or ["--help"], "octavo", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else MISTAKE
    except InsufficientMemoryError as error:
        print_error(error.message(partial(_as_options, arguments)))
        return MISTAKE
    except OctavoError as error:
        print_error(str(error))
        return MISTAKE
    except MemoryError as error:  # of a small allocation
        print_error(f"there is too little memory ({error}): use a smaller model, or free memory")
        return MISTAKE
    except OSError as error:
        if streams.output_error() is None:  # else `run` reports it
            file = "" if error.filename is None else f"{error.filename}: "
            print_error(f"{file}{error.strerror or error}")
        return MISTAKE
    except Exception as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # Python 3.11 wraps it within imports
            return INTERRUPTED
        message = _usage_message(error)
        if message is None:
            raise  # a defect of octavo: a bug report needs the traceback
        print_error(message)
        return MISTAKE


def build_app(arguments: Sequence[str]) -> typer.Typer:
    """The application with the wanted verb loaded and the others as names with a summary.

    Only the verb that runs is imported, with what it needs.
    """
    app = typer.Typer(
        cls=_Octavo,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(epilog=_EPILOG)(with_common_options(_octavo))
    words = [word for word in arguments if not word.startswith("-")][:2]
    for verb in VERBS:
        if " " in verb.name and verb.name == " ".join(words):
            # `bench serve` beside `bench`, which would take "serve" for its argument.
            group = typer.Typer()
            group.callback()(_bench)
            group.command(words[1], cls=ScreenCommand)(with_common_options(verb.load()))
            app.add_typer(group, name=words[0])
            return app
    for verb in VERBS:
        if words[:1] == [verb.name]:
            loaded = verb.load()
            if isinstance(loaded, typer.Typer):  # a verb with verbs of its own
                app.add_typer(loaded, name=verb.name, rich_help_panel=verb.panel)
                continue
            command = app.command(verb.name, cls=ScreenCommand, rich_help_panel=verb.panel)
            command(with_common_options(loaded))
        else:
            app.command(verb.name, help=verb.summary, rich_help_panel=verb.panel)(_not_loaded)
    return app


class _Octavo(ScreenGroup):
    verbs = VERBS


def _as_options(arguments: Sequence[str], remedy: Mapping[str, object]) -> str | None:
    """{"kv_dtype": "int8"} -> "--kv-dtype int8"; None if the verb has no such option."""
    words = [word for word in arguments if not word.startswith("-")]
    verb = next(verb for verb in VERBS if words[:1] == [verb.name])
    if not remedy.keys() <= inspect.signature(verb.load()).parameters.keys():
        return None
    return " ".join(_as_option("--" + name.replace("_", "-"), remedy[name]) for name in remedy)


def _as_option(option: str, value: object) -> str:
    return f"{option} {value}" if value not in (None, False) else f"no {option}"


def _not_loaded() -> None:
    """Stands for a verb in the help; it never runs."""


def _bench() -> None:
    """Measure speed."""


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"octavo {version('octavo')}")
        raise typer.Exit()


def _octavo(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Run language models, and check that the answers are right."""


def _usage_message(error: Exception) -> str | None:
    """The message of a mistake on the command line; None for any other exception.

    Recognized by its method: typer brings its own copy of click or uses the installed one.
    """
    format_message: Callable[[], Any] | None = getattr(error, "format_message", None)
    if format_message is None:
        return None
    message = _wrong_value(error) or str(format_message()).strip().replace("\n", " ")
    context: Any = getattr(error, "ctx", None)
    path = getattr(context, "command_path", None)
    if message.startswith("Got unexpected extra argument") and any(
        "-m" in param.opts and not param.hidden for param in context.command.params
    ):
        message += "; name the model with -m MODEL, and put a text with spaces in quotes"
    return f"{message} (see `{path} --help`)" if path else message


def _wrong_value(error: Exception) -> str | None:
    """The message about a value that typer could not convert: its own does not name the value.

    typer converts with pydantic, whose error stands behind its own; None for all other errors.
    """
    found: Callable[[], Any] | None = getattr(error.__cause__, "errors", None)
    names = getattr(getattr(error, "param", None), "opts", ())
    expected = found and re.search(r"should be ([^,]+)", found()[0]["msg"])
    if found is None or not names or not expected:
        return None
    return f"{max(names, key=len)} is {found()[0]['input']!r}; expected {expected[1]}"
