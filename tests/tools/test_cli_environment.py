"""Every command where something around it is amiss: files, standard streams, home, disk, locale.

A new command, and a new option that takes a path, must be entered in SAMPLES and PATHS below; then
all of these tests are about it too.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import os
import pwd
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from adapter_helpers import random_adapter, write_adapter
from quantization_helpers import CONFIG, write_float_model
from stream_helpers import Streams
from text_helpers import CHATML_TEMPLATE, byte_level_directory, tiny_model

from octavo.cli import main
from octavo.cli.app import VERBS
from octavo.config import EngineConfig, read_environment
from octavo.errors import InvalidArgumentError
from octavo.progress import Bar, LogLines

REPOSITORY = Path(__file__).parents[2]
DUMMY = ["-m", "{model}", "--load-format", "dummy"]
SAMPLES = {  # by command: words that make it succeed
    "generate": ["hi", *DUMMY, "-n", "2"],
    "chat": [*DUMMY, "-n", "2"],
    "serve": ["{model}", "--load-format", "dummy", "--port", "0"],
    "batch": ["{input_file}", "{output_file}", *DUMMY, "-n", "2"],
    "slurm": ["render", "eval", "-c", "{cluster}"],
    "pull": ["smollm2-135m"],
    "list": [],
    "remove": ["old"],
    "info": ["{model}"],
    "plan": ["{model}", "-c", "64"],
    "quantize": ["{float_model}", "{out}", "--scheme", "int4"],
    "merge": ["{float_model}", "{adapter}", "{out}"],
    "diff": ["{model}", "--load-format", "dummy", "--random", "4", "--steps", "1"],
    "bench": ["{model}", "--load-format", "dummy", "-p", "8", "-n", "2", "-r", "1"],
    "bench serve": ["http://127.0.0.1:9"],  # nobody listens there
    "bench spec": [
        *("{model}", "--load-format", "dummy", "--acceptance", "0.5", "-n", "4", "-r", "1"),
        *("--max-model-len", "200"),
    ],
    "eval": ["{model}", "--load-format", "dummy", "--max-windows", "1"],
    "report": ["{results}"],
    "explain": ["--log", "{log}"],
    "trace": ["{log}", "--perfetto", "{perfetto}"],
    "replay": ["{log}", "--fixed", "1", "--per-token", "1", "--per-attended", "0"],
}
READ, WRITTEN, FOLDER, READ_FOLDER = "read", "written", "a new folder", "a folder that is read"
INTO = "a folder that is written into"
PATHS = {  # (command, parameter): what becomes of the path
    ("generate", "json_schema"): READ,
    ("generate", "grammar"): READ,
    ("generate", "event_log"): WRITTEN,
    ("serve", "event_log"): WRITTEN,
    ("batch", "input_file"): READ,
    ("batch", "output_file"): WRITTEN,
    ("batch", "event_log"): WRITTEN,
    ("pull", "local_file"): READ,
    ("quantize", "out"): FOLDER,
    ("quantize", "text"): READ,
    ("quantize", "calibrate"): READ,
    ("merge", "adapter"): READ_FOLDER,
    ("merge", "out"): FOLDER,
    ("diff", "adapter"): READ_FOLDER,
    ("diff", "html"): WRITTEN,
    ("bench serve", "dataset"): READ,
    ("bench serve", "json_file"): WRITTEN,
    ("bench serve", "plot_file"): WRITTEN,
    ("eval", "text"): READ,
    ("report", "results"): READ,
    ("report", "output"): WRITTEN,
    ("report", "png"): INTO,
    ("report", "svg"): INTO,
    ("explain", "log"): READ,
    ("trace", "log"): READ,
    ("trace", "perfetto"): WRITTEN,
    ("replay", "log"): READ,
    ("replay", "event_log"): WRITTEN,
}
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
CASES = [
    (verb, name, wrong)
    for (verb, name), use in PATHS.items()
    for wrong in AMISS[use]
    if (verb, wrong) not in UNTRIED
]
WITHOUT_ANSWER = ("batch", "pull", "trace", "serve")  # nothing of theirs goes to standard output
OF_THE_CACHE = ("pull", "list", "remove")
RUNS = [verb.name for verb in VERBS if verb.name not in ("serve", "bench serve")]


class Place(NamedTuple):
    """A folder with everything that the samples need."""

    folder: Path
    files: dict[str, str]

    def command(self, verb: str, **changed: str) -> list[str]:
        """The words of a sample; new names for what it writes."""
        number = len(list(self.folder.iterdir()))
        if verb == "remove":
            (self.folder / "home" / "models" / "old").mkdir(exist_ok=True)
        files = {name: str(self.folder / f"{number}-{name}") for _, name in PATHS}
        files |= self.files | changed
        return [*verb.split(), *(word.format(**files) for word in SAMPLES[verb])]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    model = tiny_model(folder / "model")
    float_model = write_float_model(folder / "float")
    byte_level_directory(float_model, chat_template=CHATML_TEMPLATE)
    pulled = folder / "home" / "models" / "smollm2-135m"
    shutil.copytree(model, pulled)
    (pulled / "octavo.json").write_text('{"source": "smollm2-135m"}')
    (folder / "in.txt").write_text("fox\ndog\n")
    log, adapter = folder / "log.jsonl", folder / "adapter"
    write_adapter(adapter, random_adapter(CONFIG))
    files = {
        "adapter": adapter,
        "model": model,
        "float_model": float_model,
        "input_file": folder / "in.txt",
        "cluster": REPOSITORY / "slurm" / "clusters" / "generic-cpu.yaml",
        "results": next((REPOSITORY / "benchmarks" / "results").glob("eval-*.json")),
    }
    made = Place(folder, {name: str(path) for name, path in {**files, "log": log}.items()})
    assert main([*made.command("batch"), "--event-log", str(log)]) == 0
    return made


@pytest.fixture(autouse=True)
def home(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_HOME", str(place.folder / "home"))
    # What the machine can do takes `octavo bench` five seconds to measure.
    monkeypatch.setattr("octavo.bench.benchmark.measure_peak", lambda *_: None)


def path_parameters(verb: Any) -> dict[str, tuple[str | None, Any]]:
    """Parameters of a command that are paths: the option's name (None for an argument)."""
    found = {}
    if isinstance(verb.load(), typer.Typer):
        return {}  # it has verbs of its own, whose tests are apart (test_slurm_*.py)
    for name, hint in typing.get_type_hints(verb.load(), include_extras=True).items():
        kind, *extras = typing.get_args(hint) or (hint,)
        if Path not in (kind, *typing.get_args(kind)):
            continue
        info = extras[0]
        is_option = type(info).__name__ == "OptionInfo"
        # typer takes the first of an option's names for its default, until it makes the command.
        names = [
            word for word in (info.default, *(info.param_decls or ())) if isinstance(word, str)
        ]
        option = next((word for word in names if word.startswith("--")), f"--{name}")
        option = option.replace("_", "-")
        found[name] = (option if is_option else None, info)
    return found


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
            [sys.executable, "-m", "octavo.cli", *words], capture_output=True, text=True, timeout=60
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
    command = ["sh", "-c", f'exec "$0" -m octavo.cli "$@" {redirection}', sys.executable]
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
