"""benchmarks/gpu.sh with tiny shapes on the emulated GPU, so that nothing is new on a real one."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_helpers import needs_cuda

pytestmark = [pytest.mark.hf, needs_cuda]
ROOT = Path(__file__).resolve().parents[2]


def gpu_sh(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OUT": str(out), "PYTHON": sys.executable}
    command = [str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def test_every_step_runs_and_its_figures_are_kept(tmp_path: Path) -> None:
    """All but racecheck, whose command is memcheck's under another tool."""
    code = "import sys; sys.path.insert(0, 'benchmarks/gpu'); import lease; print(lease.LISTS)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    steps = {name: listed.split() for name, listed in ast.literal_eval(ran.stdout).items()}
    assert {*steps["lease"], *steps["lease-2"]} < set(steps["all"])
    rest = [name for name in steps["all"] if name not in [*steps["lease"], "racecheck"]]
    ran = gpu_sh(tmp_path, "lease", *rest, "--emulate")
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert "all steps went well" in ran.stdout
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"gpu-emulated.json", "lease.log", "table.txt", "done.json"}
    parts = json.loads((tmp_path / "gpu-emulated.json").read_text())
    assert {"limits", "headline-bf16", "tests", "decode-int4", "mixed-bf16", "kernels"} <= set(
        parts
    )
    # Measured before the tests, after them, and never without saying so.
    assert parts["headline-bf16"]["gate"] == "not run yet"
    assert parts["decode-int8"]["gate"] == "passed" and not parts["tests"]["failed"]
    assert len({part["sources"] for part in parts.values()}) == 1
    table = (tmp_path / "table.txt").read_text()
    assert "gate (the device's tests): passed" in table and "us a token" in table


# Each step takes 28 seconds of this clock, however fast the machine is.
SLOW_STEPS = """
import sys
sys.path.insert(0, "benchmarks/gpu")
import lease

class Clock:
    now = 0.0
    monotonic = staticmethod(lambda: Clock.now)

class SlowLease(lease.Lease):
    def run(self, name):
        super().run(name)
        Clock.now += 28

lease.time, lease.Lease = Clock, SlowLease
lease.main()
"""


def test_a_step_that_is_late_costs_only_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW_STEPS, "machine", "kernels", "limits"]
    command += ["--emulate", "--seconds", "60"]
    environment = {**os.environ, "OUT": str(tmp_path)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 1, ran.stderr
    for line in (
        "==== machine: ok",
        "==== kernels: FAILED",  # without limits there are no floors
        "==== limits: left out",
        "FAILED: kernels (FAILED (1)), limits (left out)",
    ):
        assert line in ran.stdout, ran.stdout


def test_a_step_that_hangs_is_stopped(tmp_path: Path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, 'benchmarks/gpu'); import lease\n"
        "lease.STEPS['hangs'] = lease.Step(1, '-c \"print(7); import time; time.sleep(60)\"')\n"
        "run = lease.Lease(60.0, True); start = time.monotonic(); run.run('hangs')\n"
        "print(run.failed, time.monotonic() - start < 20)"
    )
    environment = {**os.environ, "OUT": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert "['hangs (STOPPED at its limit)'] True" in ran.stdout, ran.stdout + ran.stderr
    assert "\n7\n" in (tmp_path / "lease.log").read_text()


def test_an_unknown_step_is_named(tmp_path: Path) -> None:
    ran = gpu_sh(tmp_path, "limitz", "--emulate")
    assert ran.returncode == 2 and 'no step "limitz"; expected some of lease' in ran.stderr


def in_lease(code: str, out: Path, **more: str) -> str:
    """What such code prints that has the script's module as `lease`; more: of its environment."""
    environment = {**os.environ, "OUT": str(out), **more}
    code = "import sys; sys.path.insert(0, 'benchmarks/gpu'); import lease, pathlib\n" + code
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return ran.stdout + ran.stderr


def test_a_later_call_starts_from_what_was_kept(tmp_path: Path) -> None:
    code = (
        f"lease.KEPT = pathlib.Path({str(tmp_path / 'kept')!r})\n"
        "lease.STEPS['says'] = lease.Step(20, '-c \"print(7)\"')\n"
        "made = lease.Lease(60.0, False); print(sorted(lease.finished())); made.run('says')\n"
    )
    assert in_lease(code, tmp_path / "first").startswith("[]\n")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"lease.log", "done.json"}
    assert in_lease(code, tmp_path / "second").startswith("['says']\n")
    assert (tmp_path / "second" / "lease.log").read_text().count("\n7\n") == 2


def test_a_list_does_not_measure_limits_again(tmp_path: Path) -> None:
    code = (
        "sys.argv[1:] = ['{}', '--emulate']; lease.LISTS['short'] = 'limits machine'; lease.main()"
    )
    for name, measured in [("limits", True), ("short", False), ("limits", True)]:
        shown = in_lease(code.format(name), tmp_path)
        assert ("==== limits: ok" in shown) == measured, shown
        assert "all steps went well" in shown, shown


def test_tests_that_take_too_long_are_interrupted_and_sum_up(tmp_path: Path) -> None:
    """Also where whoever started them ignores interrupts, as shells do for the background."""
    (tmp_path / "test_two.py").write_text(
        "import time\ndef test_norms(): pass\ndef test_norms_slowly(): time.sleep(60)\n"
    )
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "import device_tests as d; d.MOST_SECONDS, d.MOST_SECONDS_HF = 4, 4\n"
        f"d.ROOT = pathlib.Path({str(tmp_path)!r}); (d.ROOT / 'tests' / 'a').mkdir(parents=True)\n"
        "(d.ROOT / 'test_two.py').rename(d.ROOT / 'tests' / 'a' / 'test_cuda_two.py')\n"
        "d.keep = lambda part, values: print('KEPT', values)\n"
        "d.importlib.util.find_spec = lambda name: None\n"
        "d.main()\n"
    )
    shown = in_lease(code, tmp_path / "out", EMULATE="1")
    assert "KEPT {'failed': ['pytest ended with 2'], 'summary': '" in shown, shown
    assert "1 passed" in shown, shown
