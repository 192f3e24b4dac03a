"""The machine, before anything is built: what it is and which tools it has.

python benchmarks/gpu/about.py
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys

PACKAGES = "numpy torch transformers nanobind pytest pytest-xdist hypothesis tokenizers safetensors"
TOOLS = (
    ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem"],
    ["nvcc", "--version"],
    ["cmake", "--version"],
    ["ninja", "--version"],
    ["ncu", "--version"],
    ["compute-sanitizer", "--version"],
)


def main() -> None:
    """Print a line for every tool and package."""
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}")
    for name in PACKAGES.split():
        try:
            print(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            print(name, "is not here")
    for command in TOOLS:
        if shutil.which(command[0]) is None:
            print(command[0], "is not here")
            continue
        more = ["--format=csv,noheader"] if command[0] == "nvidia-smi" else []
        lines = subprocess.run([*command, *more], capture_output=True, text=True).stdout.split("\n")
        print(command[0], "|", " ".join(line for line in lines if line.strip())[:200])


if __name__ == "__main__":
    main()
