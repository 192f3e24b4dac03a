"""Builds, tests and measures octavo on a GPU, one step after the other: behind benchmarks/gpu.sh.

A list of steps runs within so many seconds, each step under its own limit: one that hangs or fails
costs only itself. Whatever a step has found is kept at once (results.py), its output too. A failed
test stops nothing: figures say what failed beside them. In $OUT (build/gpu) afterwards: lease.log,
gpu-NAME.json, table.txt, profile.txt, done.json.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

from about import ROOT, sources_hash

KEPT = ROOT / "build" / "gpu"
OUT = Path(os.environ.get("OUT") or KEPT).resolve()
VARIANT = ROOT / "build" / "gpu-variant"
NCU = "ncu --clock-control none --launch-count 64"
NCU += " --kernel-name regex:multiply_rows|multiply_tile|attention_kernel --section SpeedOfLight"
NCU += " --section WarpStateStats --section LaunchStats --section Occupancy"
NCU += " --section MemoryWorkloadAnalysis"
SANITIZER = "compute-sanitizer --error-exitcode 9 --tool"
SANITIZED = "-m pytest -q -p no:benchmark tests/engine/test_cuda_runtime.py -k replayed -x"


class Step:
    """Something to run; `seconds`: the most it may take.

    commands: arguments of Python, one run after the other, a file being one of this folder. tool:
    what a command is run under; a machine without it skips the step. environment: NAME=VALUE.
    flags: of the compiler, for a build that comes first; "" builds the module itself, others one
    beside it, with the same Python, which the commands use.
    """

    def __init__(
        self,
        seconds: int,
        *commands: str,
        tool: str = "",
        environment: str = "",
        flags: str | None = None,
    ) -> None:
        self.seconds = seconds
        self.commands = [shlex.split(command) for command in commands]
        self.tool = tool.split()
        self.environment = dict(setting.split("=") for setting in environment.split())
        self.flags = flags


def build(flags: str) -> list[list[str]]:
    """CMake alone, for this GPU alone: neither pip nor its resolver."""
    folder = VARIANT / "build" if flags else ROOT / "build" / "gpu-build"
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "--log-level=WARNING"]
    configure += ["-DCMAKE_BUILD_TYPE=Release", "-DOCTAVO_CUDA=ON"]
    configure += [f"-DCMAKE_CUDA_FLAGS=--split-compile=0 {flags}"]
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={architecture()}"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    if flags:
        python = VARIANT / "python"
        shutil.rmtree(python, ignore_errors=True)
        compiled = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / "python", python, ignore=compiled)
        configure += [f"-DOCTAVO_MODULE_FOLDER={python / 'octavo'}"]
    return [configure, ["cmake", "--build", str(folder)]]


def architecture() -> str:
    """ "90-real" on an H100."""
    return gpu("compute_cap").replace(".", "") + "-real"


@functools.cache  # a call may take a second
def gpu(what: str) -> str:
    """What nvidia-smi says of the first GPU; "" where there is none."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return ""
    return found.split("\n")[0].strip()


def headlines(label: str, *formats: str) -> list[str]:
    """The headline of a variant, in some formats."""
    return [f"model.py headline --format {format} --label {label}" for format in formats]


