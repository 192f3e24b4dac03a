"""`.ci/run` with commands that do nothing: what it counts, and in which order it runs stages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("bash") is None, reason="needs Linux and bash"
)

# Says what it begins and ends; does for one target what the test asks for.
_MAKE = """#!/bin/sh
echo "begin $*" >>"$LOG"
case "$*" in
*native-neon*) eval "$NEON" ;;
esac
echo "end $*" >>"$LOG"
"""
_KILL_THE_STAGE = "kill -9 $(cut -d ' ' -f 4 /proc/$PPID/stat)"


def run(folder: Path, *stages: str, neon: str = "") -> tuple[int, list[str], list[str]]:
    """The exit code, what was printed, and what make was asked for."""
    programs = folder / "programs"
    programs.mkdir()
    there = [
        "ccache",
        "chromium",
        "slurmctld",
        "slurmd",
        "munged",
        "apt-get",
        "aarch64-linux-gnu-g++",
    ]
    scripts = dict.fromkeys([*there, "qemu-aarch64", "nvcc", "clang++"], "#!/bin/sh\n")
    for name, text in {**scripts, "id": "#!/bin/sh\necho 0\n", "make": _MAKE}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    log = folder / "log"
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(folder / ".ci" / "run"), *stages],
        env={**os.environ, "PATH": path, "LOG": str(log), "NEON": neon},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == "" or neon or done.returncode == 2  # bash says what was killed
    said = done.stderr if done.returncode == 2 else done.stdout
    return done.returncode, said.splitlines(), log.read_text().splitlines() if log.exists() else []


def test_every_stage_counts_once(tmp_path: Path) -> None:
    code, said, log = run(tmp_path)
    count = sum(line.startswith("begin") for line in log)
    assert (code, said[-1]) == (0, f"{count} passed, 0 failed, 0 skipped")
    assert count > 10
    names = [line.split()[0] for line in said if " passed " in line and line.endswith("ok")]
    (tmp_path / "named").mkdir()
    assert run(tmp_path / "named", *names)[1][-1] == said[-1]  # each has a name that is known


@pytest.mark.parametrize(
    ("neon", "name"), [("exit 3", "neon"), (_KILL_THE_STAGE, "natives")], ids=["fails", "killed"]
)
def test_a_stage_that_fails_beside_others_counts(tmp_path: Path, neon: str, name: str) -> None:
    """Also where it is killed, with those that would follow it, before it can say so."""
    code, said, log = run(tmp_path, neon=neon)
    count = sum(line.startswith("begin") for line in log)
    assert (code, said[-1]) == (1, f"{count - 1} passed, 1 failed, 0 skipped")
    (line,) = [line for line in said if line.startswith(f"{name} ")]
    assert "1 failed" in line and "FAILED" in line


def test_stages_that_are_named_run_one_after_the_other(tmp_path: Path) -> None:
    code, said, log = run(tmp_path, "neon", "page", neon="sleep 0.3")
    assert log == [
        f"{word} {name}" for name in ("test-page", "native-neon") for word in ("begin", "end")
    ]
    assert (code, said[-1]) == (0, "2 passed, 0 failed, 0 skipped")


@pytest.mark.parametrize("name", ["nein", "nativ", "", "stage", "ne.n", "--help"])
def test_a_stage_that_is_misspelt_runs_nothing(tmp_path: Path, name: str) -> None:
    code, said, log = run(tmp_path, "neon", name)
    assert (code, log, len(said)) == (2, [], 1)
    assert f"no stage {name!r}; expected some of " in said[0]
    assert all(name in said[0] for name in ("check, ", "neon, ", ", hugging-face, ", "page"))
    assert not (tmp_path / "build").exists()
