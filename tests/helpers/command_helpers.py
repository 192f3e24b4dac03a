"""A working example of every command, and a folder with all that the examples need.

A new command, and a new option that takes a path, must be entered in SAMPLES and PATHS below; then
the tests of test_cli_environment.py and test_cli_paths.py are about it too.
"""

from __future__ import annotations

import shutil
import typing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from adapter_helpers import random_adapter, write_adapter
from quantization_helpers import CONFIG, write_float_model
from text_helpers import CHATML_TEMPLATE, byte_level_directory, tiny_model

from octavo.cli import main

REPOSITORY = Path(__file__).parents[2]
DUMMY = ["-m", "{model}", "--load-format", "dummy"]
SAMPLES = {  # by command: words that make it succeed
    "generate": ["hi", *DUMMY, "-n", "2"],
    "chat": [*DUMMY, "-n", "2"],
    "serve": ["{model}", "--load-format", "dummy", "--port", "0"],
    "batch": ["{input_file}", "{output_file}", *DUMMY, "-n", "2"],
    "embed": ["-i", "{input_file}", *DUMMY, "--runner", "pooling"],
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
    ("embed", "input_file"): READ,
    ("embed", "output"): WRITTEN,
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

    def enter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let its cache be octavo's, for one test."""
        monkeypatch.setenv("OCTAVO_HOME", str(self.folder / "home"))
        # What the machine can do takes `octavo bench` five seconds to measure.
        monkeypatch.setattr("octavo.bench.benchmark.measure_peak", lambda *_: None)


def make_place(folder: Path) -> Place:
    """Fill the folder: models, an adapter, a batch's input, its event log, a cache."""
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
