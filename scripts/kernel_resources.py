"""Registers, spills and stack of every CUDA kernel, as ptxas reports them.

    python scripts/kernel_resources.py [--output benchmarks/results/kernel_resources.txt]

Compiles csrc/cuda/*.cu for compute capabilities 8.0 and 9.0 with all warnings as errors, on any
machine that has nvcc. A kernel of decoding that spills registers to memory fails the run: there
every kernel waits for memory already. What a kernel for many rows spills is only told.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = (80, 90)
FLAGS = (
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xptxas",
    "-v",
    "-Werror",
    "all-warnings",
)


# Kernels that decoding does not use.
FOR_MANY_ROWS = "prefill|multiply_tile|tiles_"


class Kernel(NamedTuple):
    """One kernel of one architecture."""

    source: str
    name: str
    architecture: int
    registers: int
    spilled_bytes: int
    stack_bytes: int


def compile_one(source: Path, architecture: int) -> list[Kernel]:
    """Compile a file and read what ptxas says of its kernels; ends the run on an error."""
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [
        "nvcc",
        *FLAGS,
        "-Xcompiler",
        "-Wall,-Wextra,-Wno-unknown-pragmas",
        "-gencode",
        target,
    ]
    command += ["-I", str(ROOT / "csrc"), "-c", str(source), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{source.name} for sm_{architecture} does not compile:\n{done.stderr}")
    return list(parse(done.stderr, source.name, architecture))


def parse(report: str, source: str, architecture: int) -> list[Kernel]:
    """The kernels in what `ptxas -v` printed."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.S,
    )
    return [
        Kernel(source, name, architecture, int(used), int(stores) + int(loads), int(stack))
        for name, stack, stores, loads, used in pattern.findall(report)
    ]


def readable(names: list[str]) -> list[str]:
    """Demangled, without namespaces and parameters."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    short = []
    for name in done.stdout.splitlines():
        name = re.sub(r"octavo::cuda::|\(anonymous namespace\)::|^void ", "", name)
        name = name.replace("__nv_bfloat16", "Bf16").replace("__half", "F16")
        depth = 0
        for end, letter in enumerate(name):
            depth += (letter == "<") - (letter == ">")
            if letter == "(" and depth == 0 and not name[end:].startswith("(anonymous"):
                name = name[:end]
                break
        short.append(name)
    return short


def main() -> int:
    """Compile everything, print the table, and fail where a kernel spills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    given = parser.parse_args()
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    tasks = [(source, architecture) for source in sources for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(given.jobs) as pool:
        found = [
            kernel for part in pool.map(lambda task: compile_one(*task), tasks) for kernel in part
        ]
    names = readable([kernel.name for kernel in found])
    rows = sorted(
        (
            kernel.source,
            name,
            kernel.architecture,
            kernel.registers,
            kernel.spilled_bytes,
            kernel.stack_bytes,
        )
        for kernel, name in zip(found, names, strict=True)
    )
    lines = [f"{'file':24} {'sm':>3} {'registers':>9} {'spilled':>8} {'stack':>6}  kernel"]
    lines += [
        f"{source:24} {architecture:3} {registers:9} {spilled:8} {stack:6}  {name}"
        for source, name, architecture, registers, spilled, stack in rows
    ]
    print("\n".join(lines))
    if given.output:
        given.output.write_text("\n".join(lines) + "\n")
    spilling = [row for row in rows if row[4] > 0]
    wrong = [row for row in spilling if not re.search(FOR_MANY_ROWS, row[1])]
    print(f"\n{len(found)} kernels; {len(spilling)} spill registers, {len(wrong)} of decoding")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
