"""What the scripts share: the machine and versions behind a figure, options, turns, output."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from octavo import _native
from octavo.machine import processor, total_memory

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("octavo", "numpy", "torch", "transformers")
Thing = TypeVar("Thing")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with a script's docstring above its options, as it stands there."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options --threads (as many as the processor has cores) and --output."""
    cores = _native.build_info()["physical_cores"]
    parser.add_argument("--threads", type=int, default=cores, help="of each system")
    parser.add_argument("--output", type=Path, help="also write everything to this JSON file")


def asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, ready for JSON; of a path only its name: folders are a machine's own."""
    return {key: _plain(value) for key, value in vars(arguments).items() if key != "output"}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    is_path = isinstance(value, Path) or (isinstance(value, str) and Path(value).is_absolute())
    return Path(value).name if is_path else value


def stamp(num_threads: int) -> dict[str, Any]:
    """What belongs beside every figure."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processor": processor(),
        "num_threads": num_threads,
        "native": _native.build_info(),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "versions": versions,
        "commit": commit(),
        **circumstances(),
    }


def circumstances(sys_folder: Path = Path("/sys"), proc: Path = Path("/proc")) -> dict[str, Any]:
    """What else decides about a speed, as far as the machine tells it.

    cores, numa_nodes, memory_bytes; governor, mhz: of the clocks, now and at most; load: programs
    that wanted to run, on average of the last minute; gpus: a line each, as `gpus` gives it.
    """
    devices = sys_folder / "devices" / "system"
    frequency = devices / "cpu" / "cpu0" / "cpufreq"
    clocks = [
        float(line.split(":")[1])
        for line in _text(proc / "cpuinfo").splitlines()
        if line.startswith("cpu MHz")
    ]
    most = _text(frequency / "cpuinfo_max_freq")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "numa_nodes": len(list((devices / "node").glob("node[0-9]*"))) or 1,
        "memory_bytes": total_memory(),
        "governor": _text(frequency / "scaling_governor") or "not told",
        "mhz": round(statistics.fmean(clocks)) if clocks else None,
        "mhz_at_most": int(most) // 1000 if most.isdecimal() else None,
        "load": os.getloadavg()[0],
        "gpus": gpus(),
    }


def _text(file: Path) -> str:
    """A small file of the system; "" where it is not."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def gpus(query: str = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem") -> Any:
    """What nvidia-smi tells of each GPU, a line each; [] without one."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return found.stdout.strip().splitlines()


def header(benchmark: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a file of results begins with."""
    machine = stamp(arguments.threads)
    return {"benchmark": benchmark, "arguments": asked(arguments), "machine": machine}


def commit() -> str:
    """The commit of the checkout, "-dirty" behind it when files differ; "" outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def slug(name: str) -> str:
    """A device's name for a file: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_json(file: Path | None, content: dict[str, Any]) -> None:
    """Write results to the file that --output names; None: nothing."""
    if file is not None:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def in_turns(things: Iterable[Thing], round_number: int) -> list[Thing]:
    """In order in even rounds, backwards in odd ones: nobody always goes first."""
    return list(things)[:: -1 if round_number % 2 else 1]


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
