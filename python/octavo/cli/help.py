"""Help that fits a screen: `--help` shows a command's common options, `--help-all` every one.

An option is common if it has no panel (see `options.option`). The others are grouped by their
panels and stand in `--help-all`, which is typer's own help.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import ArgumentInfo

from octavo.errors import InvalidArgumentError

if TYPE_CHECKING:
    from rich.console import RenderableType

Command = Callable[..., Any]

SCREEN = (80, 24)  # columns and lines into which `--help` fits; the tests hold it
_MOST_EXAMPLES = 3
_WIDEST_METAVAR = 14  # columns
_NARROWEST = 24  # columns for what a name means, and the blanks before


class ScreenCommand(TyperCommand):
    """A command whose `--help` shows its first paragraph, its examples and its common options."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help into click's formatter."""
        params = [param for param in self.get_params(ctx) if not getattr(param, "hidden", False)]
        arguments = [param for param in params if param.param_type_name == "argument"]
        options = [param for param in params if param.param_type_name == "option"]
        common = [option for option in options if not getattr(option, "rich_help_panel", None)]
        name = ctx.command_path
        rows = [(_argument_name(argument), _first_sentence(argument)) for argument in arguments]
        rows += [(_option_names(option), _first_sentence(option)) for option in common]
        usage = [*map(_argument_usage, arguments), "[OPTIONS]"]
        usage.sort(key=lambda word: word.startswith("[--"))  # what is behind -- comes last
        lines = [" ".join([f"Usage: {name}", *usage]), "", *_introduction(self.help), ""]
        last = []
        if len(common) < len(options):
            last = ["", f"All {len(options)} options: {name} --help-all"]
        formatter.write(_rendered(*lines, _table(rows), *last))


class ScreenGroup(TyperGroup):
    """The program itself: `--help` shows its verbs, a line for each."""

    verbs: Sequence[Any] = ()  # of app.VERBS

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help into click's formatter."""
        from rich.table import Table

        table = Table.grid(padding=(0, 2, 0, 0))
        panel = ""
        for verb in self.verbs:
            table.add_row("" if verb.panel == panel else verb.panel, verb.name, verb.summary)
            panel = verb.panel
        table.columns[1].style = "bold cyan"
        example = 'octavo generate "Why is the sky blue?"'
        usage = f"Usage: octavo COMMAND [--help], as in: {example}"
        formatter.write(_rendered(usage, table))  # which fill the screen

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """The verbs of one word: a shell asks for one word at a time."""
        return [item for item in super().shell_complete(ctx, incomplete) if " " not in item.value]


class ScreenVerbs(TyperGroup):
    """A verb with verbs of its own: `--help` shows examples, and a line for each of them."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help into click's formatter."""
        usage = f"Usage: {ctx.command_path} COMMAND [--help]"
        rows = [
            (name, _introduction(each.help)[0].removesuffix("."))
            for name, each in self.commands.items()
        ]
        formatter.write(_rendered(usage, "", *_introduction(self.help), "", _table(rows)))


def screen_command(verbs: typer.Typer) -> Callable[[Command], Command]:
    """Decorator: the function is one of these verbs, with help that fits a screen."""

    def add(function: Command) -> Command:
        verbs.command(cls=ScreenCommand)(with_common_options(function))
        return function

    return add


def _flag(name: str, callback: Callable[..., None], help: str, **details: Any) -> Any:
    """The annotation of an option whose callback does all that it is for."""
    details |= {"callback": callback, "help": help, "is_eager": True, "expose_value": False}
    return Annotated[bool, typer.Option(name, **details)]


