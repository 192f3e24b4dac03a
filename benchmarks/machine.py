"""What a figure was measured on: the machine and the versions of everything."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from octavo import _native
from octavo.machine import processor

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str:
    """The commit of the checkout, "-dirty" behind it when files differ; "" outside git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, ready for JSON; of a path only its name: folders are a machine's own."""
    return {key: _plain(value) for key, value in vars(arguments).items() if key != "output"}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    is_path = isinstance(value, Path) or (isinstance(value, str) and Path(value).is_absolute())
    return Path(value).name if is_path else value


def _version(package: str) -> str:
    """ "" for one that is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def stamp(num_threads: int) -> dict[str, Any]:
    """What belongs beside every figure."""
    packages = ["octavo", "numpy", "torch", "transformers"]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processor": processor(),
        "num_threads": num_threads,
        "native": _native.build_info(),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "versions": {name: found for name in packages if (found := _version(name))},
        "commit": commit(),
    }
