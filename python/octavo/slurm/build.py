"""octavo, built once for each type of node and each state of its sources.

Array tasks begin together and on several nodes: the first builds, the others wait. A lock file with
a heartbeat serves, since file systems of clusters often have no locks of their own: a folder that
its maker has not touched for two minutes is nobody's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from octavo.errors import InvalidArgumentError, OctavoError
from octavo.files import writing
from octavo.slurm.node import NodeInfo

Run = Callable[[Sequence[str], Path], int]  # a command and its log -> its exit code
_BEAT, _STALE = 20.0, 120.0  # seconds
_STAMP = "octavo-build.json"
_FOLDERS = ("csrc", "cmake", "python", "reference")
_BUILT = {".so", ".pyc"}  # what lies among the sources without being one

_TRIED = """
import sys
sys.path.insert(0, sys.argv[1])
from octavo import _native
if not _native.__file__.startswith(sys.argv[1]):
    sys.exit(f"octavo is imported from {_native.__file__}, not from the build: an editable install "
             "comes first. Expected an environment made with `pip install .`")
"""


def sources_hash(source: Path) -> str:
    """12 hexadecimal digits of everything that a build is made of.

    Raises InvalidArgumentError for a folder that is no checkout of octavo.
    """
    if not (source / "CMakeLists.txt").is_file() or not (source / "csrc").is_dir():
        raise InvalidArgumentError(
            f"{source} is no checkout of octavo (it has no CMakeLists.txt and csrc/); put the "
            "right folder under `source:` in the cluster's file"
        )
    digest = hashlib.sha256()
    files = [path for name in _FOLDERS for path in (source / name).rglob("*")]
    files = [path for path in files if path.is_file() and path.suffix not in _BUILT]
    for path in sorted([source / "CMakeLists.txt", source / "pyproject.toml", *files]):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(source)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def build_folder(source: Path, builds: Path, node: NodeInfo) -> Path:
    """Where the build for a type of node lies, or would lie."""
    python = f"py{sys.version_info[0]}{sys.version_info[1]}"
    return builds / f"{sources_hash(source)}-{node.type}-{python}"


def build_for_node(source: Path, builds: Path, node: NodeInfo, run: Run) -> Path:
    """The folder to put before others in PYTHONPATH; built where it is not there yet.

    Raises OctavoError where the build fails; its log is named.
    """
    target = build_folder(source, builds, node)
    with writing(builds, "builds"):
        builds.mkdir(parents=True, exist_ok=True)
    if (target / _STAMP).is_file():
        return target
    with locked(target.with_suffix(".lock")):
        if not (target / _STAMP).is_file():
            _build(source, target, node, run)
    return target


def _build(source: Path, target: Path, node: NodeInfo, run: Run) -> None:
    partial, log = target.with_suffix(".partial"), target.with_suffix(".log")
    shutil.rmtree(partial, ignore_errors=True)
    objects = target.with_suffix(".objects")
    started = time.monotonic()
    for command in _commands(source, partial, objects, node):
        if run(command, log) != 0:
            lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
            raise OctavoError(
                f"octavo could not be built for {node.type}; {log} says why, at its end:\n  "
                + "\n  ".join(lines[-5:])
            )
    shutil.rmtree(objects, ignore_errors=True)
    seconds = time.monotonic() - started
    stamp = {"sources": sources_hash(source), "node": node.type, "seconds": round(seconds, 1)}
    (partial / _STAMP).write_text(json.dumps(stamp) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)


def _commands(source: Path, partial: Path, objects: Path, node: NodeInfo) -> Iterator[list[str]]:
    """What builds into a folder, and then what tries the result."""
    cuda = "ON" if node.gpu else "OFF"
    settings = [f"build-dir={objects}", f"cmake.define.OCTAVO_CUDA={cuda}"]
    if node.gpu is not None:
        architecture = node.gpu.capability.replace(".", "") + "-real"
        settings.append(f"cmake.define.CMAKE_CUDA_ARCHITECTURES={architecture}")
    offline = ("--no-index", "--no-deps", "--no-build-isolation")
    yield [
        *(sys.executable, "-m", "pip", "install", *offline),
        *("--target", str(partial), str(source)),
        *(f"--config-settings={setting}" for setting in settings),
    ]
    yield [sys.executable, "-c", _TRIED, str(partial)]


@contextmanager
def locked(
    lock: Path,
    *,
    beat: float = _BEAT,
    stale: float = _STALE,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> Iterator[None]:
    """Hold a lock that other nodes see; wait while another holds it. beat, stale: seconds."""
    told = False
    while True:
        try:
            lock.mkdir()
            break
        except FileExistsError:
            with suppress(FileNotFoundError):
                if time.time() - lock.stat().st_mtime > stale:
                    say(f"{lock} has not been touched for {stale:.0f} s: its holder is gone")
                    lock.rmdir()
                    continue
            if not told:
                say(f"another job builds; waiting for {lock}")
                told = True
            time.sleep(min(beat, 2.0))
    done = threading.Event()

    def touch() -> None:
        while not done.wait(beat):
            with suppress(OSError):
                os.utime(lock)

    heart = threading.Thread(target=touch, daemon=True)
    heart.start()
    try:
        yield
    finally:
        done.set()
        heart.join()
        with suppress(OSError):
            lock.rmdir()