def with_common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a verb with the options that all of them have: --offline and --help-all.

    A model that it takes as an argument may also be named with -m, and the other way round.
    """
    panel = "Network"
    offline = "Ask nothing of the Hugging Face Hub (HF_HUB_OFFLINE=1)."
    everything = "Show every option, with its whole explanation."
    added = {
        "offline": _flag("--offline", _go_offline, offline, rich_help_panel=panel),
        "help_all": _flag("--help-all", _show_all, everything),
    }
    signature = inspect.signature(function, eval_str=True)
    other_way = _other_way(signature.parameters)

    @functools.wraps(function)
    def command(*arguments: Any, model_too: str | None = None, **given: Any) -> Any:
        kept = {name: value for name, value in given.items() if name not in added}
        if model_too is not None:
            if kept["model"] is not None:
                raise InvalidArgumentError(
                    f"the model is named twice, {kept['model']} and {model_too}; expected one of "
                    "them, as -m MODEL or without -m"
                )
            kept["model"] = model_too
        return function(*arguments, **kept)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        *signature.parameters.values(),
        *(
            inspect.Parameter(name, keyword, annotation=kind, default=False)
            for name, kind in added.items()
        ),
    ]
    if other_way is not None:
        parameters.append(
            inspect.Parameter("model_too", keyword, annotation=other_way, default=None)
        )
    # These two are what typer reads.
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def _other_way(parameters: Mapping[str, inspect.Parameter]) -> Any:
    """The annotation of another way to name a command's model, which no help shows.

    It is -m where the model is an argument, and an argument where it is -m and there is no other
    argument. None where a model must be named, or there is none.
    """
    model = parameters.get("model")
    if model is None or model.default is not None:
        return None
    infos = [info for each in parameters.values() for info in get_args(each.annotation)[1:]]
    info = get_args(model.annotation)[1]
    details = {"hidden": True, "metavar": "MODEL", "autocompletion": info.autocompletion}
    if isinstance(info, ArgumentInfo):
        return Annotated[str | None, typer.Option("--model", "-m", **details)]
    if "-m" in info.param_decls and not any(isinstance(each, ArgumentInfo) for each in infos):
        return Annotated[str | None, typer.Argument(**details)]
    return None


def _go_offline(asked: bool) -> None:
    if asked:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _show_all(ctx: typer.Context, asked: bool) -> None:
    if asked:
        command: Any = ctx.command
        kind = TyperGroup if isinstance(command, TyperGroup) else TyperCommand
        command.help = "\n\n".join(" ".join(part.split()) for part in _paragraphs(command.help))
        kind.format_help(command, ctx, ctx.make_formatter())
        raise typer.Exit()


def _paragraphs(help: str | None) -> list[str]:
    return inspect.cleandoc(help or "").split("\n\n")


def _introduction(help: str | None) -> list[str]:
    """The first paragraph of a docstring, and its examples."""
    first, *others = _paragraphs(help)
    examples = [text for text in others if text.startswith("[bold]")][:_MOST_EXAMPLES]
    return [" ".join(first.split()), *("  " + _plain(example) for example in examples)]


def _argument_name(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _argument_usage(argument: Any) -> str:
    return _argument_name(argument) if argument.required else f"[{_argument_name(argument)}]"


def _option_names(option: Any) -> str:
    """As in "-m, --model NAME"; long names stand under each other."""
    names = sorted([*option.opts, *option.secondary_opts], key=lambda name: name.startswith("--"))
    text = ", ".join(names)
    if not names[0].startswith("--"):
        text = f"{names[0]}, {'/'.join(names[1:])}"
    else:
        text = "    " + "/".join(names)
    return text if option.is_flag else f"{text} {_short(option.metavar or 'VALUE')}"


def _short(metavar: str) -> str:
    """The first of many words to choose from."""
    if len(metavar) <= _WIDEST_METAVAR:
        return metavar
    return metavar[: metavar.rindex("|", 0, _WIDEST_METAVAR) + 1] + "…"


def _first_sentence(param: Any) -> str:
    """What stands of its explanation on one line, with its default."""
    sentence = re.split(r"(?<=\.)\s", param.help or "", maxsplit=1)[0].removesuffix(".")
    default = getattr(param, "default", None)
    if isinstance(default, bool) or not isinstance(default, (int, float, str)) or default == "":
        return sentence
    return f"{sentence} [{default}]"


def _plain(text: str) -> str:
    """Without the marks for bold."""
    return " ".join(re.sub(r"\[/?bold\]", "", text).split())


def _table(rows: Sequence[tuple[str, str]]) -> RenderableType:
    """Names and what they mean side by side, or where that is too narrow, one below the other."""
    from rich.console import Console, Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    if Console().width < max(len(name) for name, _ in rows) + _NARROWEST:
        pairs = ((Text(name, "cyan"), Padding(Text(text), (0, 0, 0, 8))) for name, text in rows)
        return Group(*(part for pair in pairs for part in pair))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    return table


def _rendered(*lines: RenderableType) -> str:
    """Text for the terminal, in colour where it has any."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        for line in lines:
            console.print(line)
    return captured.get()
