"""Help that fits a screen, help that leaves nothing out, and what a shell completes."""

from __future__ import annotations

import inspect
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from octavo.cli import main
from octavo.cli.app import VERBS
from octavo.cli.help import SCREEN, with_common_options
from octavo.cli.options import grouped, option

WIDTH, HEIGHT = SCREEN


def commands() -> dict[str, Callable[..., Any]]:
    """What can be run, by its words: the verbs, and those that are verbs of a verb."""
    found = {}
    for verb in VERBS:
        loaded = verb.load()
        if isinstance(loaded, typer.Typer):
            for name, command in typer.main.get_command(loaded).commands.items():
                # What typer reads, and not what stands behind it, has the options of groups.
                found[f"{verb.name} {name}"] = inspect.unwrap(
                    command.callback, stop=lambda each: hasattr(each, "__signature__")
                )
        else:
            found[verb.name] = loaded
    return found


COMMANDS = commands()
GROUPS = {"", *(verb.name for verb in VERBS), *COMMANDS}


@pytest.fixture(autouse=True)
def screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("TERMINAL_WIDTH", str(WIDTH))


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main([*words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.split("\n")


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_the_common_options_fit_a_screen(name, capsys):
    for asked in ("--help", "-h"):
        lines = shown(capsys, *name.split(), asked)
        assert len(lines) <= HEIGHT and max(map(len, lines)) <= WIDTH
    assert lines[0].startswith(f"Usage: octavo {name}".rstrip())


@pytest.mark.parametrize("words", COMMANDS)
def test_help_all_shows_every_option(words, capsys, monkeypatch):
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 300)
    text = "\n".join(shown(capsys, *words.split(), "--help-all"))
    short = "\n".join(shown(capsys, *words.split(), "--help"))
    parameters = inspect.signature(COMMANDS[words], eval_str=True).parameters
    for name, parameter in parameters.items():
        if parameter.annotation is typer.Context:
            continue
        info = parameter.annotation.__metadata__[0]
        names = [
            word for word in (info.default, *(info.param_decls or ())) if isinstance(word, str)
        ]
        option = next((word for word in names if word.startswith("--")), f"--{name}")
        is_option = type(info).__name__ == "OptionInfo"
        for word in option.replace("_", "-").split("/") if is_option else [info.metavar]:
            assert word in text, name
            assert (word in short) or info.rich_help_panel, name
    assert "--help-all" in short


@pytest.mark.parametrize("width", [40, 55])
def test_help_on_a_narrow_terminal_cuts_no_word(width, capsys, monkeypatch):
    wide = set(" ".join(shown(capsys, "embed", "--help")).split())
    monkeypatch.setenv("COLUMNS", str(width))
    lines = shown(capsys, "embed", "--help")
    assert max(map(len, lines)) <= width
    assert set(" ".join(lines).split()) == wide


def test_help_all_shows_paragraphs_without_the_line_breaks_of_the_source(capsys):
    lines = [line.strip() for line in shown(capsys, "slurm", "render", "--help-all")]
    paragraph = lines[lines.index("Write a job for a cluster.") + 2 :]
    paragraph = paragraph[: paragraph.index("")]
    assert len(paragraph) > 3
    for line, after in itertools.pairwise(paragraph):  # the next word had no room
        assert len(f"{line} {after.split()[0]}") > WIDTH - 2


def test_a_verb_of_verbs_lists_them(capsys):
    for words in (["slurm"], ["slurm", "--help"]):
        lines = shown(capsys, *words)
        assert lines[0] == "Usage: octavo slurm COMMAND [--help]"
        named = [line.split()[0] for line in lines[lines.index("", 2) + 1 :] if line]
        assert named == ["render", "preflight", "work", "collect"]


def test_an_option_that_runs_past_the_screen_is_noticed(capsys, monkeypatch):
    """The mistake that the first test is for: one common option too many."""
    verb = next(verb for verb in VERBS if verb.name == "generate")
    for each in inspect.signature(verb.load(), eval_str=True).parameters.values():
        monkeypatch.setattr(each.annotation.__metadata__[0], "rich_help_panel", None)
    assert len(shown(capsys, "generate", "--help")) > HEIGHT


def completed(shell: str, line: str, capsys: pytest.CaptureFixture[str], **more: str) -> list[str]:
    """What `octavo` gives a shell for this line, the cursor at its end."""
    words = line.split(" ")
    environment = {"_OCTAVO_COMPLETE": f"complete_{shell}", **more}
    if shell == "bash":
        environment |= {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    else:
        environment |= {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        assert main([]) == 0
    return capsys.readouterr().out.split("\n")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of two models, and a folder with an adapter."""
    for name in ("smollm2-135m", "ada--tiny"):
        (tmp_path / "home" / "models" / name).mkdir(parents=True)
    (tmp_path / "here" / "pirate").mkdir(parents=True)
    (tmp_path / "here" / "pirate" / "adapter_config.json").touch()
    (tmp_path / "here" / "plain").mkdir()
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_verbs_options_models_and_adapters(shell, home, capsys):
    cases = {
        "octavo gen": "generate",
        "octavo generate --temp": "--temperature",
        "octavo generate hi -m ad": "ada/tiny",
        "octavo info smol": "smollm2-135m",
        "octavo generate hi --device cu": "cuda",
        "octavo chat ad": "ada/tiny",
        "octavo info -m smol": "smollm2-135m",
        "octavo chat --adapter pi": "pirate",
        "octavo serve --adapter x=pi": "x=pirate",
        "octavo bench se": "serve",
        "octavo slurm pre": "preflight",
        "octavo slurm render ev": "eval",
    }
    for line, expected in cases.items():
        found = "\n".join(completed(shell, line, capsys))
        assert expected in found, (line, found)
        assert "plain" not in found and "bench serve" not in found
    assert "generate" not in "\n".join(completed(shell, "octavo ch", capsys))


def test_a_broken_home_completes_nothing(capsys, monkeypatch):
    monkeypatch.setenv("OCTAVO_HOME", "/dev/null/no")
    assert completed("bash", "octavo info x", capsys) == ["", ""]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash: apt install bash")
def test_bash_itself_completes(home, tmp_path):
    """With the script that `octavo --show-completion` prints, in a real bash."""
    program = tmp_path / "bin" / "octavo"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m octavo "$@"\n')
    program.chmod(0o755)
    script = (
        'eval "$(_OCTAVO_COMPLETE=source_bash octavo)"\n'
        "COMP_WORDS=(octavo info smol); COMP_CWORD=2\n"
        '_octavo_completion octavo; echo "${COMPREPLY[@]}"\n'
    )
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PATH": path},
    )
    assert done.stdout == "smollm2-135m\n", done.stderr


@dataclass(frozen=True)
class Sides:
    left: Annotated[int, option("Left.")] = 1
    right: Annotated[list[str] | None, option("Right.")] = None


def test_grouped_options_become_an_object():
    def verb(first: Annotated[str, option("First.")], *, sides: Sides) -> tuple[str, Sides]:
        return first, sides

    made = with_common_options(grouped(verb))
    assert list(inspect.signature(made).parameters) == [
        *("first", "left", "right", "offline", "help_all")
    ]
    assert made(first="x", left=3, right=["y"]) == ("x", Sides(3, ["y"]))