STEPS: dict[str, Step] = {
    "machine": Step(30, "about.py"),
    "build": Step(200, flags=""),
    "limits": Step(40, "limits.py"),
    "headline": Step(60, "model.py headline"),
    "tests": Step(250, "device_tests.py"),
    "decode": Step(75, *(f"model.py decode --format {f}" for f in ("int8", "int4", "bf16"))),
    "mixed": Step(90, "mixed.py", "mixed.py --kv-dtype int8"),
    "batch": Step(90, *(f"model.py batch --format {f}" for f in ("bf16", "int8"))),
    "prefill": Step(40, "model.py prefill"),
    "kernels": Step(90, "kernels.py"),
    "profile": Step(90, "profiled.py", tool=NCU),
    "memcheck": Step(90, SANITIZED, tool=f"{SANITIZER} memcheck"),
    # Variants, beside the same measurement of what is built by default.
    "as-built": Step(75, *headlines("again", "bf16", "int8", "int4")),
    "few-rows": Step(
        60, "kernels.py --products --rows 9,16 --label few", environment="OCTAVO_FEW_ROWS=16"
    ),
    "int4-ring": Step(
        220, "model.py headline --format int4 --label ring-2", flags="-DOCTAVO_INT4_RING=2"
    ),
    "int8-blocks": Step(
        220, "model.py headline --format int8 --label blocks-3", flags="-DOCTAVO_INT8_BLOCKS=3"
    ),
    "tiles-apart": Step(
        75,
        *headlines("apart", "bf16", "int8"),
        environment="OCTAVO_CUDA_TILES_APART=1",
    ),
    **{
        f"carveout-{name}": Step(
            75,
            *headlines(f"carveout-{name}", "bf16", "int8"),
            environment=f"OCTAVO_CUDA_CARVEOUT={percent}",
        )
        for name, percent in (("less", 57), ("most", 100), ("driver", -1))
    },
    "plain-tiles": Step(60, "model.py batch --label tiles-64", environment="OCTAVO_TILES_ROWS=64"),
    "int8-tiles": Step(
        60,
        "model.py batch --format int8 --label tiles-64",
        environment="OCTAVO_QUANTIZED_TILES_ROWS=64",
    ),
    "deterministic": Step(
        75, "model.py batch prefill --deterministic", "model.py headline --enforce-eager"
    ),
    "huggingface": Step(60, "huggingface.py"),
    "huggingface-compiled": Step(200, "huggingface.py --compiled"),
    # On a machine with several GPUs: a model divided between two of them.
    "ranks": Step(
        150,
        "-m pytest -q -rs -p no:benchmark tests/engine/test_ranks.py -k on_a_gpu",
        "model.py headline batch --ranks 2 --label ranks-2",
    ),
    "racecheck": Step(120, SANITIZED, tool=f"{SANITIZER} racecheck"),
}
LISTS = {
    "lease": "machine build limits headline tests decode mixed batch prefill kernels profile "
    "memcheck",
    "lease-2": "machine build limits as-built few-rows carveout-less carveout-most "
    "carveout-driver tiles-apart deterministic huggingface plain-tiles int8-tiles racecheck "
    "int4-ring int8-blocks",
    "all": " ".join(STEPS),
}


class Lease:
    """Runs steps until the time is over."""

    def __init__(self, seconds: float, emulate: bool) -> None:
        self.failed: list[str] = []
        self._end = time.monotonic() + seconds
        self._emulate = emulate
        OUT.mkdir(parents=True, exist_ok=True)
        self._keeps = OUT != KEPT and not emulate
        if self._keeps and KEPT.exists() and not any(OUT.iterdir()):
            shutil.copytree(KEPT, OUT, dirs_exist_ok=True)  # of an earlier call: gate, limits
        self._file = (OUT / "lease.log").open("a", buffering=1)
        self._carried = carried()
        self._environment = {**os.environ, "OUT": str(OUT), "PYTHONUNBUFFERED": "1"}
        self._environment["OCTAVO_TEST_CUDA_DEVICE"] = "cuda_emulated" if emulate else "cuda"
        if emulate:  # the module under test is the one that is installed
            self._environment["EMULATE"] = "1"
        else:
            self._environment["PYTHONPATH"] = self._python_path(ROOT / "python")

    def _log(self, text: str) -> None:
        """To standard output, and to lease.log."""
        print(text, end="", flush=True)
        self._file.write(text)

    def _python_path(self, octavo: Path) -> str:
        return os.pathsep.join([str(octavo), *self._carried])

    def run(self, name: str) -> None:
        """One step, if time is left."""
        step = STEPS[name]
        left = self._end - time.monotonic()
        if left < 5:
            self._log(f"==== {name}: left out, the time is over\n")
            self.failed.append(f"{name} (left out)")
            return
        start = time.monotonic()
        end = start + min(step.seconds, left)
        self._log(f"==== {name} ({left:.0f} s left)\n")
        environment = self._environment | step.environment
        if step.flags and not self._emulate:
            environment["PYTHONPATH"] = self._python_path(VARIANT / "python")
        commands = self._commands(step)
        status = "skipped" if commands is None else "ok"
        for command in commands or ():
            status = self._command(command, environment, end)
            if status != "ok":
                break
        self._log(f"==== {name}: {status} after {time.monotonic() - start:.1f} s\n")
        if status in ("ok", "skipped"):
            done = finished() | {name: mark()}
            (OUT / "done.json").write_text(json.dumps(done, indent=1) + "\n")
        else:
            self.failed.append(f"{name} ({status})")
        self._keep()

    def _keep(self) -> None:
        if self._keeps:
            shutil.copytree(OUT, KEPT, dirs_exist_ok=True)

    def _commands(self, step: Step) -> list[list[str]] | None:
        """What to run, one after the other; None: the step's tool is not here."""
        tool = step.tool
        if tool and shutil.which(tool[0]) is None:
            self._log(f"{tool[0]} is not here: run without it, for its Python\n")
            if not self._emulate:
                return None
            tool = []
        commands = [[*tool, *in_python(*command)] for command in step.commands]
        if step.flags is not None:
            if self._emulate:
                self._log("emulated: the installed module is taken as it is\n")
            else:
                commands = build(step.flags) + commands
        return commands

    def _command(self, command: list[str], environment: dict[str, str], end: float) -> str:
        """Runs it, in a process group of its own, which is killed when the time is over."""
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        stopped = threading.Event()

        def stop() -> None:
            with contextlib.suppress(ProcessLookupError):  # it may just have ended by itself
                os.killpg(process.pid, signal.SIGKILL)
                stopped.set()

        timer = threading.Timer(max(0.0, end - time.monotonic()), stop)
        timer.daemon = True
        timer.start()
        profile = (OUT / "profile.txt").open("a") if command[0] == "ncu" else None
        for line in process.stdout or ():
            if profile:
                profile.write(line)
            else:
                self._log(line)
        status = process.wait()
        timer.cancel()
        if stopped.is_set():
            return "STOPPED at its limit"
        return "ok" if status == 0 else f"FAILED ({status})"

    def table(self) -> None:
        """The table, printed and kept."""
        command, environment = in_python("table.py"), self._environment
        shown = subprocess.run(command, env=environment, capture_output=True, text=True)
        (OUT / "table.txt").write_text(shown.stdout)
        self._log("\n" + shown.stdout + shown.stderr)
        if shown.returncode:
            self.failed.append("table")
        self._keep()


