"""One JSON file a machine: every step keeps its part, so that a killed call loses only its own.

The environment says how the steps run: OUT, the folder of all results (build/gpu); EMULATE=1, tiny
shapes on the emulated GPU, whose figures mean nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from about import ROOT, sources_hash
from common import slug, stamp

from octavo import _native
from octavo.bench.cases import Peak
from octavo.machine import open_packaged_libraries

EMULATE = os.environ.get("EMULATE") == "1"
OUT = Path(os.environ.get("OUT") or ROOT / "build" / "gpu")
SHAPE = ROOT / "benchmarks" / "shapes" / ("tiny" if EMULATE else "llama-3.2-1b")
DEVICE = "cuda_emulated" if EMULATE else "cuda"
TORCH_DEVICE = "cpu" if EMULATE else "cuda"

if not EMULATE:
    open_packaged_libraries()


def path() -> Path:
    """Where this machine's figures are kept: in gpu-nvidia-h200.json of an "NVIDIA H200"."""
    name = str(_native.build_info()["device_name"]) or ("emulated" if EMULATE else "no-gpu")
    return OUT / f"gpu-{slug(name)}.json"


def read() -> dict[str, Any]:
    """All that was kept so far; empty on a new machine."""
    found: dict[str, Any] = json.loads(path().read_text()) if path().exists() else {}
    return found


def read_peak() -> Peak | None:
    """The GPU's limits, as limits.py measured them; None before that."""
    limits = read().get("limits")
    if limits is None:
        return None
    flops = max(limits["mma_flops"], limits.get("cublas_flops", 0.0))
    return Peak(limits["read_bytes_per_second"], flops)


def gate(everything: dict[str, Any], sources: str) -> str:
    """What the device's tests said of these sources: "passed", "not run yet", or what failed."""
    tests = everything.get("tests", {})
    if tests.get("sources") != sources:
        return "not run yet"
    failed = tests["failed"]
    return f"{len(failed)} tests FAILED: " + ", ".join(failed) if failed else "passed"


def keep(part: str, values: dict[str, Any]) -> None:
    """Keep figures, with machine, versions, sources and gate, in place of older ones."""
    everything = read()
    sources = sources_hash()
    everything[part] = {
        "stamp": {**stamp(0), "clocks": clocks()},
        "sources": sources,
        "gate": gate(everything, sources),
        **values,
    }
    OUT.mkdir(parents=True, exist_ok=True)
    unfinished = path().with_suffix(".part")
    unfinished.write_text(json.dumps(everything, indent=1) + "\n")
    unfinished.replace(path())


def clocks() -> str:
    """Clocks now and at most, power and temperature, as the driver tells them; "" without one."""
    asked = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,"
    command = ["nvidia-smi", f"--query-gpu={asked}driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
