"""One JSON file a machine: each stage keeps its part, so that stages can run apart and resume."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import stamp

from octavo import _native

RESULTS = Path(__file__).resolve().parents[1] / "results"
SHAPE = Path(__file__).resolve().parents[1] / "shapes" / "llama-3.2-1b"


def device_slug() -> str:
    """ "NVIDIA H200" -> "nvidia-h200"."""
    name = str(_native.build_info()["device_name"]) or "no-gpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def path() -> Path:
    """Where this machine's figures are kept."""
    return RESULTS / f"gpu-{device_slug()}.json"


def read() -> dict[str, Any]:
    """All stages kept so far; empty on a new machine."""
    found: dict[str, Any] = json.loads(path().read_text()) if path().exists() else {}
    return found


def keep(stage: str, values: dict[str, Any]) -> None:
    """Keep a stage's figures, with machine, versions and commit, in place of older ones."""
    everything = read()
    everything[stage] = {"stamp": stamp(0), **values}
    RESULTS.mkdir(exist_ok=True)
    path().write_text(json.dumps(everything, indent=1) + "\n")
    print(f"{stage}: kept in {path()}")
