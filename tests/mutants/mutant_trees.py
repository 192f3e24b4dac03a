"""Copies of the working tree to plant mistakes in, and what each file of tests calls in them."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "mutants"
# Other people's packages and live models; `make test` does not run them either.
TESTS_LEFT_OUT = ("tests/hf/", "tests/clients/", "tests/slurm/")

Item = TypeVar("Item")
Result = TypeVar("Result")


class TestFile(NamedTuple):
    """One file of tests, as it ran without a mistake."""

    path: str
    seconds: float
    tests: dict[str, float]  # each with its seconds
    # "path:first line" of a function, or "native" for the native module: the tests that called it
    callers: dict[str, list[str]]


class Tree:
    """A copy of the working tree in which mistakes are planted."""

    def __init__(self, number: int, threads: int) -> None:
        self.root, self.threads = WORK / f"tree{number}", threads
        self.native_seconds = 0.0  # that the native tests take without a mistake

    def sync(self) -> None:
        """Make the copy equal to the working tree, with builds left in place."""
        listed = output_of(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        wanted = {name for name in listed.split("\0") if name and os.path.lexists(ROOT / name)}
        there = self.root / ".files"
        for name in set(there.read_text().split("\n") if there.exists() else []) - wanted:
            (self.root / name).unlink(missing_ok=True)
        for name in wanted:
            source, target = ROOT / name, self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_symlink():
                if not target.is_symlink():
                    target.symlink_to(os.readlink(source))
            elif not target.exists() or target.read_bytes() != source.read_bytes():
                self.write(name, source.read_bytes())
                shutil.copymode(source, target)
        there.write_text("\n".join(sorted(wanted)))

    def write(self, name: str, text: bytes) -> None:
        """Write a file with the time of now, as ninja must see it, and without its old bytecode."""
        (self.root / name).write_bytes(text)
        if name.endswith(".py"):
            Path(importlib.util.cache_from_source(self.root / name)).unlink(missing_ok=True)

    def configure(self) -> None:
        """Set the build up: the module with the emulators, and the native tests."""
        options = ["-DOCTAVO_BUILD_TESTS=ON", "-DOCTAVO_CUDA=OFF", "-DOCTAVO_EMULATE_CUDA=ON"]
        options += ["-DOCTAVO_EMULATE_AMX=ON", f"-DPython_EXECUTABLE={sys.executable}"]
        if shutil.which("ccache"):
            options += ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"]
        command = ["cmake", "-S", ".", "-B", "build", "-G", "Ninja", "--log-level=WARNING"]
        self.must_run([*command, *options])

    def build(self) -> bool:
        """Compile what changed; False where it does not compile."""
        command = ["cmake", "--build", "build", "--parallel", str(self.threads)]
        return self.run(command, 3600.0)[0] == 0

    def must_run(self, command: list[str]) -> str:
        status, printed = self.run(command, 3600.0)
        if status:
            raise SystemExit(f"{' '.join(command)} in {self.root} failed:\n{printed[-4000:]}")
        return printed

    def run(self, command: list[str], limit: float, **variables: str) -> tuple[int, str]:
        """Run a command in the copy; its exit code (negative: ended by a signal) and its output."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("OCTAVO_")}
        environment |= {
            "PYTHONPATH": str(self.root / "python"),
            # A mistake in what handles the cache must not meet the user's.
            "XDG_CACHE_HOME": str(WORK / "cache"),
            "CCACHE_BASEDIR": str(self.root),
            "CCACHE_NOHASHDIR": "1",
            "CCACHE_DIR": os.environ.get("CCACHE_DIR", str(WORK / "ccache")),
        }
        with open(self.root / ".printed", "w+", errors="replace") as printed:
            process = subprocess.Popen(
                command, cwd=self.root, env=environment | variables, stdin=subprocess.DEVNULL,
                stdout=printed, stderr=printed, start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = -signal.SIGKILL
            _end_group(process)
            printed.seek(0)
            return status, printed.read()

    def native_tests(self) -> tuple[int, str]:
        """Run them all, with the limit of `pytest` once it is known how long they take."""
        limit = 120.0 + 6 * self.native_seconds if self.native_seconds else 3600.0
        return self.run(["build/tests/native/octavo_tests"], limit)

    def pytest(self, tests: Iterable[str], limit: float, **variables: str) -> tuple[int, str]:
        """Run tests, or files of them, up to the first failure."""
        options = ["-x", "-q", "-p", "no:xdist", "--tb=no"]
        return self.run([sys.executable, "-m", "pytest", *options, *tests], limit, **variables)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what the process started and left behind, such as servers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def output_of(command: list[str]) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def prepare(jobs: int) -> list[Tree]:
    """Copies of the tree, built, each checked to import itself."""
    WORK.mkdir(parents=True, exist_ok=True)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "octavo"
    if cache.exists() and not (WORK / "cache").exists():
        shutil.copytree(cache, WORK / "cache" / "octavo", symlinks=True)
    trees = [Tree(number, max(1, (os.cpu_count() or 1) // jobs)) for number in range(jobs)]
    for tree in trees:
        tree.root.mkdir(exist_ok=True)
        tree.sync()
        tree.configure()
        if not tree.build():
            raise SystemExit(
                f"the native module does not compile in {tree.root}: see .printed there"
            )
        where = "import octavo, octavo._native as n; print(octavo.__file__); print(n.__file__)"
        found = tree.must_run([sys.executable, "-c", where])
        if not all(line.startswith(str(tree.root)) for line in found.splitlines()):
            raise SystemExit(f"expected octavo from {tree.root}, but Python imports\n{found}")
        start = time.monotonic()
        tree.native_tests()
        tree.native_seconds = time.monotonic() - start
    return trees


def map_tests(trees: list[Tree]) -> list[TestFile]:
    """Every file of tests run once, by itself, with its calls noted; kept for the next run.

    One that fails without a mistake, where times are tested on a busy machine, say, is left out.
    """
    tests = trees[0].root / "tests"
    names = sorted(str(path.relative_to(trees[0].root)) for path in tests.rglob("test_*.py"))
    names = [name for name in names if not name.startswith(TESTS_LEFT_OUT)]
    common = hashlib.sha256()  # of what they stand on
    for folder in ("python", "reference", "tests"):
        for path in sorted((trees[0].root / folder).rglob("*.py")):
            if str(path.relative_to(trees[0].root)) not in names:
                common.update(path.read_bytes())
    kept_at = WORK / "map.json"
    kept = json.loads(kept_at.read_text()) if kept_at.exists() else {}

    def run(tree: Tree, name: str) -> tuple[str, dict[str, Any] | None]:
        digest = hashlib.sha256(common.digest() + (tree.root / name).read_bytes()).hexdigest()
        if kept.get(name, {}).get("digest") == digest:
            return name, kept[name]
        calls = tree.root / ".calls"
        calls.unlink(missing_ok=True)
        path = os.pathsep.join(
            str(tree.root / each) for each in ("python", "tests/mutants/trace_calls")
        )
        variables = {"OCTAVO_CALLS": str(calls), "OCTAVO_ROOT": str(tree.root), "PYTHONPATH": path}
        start = time.monotonic()
        status, printed = tree.pytest(["-p", "sitecustomize", name], 1800.0, **variables)
        seconds = round(time.monotonic() - start, 2)
        print(f"{name}: {seconds} s", flush=True)
        if status not in (0, 5):  # 5: all of its tests are skipped here
            print(f"fails without any mistake:\n{printed[-4000:]}", flush=True)
            return name, None
        times: dict[str, float] = defaultdict(float)
        callers: dict[str, list[str]] = defaultdict(list)
        for line in calls.read_text().splitlines() if calls.exists() else []:
            test, took, called = json.loads(line)
            times[test] += took
            for each in called:
                callers[each].append(test)
        found = TestFile(name, seconds, times, callers)
        return name, {"digest": digest, **found._asdict()}

    failed = set()
    for name, entry in in_trees(trees, run, names):
        if entry is None:
            failed.add(name)
        elif kept.get(name) is not entry:
            kept[name] = entry
            kept_at.write_text(json.dumps(kept))
    if failed:
        print(f"left out, since they fail without any mistake: {' '.join(sorted(failed))}")
    fields = TestFile._fields
    return [
        TestFile(*(kept[name][field] for field in fields)) for name in names if name not in failed
    ]


def in_trees(
    trees: list[Tree], function: Callable[[Tree, Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """function(tree, item) for each item, one at a time in each tree; the results in order."""
    free: queue.SimpleQueue[Tree] = queue.SimpleQueue()
    for tree in trees:
        free.put(tree)

    def run(item: Item) -> Result:
        tree = free.get()
        try:
            return function(tree, item)
        finally:
            free.put(tree)

    with ThreadPoolExecutor(len(trees)) as pool:
        try:
            yield from pool.map(run, items)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
