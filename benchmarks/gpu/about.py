"""The machine and the sources, before anything is built: neither octavo nor git is needed.

python benchmarks/gpu/about.py
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = "numpy torch transformers nanobind pytest pytest-xdist hypothesis tokenizers safetensors"
GPU = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem"
TOOLS = (
    f"nvidia-smi --query-gpu={GPU} --format=csv,noheader",
    *(f"{tool} --version" for tool in ("nvcc", "cmake", "ninja", "ncu", "compute-sanitizer")),
)


def sources_hash() -> str:
    """Twelve digits of the SHA-256 of octavo's sources and of what measures them."""
    digest = hashlib.sha256()
    folders = [ROOT / name for name in ("csrc", "cmake", "python", "reference", "benchmarks/gpu")]
    suffixes = {".cu", ".cuh", ".cpp", ".h", ".py", ".cmake"}
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes]
    for path in sorted([ROOT / "CMakeLists.txt", *files]):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def main() -> None:
    """Print a line for every tool and package."""
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    for name in PACKAGES.split():
        try:
            print(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            print(name, "is not here")
    for command in map(str.split, TOOLS):
        if shutil.which(command[0]) is None:
            print(command[0], "is not here")
            continue
        lines = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
        print(command[0], "|", " ".join(line for line in lines if line.strip())[:200])


if __name__ == "__main__":
    main()
