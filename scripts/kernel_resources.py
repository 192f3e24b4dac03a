"""Registers, spills and stack of every CUDA kernel, as ptxas reports them.

    python scripts/kernel_resources.py [--output benchmarks/results/kernel_resources.txt]

Builds csrc/cuda as CMake builds it (compute capabilities 8.0 and 9.0), with warnings as errors, on
any machine that has nvcc. A kernel of decoding that spills registers to memory fails the run: there
every kernel waits for memory already. What a kernel for many rows spills is only told.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FLAGS = "-Xptxas -v -Werror all-warnings -Xcompiler -Wall,-Wextra,-Wno-unknown-pragmas"

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


def build(folder: Path) -> str:
    """Compile every kernel anew; what the compilers printed. Ends the run on an error."""
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DOCTAVO_CUDA=ON", "--fresh"]
    configure += ["-DOCTAVO_BUILD_PYTHON=OFF", f"-DCMAKE_CUDA_FLAGS={FLAGS}", "-G", "Ninja"]
    compile_all = ["cmake", "--build", str(folder), "--clean-first", "--target", "octavo_cuda"]
    printed = ""
    for command in (configure, compile_all):
        done = subprocess.run(command, capture_output=True, text=True)
        printed = done.stdout + done.stderr
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{printed}")
    return printed


def parse(printed: str) -> list[Kernel]:
    """The kernels in what `ptxas -v` printed of each source."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.S,
    )
    kernels = []
    for part in printed.split("Building CUDA object ")[1:]:
        source = re.match(r"\S*/(\w+\.cu)", part)
        for name, sm, stack, stores, loads, used in pattern.findall(part):
            spilled = int(stores) + int(loads)
            file = source.group(1) if source else "?"
            kernels.append(Kernel(file, name, int(sm), int(used), spilled, int(stack)))
    return kernels


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
    given = parser.parse_args()
    found = parse(build(ROOT / "build" / "cuda-resources"))
    if not found:
        raise SystemExit("no kernel was reported; expected nvcc to print what ptxas says")
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