def mark() -> str:
    """What results belong to: these sources, on this GPU."""
    return f"{sources_hash()} {gpu('name')}"


def finished() -> dict[str, str]:
    """The steps that went well, and the sources and the GPU that they ran with."""
    path = OUT / "done.json"
    found: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    return found


def carried() -> list[str]:
    """Wheels in $WHEELS, unpacked: for packages that the machine lacks, or has too old."""
    wheels = sorted(Path(os.environ.get("WHEELS") or ROOT / "build" / "wheels").glob("*.whl"))
    if not wheels:
        return []
    folder = ROOT / "build" / "site"
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(folder)
    return [str(folder)]


def in_python(first: str, *more: str) -> list[str]:
    """A command of this Python; `first`: a file of this folder, or an option."""
    path = str(Path(__file__).with_name(first)) if first.endswith(".py") else first
    return [sys.executable, path, *more]


def main() -> None:
    """Run the steps that are named, or all of a list, and print the table."""
    parser = argparse.ArgumentParser(
        description="Build, test and measure octavo on an NVIDIA GPU.",
        epilog=f"lists: {', '.join(LISTS)}. steps: {', '.join(STEPS)}.",
    )
    add = parser.add_argument
    names_help = "default: every step that these sources have not finished yet"
    add("names", nargs="*", metavar="LIST|STEP", help=names_help)
    add("--seconds", type=float, help="for all steps together (a lease: 560; else no limit)")
    add("--emulate", action="store_true", help="tiny shapes on the emulated GPU")
    given = parser.parse_args()
    names = given.names or ["all"]
    for name in names:
        if name not in STEPS and name not in LISTS:
            known = ", ".join([*LISTS, *STEPS])
            parser.error(f'there is no step "{name}"; expected some of {known}')
    is_lease = any(name.startswith("lease") for name in names)
    lease = Lease(given.seconds or (560.0 if is_lease else 1e6), given.emulate)
    for name in names:
        for step in LISTS.get(name, name).split():
            is_done = finished().get(step) == mark()
            # A list's limits need not be measured again for another one.
            if not is_done or (given.names and (step == name or step != "limits")):
                lease.run(step)
    lease.table()
    print("FAILED: " + ", ".join(lease.failed) if lease.failed else "all steps went well")
    raise SystemExit(1 if lease.failed else 0)


if __name__ == "__main__":
    main()
