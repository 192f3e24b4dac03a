"""Every command where something around it is amiss: standard streams, home, disk, locale."""

from __future__ import annotations

import io
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stream_helpers import Streams

from octavo.cli import main
from octavo.cli.app import VERBS
from octavo.config import read_environment
from octavo.errors import InvalidArgumentError
from octavo.progress import Bar, LogLines

pytestmark = pytest.mark.usefixtures("home")
WITHOUT_ANSWER = ("batch", "pull", "trace", "serve")  # nothing of theirs goes to standard output
OF_THE_CACHE = ("pull", "list", "remove")
RUNS = [verb.name for verb in VERBS if verb.name not in ("serve", "bench serve")]


@pytest.fixture
def streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Streams:
    return Streams(tmp_path, monkeypatch)


@pytest.mark.parametrize("verb", RUNS)
def test_standard_output_on_a_full_disk(verb, place, streams):
    code, _, err = streams.run(place.command(verb), out="/dev/full")
    if verb in WITHOUT_ANSWER:
        assert code == 0
    else:
        assert code == 2
        assert "standard output cannot be written (No space left on device)" in err


@pytest.mark.parametrize("verb", RUNS)
def test_closed_standard_input_and_a_standard_error_that_nobody_takes(verb, place, streams):
    for err in (None, "/dev/full"):
        assert streams.run(place.command(verb), given=None, err=err)[0] == 0


@pytest.mark.parametrize("verb", RUNS)
def test_a_terminal_of_twenty_columns_that_knows_nothing_but_ascii(
    verb, place, streams, monkeypatch
):
    for name, value in {"TERM": "dumb", "COLUMNS": "20", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    code, out, err = streams.run(place.command(verb), given="Grüße 人\n", encoding="ascii")
    assert code == 0
    assert "\x1b" not in out + err


def test_streams_that_are_closed(place, streams):
    code, _, err = streams.run(place.command("info"), out=None)
    assert code == 2 and "standard output cannot be written" in err
    words = place.command("generate")
    assert streams.run(words, given=None, out=None, err=None)[0] == 2
    code, _, err = streams.run(["generate", "-", *words[2:]], given=None)
    assert code == 2 and "the prompt is empty" in err


def octavo(arguments: list[str], redirection: str, **options: Any) -> subprocess.CompletedProcess:
    """A process of its own: Python's start and its end are part of what is tried."""
    command = ["sh", "-c", f'exec "$0" -m octavo "$@" {redirection}', sys.executable]
    return subprocess.run(
        [*command, *arguments], stderr=subprocess.PIPE, text=True, timeout=120, **options
    )


def test_processes_with_closed_and_full_streams(place):
    done = octavo(place.command("info"), ">/dev/full")
    assert done.returncode == 2 and done.stderr.count("\n") == 1  # nothing of Python's own
    files = place.command("batch")
    assert octavo(files, "<&- >&- 2>&-").returncode == 0
    assert len(Path(files[2]).read_text().splitlines()) == 2  # no stream took the file's number
    poor = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    poor |= {"PYTHONCOERCECLOCALE": "0"}
    given = "Grüße 人\n"
    done = octavo(place.command("chat"), ">/dev/null", input=given, env={**os.environ, **poor})
    assert done.returncode == 0 and "Traceback" not in done.stderr


@pytest.mark.parametrize("columns", ["0", "00", "x"])
def test_a_width_that_is_none_hides_nothing(columns, place):
    done = octavo(["info", "nosuch"], ">/dev/null", env={**os.environ, "COLUMNS": columns})
    assert done.returncode == 2 and "error: 'nosuch' is neither" in done.stderr


@pytest.mark.parametrize("verb", ["info", "generate"])
def test_a_reader_that_has_gone_ends_it_quietly(verb, place):
    read, write = os.pipe()
    os.close(read)
    gone = octavo(place.command(verb), "", stdout=write)
    os.close(write)
    assert gone.returncode == 1
    assert "error" not in gone.stderr and "Exception" not in gone.stderr


@pytest.mark.parametrize("verb", [verb for verb in RUNS if verb != "remove"])
def test_nothing_is_written_but_what_was_asked_for(verb, place, tmp_path, monkeypatch):
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"fox\n")))
    folders = (tmp_path, place.folder / "home", place.folder / "model")
    before = [sorted(folder.rglob("*")) for folder in folders]
    words = place.command(verb)
    assert main(words) == 0
    assert [sorted(folder.rglob("*")) for folder in folders] == before


def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with --user 12345: no HOME, and no entry in the password file."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "OCTAVO_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.parametrize("verb", [verb for verb in RUNS if verb not in OF_THE_CACHE])
def test_a_user_without_a_home(verb, place, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"fox\n")))
    no_home(monkeypatch)
    assert main(place.command(verb)) == 0


@pytest.mark.parametrize("words", [["pull", "smollm2-135m"], ["info"], ["info", "~nobody/x"]])
def test_what_a_user_without_a_home_is_told(words, monkeypatch, capsys):
    no_home(monkeypatch)
    assert main(words) == 2
    assert "set OCTAVO_HOME" in capsys.readouterr().err or words[-1] == "~nobody/x"


def test_homes_of_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert read_environment({}).models == Path("/home/ada/.cache/octavo/models")
    assert read_environment({"XDG_CACHE_HOME": "/c"}).models == Path("/c/octavo/models")
    no_home(monkeypatch)
    assert read_environment({"OCTAVO_HOME": "/c"}).models == Path("/c/models")
    with pytest.raises(InvalidArgumentError, match="set OCTAVO_HOME"):
        _ = read_environment({}).models


@pytest.mark.parametrize("name", ["~nobody/x", "x" * 300, "a/" * 30 + "b", "\udcff", "no\0such"])
@pytest.mark.parametrize("verb", ["generate", "info", "quantize", "diff", "bench", "eval"])
def test_names_that_are_no_model(verb, name, place, capsys):
    assert main(place.command(verb, model=name, float_model=name)) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_model_that_is_forbidden(place, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != Path(place.files["model"]))
    assert main(place.command("info")) == 2
    assert "may not be read by this user; expected a model directory" in capsys.readouterr().err


def test_long_work_says_something_in_a_log(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("octavo.progress.time.monotonic", lambda: now[0])
    with Bar("percent") as bar, Bar("bytes", keep=True) as pull:
        pull.start("Downloading", 4_000_000)
        for done in range(1, 5):
            now[0] += 16
            bar.update("evaluating", done, 8)
            pull.advance(1_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "evaluating: 25 %, about 1 min 36 s left",
        "Downloading: 2 of 4 MB, about 32 s left",
        "evaluating: 50 %, about 1 min 04 s left",
        "Downloading: 4 of 4 MB",
    ]
    with Bar("percent", quiet=True) as bar:
        now[0] += 100
        bar.update("evaluating", 1, 8)
    assert capsys.readouterr().err == ""
    assert LogLines.SECONDS == 30
