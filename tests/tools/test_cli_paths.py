"""Every command with paths where nothing is, where something else is, or where nothing may be.

Also what the commands have in common: each is entered in command_helpers.py, with its paths, and
its options of the engine have the engine's defaults.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_helpers import (
    FOLDER,
    INTO,
    PATHS,
    READ,
    READ_FOLDER,
    SAMPLES,
    WRITTEN,
    path_parameters,
)

from octavo.cli import main
from octavo.cli.app import VERBS
from octavo.config import EngineConfig

# What must be said beside the path for it to be looked at.
NEEDS = {
    ("pull", "local_file"): ["--force"],
    ("quantize", "text"): ["--sensitivity", "--max-windows", "1"],
    ("quantize", "calibrate"): ["--window", "8"],
}
AMISS = {
    READ: ["missing", "a folder", "below a file", "forbidden", "empty", "binary", "long name"],
    WRITTEN: ["a missing folder", "a folder", "below a file", "forbidden", "full", "long name"],
    FOLDER: ["a missing folder", "a folder", "below a file", "long name"],
    INTO: ["below a file", "long name"],
    READ_FOLDER: ["missing", "below a file", "empty", "long name"],
}
# Lines of a batch that are no text are answered or refused one by one. What is written with
# write_text is tried on a full disk by test_files.py.
UNTRIED = {("batch", "binary"), ("bench serve", "full"), ("diff", "full"), ("trace", "full")}
pytestmark = pytest.mark.usefixtures("home")
CASES = [
    (verb, name, wrong)
    for (verb, name), use in PATHS.items()
    for wrong in AMISS[use]
    if (verb, wrong) not in UNTRIED
]


def test_every_command_and_every_path_is_entered_above():
    assert list(SAMPLES) == [verb.name for verb in VERBS]
    assert [key for verb in VERBS for key in ((verb.name, p) for p in path_parameters(verb))] == [
        *PATHS
    ]
    for verb in VERBS:
        for name, (_, info) in path_parameters(verb).items():
            # octavo's own message says what is expected, and what to do.
            assert not info.readable and info.file_okay and info.dir_okay, (verb.name, name)
        assert "Path" not in str(inspect.signature(verb.load()).return_annotation)


# Where a command means something else by leaving an option of the engine out.
OWN_DEFAULTS = {
    "generate": {"seed": None},  # of sampling
    "chat": {"seed": None},
    "serve": {"max_waiting_requests": 512},
    "diff": {"dtype": "f32", "device": "cpu"},
    "bench serve": {"seed": None},  # of its prompts: new ones each time
    "replay": dict.fromkeys(  # as the log says
        (
            "max_num_seqs",
            "max_num_batched_tokens",
            "enable_prefix_caching",
            "priority_ageing_seconds",
        )
    ),
}


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_options_of_the_engine_have_its_defaults(verb: Any) -> None:
    engine = {field.name: field.default for field in dataclasses.fields(EngineConfig)}
    engine |= OWN_DEFAULTS.get(verb.name, {})
    for name, parameter in inspect.signature(verb.load()).parameters.items():
        assert parameter.default == engine.get(name, parameter.default), name


def wrong_path(wrong: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = folder / wrong.replace(" ", "-")
    if wrong in ("missing", "a missing folder"):
        return folder / "no" / "such"
    if wrong == "below a file":
        (folder / "file").touch()
        return folder / "file" / "x"
    if wrong == "long name":
        return folder / ("x" * 300)
    if wrong == "full":
        return Path("/dev/full")
    if wrong == "a folder":
        path.mkdir()
    if wrong == "empty":
        path.touch()
    if wrong == "binary":
        path.write_bytes(bytes(range(256)))
    if wrong == "forbidden":
        path.write_text("x\n")
        path.chmod(0)
        if os.geteuid() == 0:  # who may do everything
            forbid(path, monkeypatch)
    return path


def forbid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let opening this one file fail, as it does for those who are not root."""
    true_open, true_access = io.open, os.access

    def refuse(file: Any, *arguments: Any, **options: Any) -> Any:
        if file == path or file == str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return true_open(file, *arguments, **options)

    monkeypatch.setattr("io.open", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("os.access", lambda file, mode: file != path and true_access(file, mode))


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full, as Linux has")
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_wrong_path_is_one_clear_error(case, place, tmp_path, monkeypatch, capsys):
    verb, name, wrong = case
    path = wrong_path(wrong, tmp_path, monkeypatch)
    option, _ = path_parameters(next(v for v in VERBS if v.name == verb))[name]
    words = place.command(verb, **{name: str(path)})
    if str(path) not in words:
        words += [str(option), str(path), *NEEDS.get((verb, name), [])]
    if verb == "serve" and wrong == "full":  # found when the model is loaded, in its own process
        done = subprocess.run(
            [sys.executable, "-m", "octavo", *words], capture_output=True, text=True, timeout=60
        )
        code, out, err = done.returncode, done.stdout, done.stderr.splitlines()[-1]
    else:
        code = main(words)
        out, err = capsys.readouterr()
    assert code == 2, err
    assert out == "" or (verb, wrong) == ("generate", "full")  # the answer was there before
    message = err[err.index("error: ") :]
    assert message.count("error: ") == 1 and "\n" not in message.strip()
    assert "Errno" not in err and "Traceback" not in err
    place_named = tmp_path / "no" if (name, wrong) == ("out", "a missing folder") else path
    if wrong not in ("empty", "binary"):
        assert str(place_named) in message or str(path.parent) in message
    assert any(word in message for word in ("expected", "make it", "name another", "name a "))


def test_a_pipe_is_read_where_once_is_enough(place, capsys):
    log = Path(place.files["log"])
    for verb, name in (("explain", "log"), ("replay", "log"), ("batch", "input_file")):
        read, write = os.pipe()
        os.write(write, log.read_bytes())
        os.close(write)
        code = main(place.command(verb, **{name: f"/dev/fd/{read}"}))
        os.close(read)
        assert code == (2 if verb == "batch" else 0)
    assert "is a pipe or a device; expected a plain file" in capsys.readouterr().err
