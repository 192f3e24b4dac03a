"""Registers, spills and stack of every CUDA kernel, and when the decoding products ask for weights.

    python scripts/kernel_resources.py [--record | --unless-recorded]

Builds csrc/cuda as CMake builds it (compute capabilities 8.0 and 9.0), with warnings as errors, on
any machine that has nvcc. A kernel of decoding that spills registers to memory fails the run: there
every kernel waits for memory already. What a kernel for many rows spills is only told.

A product of few rows must ask for all the weights and scales of its ring before it waits for the
kernel before it, and use none of them; only those of experts wait first, to learn which weights are
theirs. In the machine code for 9.0 those are LDG of 16 and 8 bytes in front of ACQBULK. A kernel
with fewer, or one that reads what it has loaded, fails the run, too. That takes cuobjdump and
nvdisasm, of the CUDA toolkit or of the packages in the extra `dev`.

All this takes some ten minutes. --record keeps a table that passed, marked with the sources and the
compiler that it is of; --unless-recorded compiles nothing while they are still the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "kernel_resources.txt"
FLAGS = "-Xptxas -v -Werror all-warnings -Xcompiler -Wall,-Wextra,-Wno-unknown-pragmas"

# Kernels that decoding of a few sequences does not use.
FOR_MANY_ROWS = "prefill|ExpertTiles|TileShape<(96|128)"
# Products of experts learn from the kernels before them which weights they multiply.
WAITS_FIRST = "ExpertRows"

# Loads of multiply_rows<>, at least, by its codes (Codes of weights.cuh) and whether there are zero
# points: of two outputs each unit of the ring (ring_units), its scales and its zero points.
LOADS = {("2", False): 16, ("3", False): 8, ("4", False): 16, ("5", False): 16, ("5", True): 12}
LOADS |= {("6", False): 12, ("6", True): 12}


class Kernel(NamedTuple):
    """One kernel of one architecture."""

    source: str
    name: str
    architecture: int
    registers: int
    spilled_bytes: int
    stack_bytes: int


def configure(folder: Path) -> None:
    """Let CMake write what is to be compiled, and how. Ends the run on an error."""
    run(
        *(
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(folder),
            "-DOCTAVO_CUDA=ON",
            "--fresh",
            "-G",
            "Ninja",
        ),
        *("-DOCTAVO_BUILD_PYTHON=OFF", f"-DCMAKE_CUDA_FLAGS={FLAGS}"),
    )


def mark(folder: Path) -> str:
    """The first line of a record: what it is of, the kernels' sources, compiler and commands."""
    digest = hashlib.sha256(run("nvcc", "--version").encode())
    left, sources = sorted(ROOT.glob("csrc/cuda/**/*.cu")), set()
    while left:  # and what they include
        sources.add(path := left.pop())
        names = re.findall(r'^#include "(.+)"', path.read_text(), re.M)
        found = {ROOT / "csrc" / name for name in names}  # the emulator's are elsewhere
        left += [each for each in found - sources if each.exists()]
    for path in sorted(sources):
        digest.update(path.name.encode() + path.read_bytes())
    commands = json.loads((folder / "compile_commands.json").read_text())
    for command in sorted(each["command"] for each in commands if each["file"].endswith(".cu")):
        arguments = command.partition(" ")[2]  # less the place of nvcc
        digest.update(arguments.replace(str(ROOT), "").encode())
    return f"# sources and nvcc: {digest.hexdigest()[:32]}"


def build(folder: Path) -> str:
    """Compile every kernel anew; what the compilers printed. Ends the run on an error."""
    return run("cmake", "--build", str(folder), "--clean-first", "--target", "octavo_cuda")


def run(*command: str) -> str:
    """What the command printed; where it fails, that ends the run."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


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
            # What is stored and never loaded again, nothing waits for.
            spilled = int(stores) + int(loads) if int(loads) else 0
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


def machine_code(built: Path) -> str:
    """What cuobjdump prints of an object file, for 9.0."""
    places = [os.environ["PATH"], str(Path(shutil.which("nvcc") or "").resolve().parent)]
    places += map(str, Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"))
    variables = {**os.environ, "PATH": os.pathsep.join(places)}
    program = shutil.which("cuobjdump", path=variables["PATH"])
    if program is None:
        raise SystemExit("no cuobjdump: install nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm")
    command = [program, "--dump-sass", "-arch", "sm_90", str(built)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def early_loads(sass: str) -> list[tuple[str, int, int]]:
    """Of each kernel that waits for the one before: loads in front of that, and uses of them."""
    found = []
    for part in sass.split("Function : ")[1:]:
        before, waits, _ = part.partition("ACQBULK")
        if not waits:
            continue
        loaded: set[int] = set()
        loads = uses = 0
        for line in before.splitlines():
            target, _, sources = line.partition(",")
            uses += any(int(number) in loaded for number in re.findall(r"\bR(\d+)\b", sources))
            if load := re.search(r"\bLDG\.E\S* R(\d+)$", target):
                wide = re.search(r"\.(64|128)\b", target)
                loads += wide is not None
                first, bits = int(load[1]), int(wide[1]) if wide else 32
                loaded |= set(range(first, first + bits // 32))
        found.append((part.split()[0], loads, uses))
    return found


def check_early_loads(folder: Path) -> tuple[list[str], int]:
    """A table of the products of few rows, and how many of them ask for too little or too late."""
    rows, wrong = [], 0
    for built in folder.glob("**/multiply_few*.cu.o"):
        found = early_loads(machine_code(built))
        names = readable([name for name, _, _ in found])
        for name, (_, loads, uses) in zip(names, found, strict=True):
            codes = re.findall(r"\(Codes\)(\d)", name)[0]
            expected = 0 if WAITS_FIRST in name else LOADS[codes, "true" in name]
            wrong += loads < expected or uses > 0
            rows.append((built.stem, name, f"{loads} of {expected}, {uses} used"))
    if not rows:
        raise SystemExit("no product of few rows waits for the kernel before it")
    lines = [f"{'file':24} {'sm':>3} {'loads before the wait':>22}  kernel"]
    lines += [f"{file:24} {90:3} {loads:>22}  {name}" for file, name, loads in sorted(rows)]
    return lines, wrong


def main() -> int:
    """Compile everything, print the tables, and fail where a kernel spills or asks too late."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--record", action="store_true", help=f"keep the table: {RECORD.name}")
    group.add_argument("--unless-recorded", action="store_true", help="what is recorded, is good")
    given = parser.parse_args()
    folder = ROOT / "build" / "cuda-resources"
    configure(folder)
    if given.unless_recorded and RECORD.read_text().startswith(mark(folder)):
        print(f"nothing to compile: {RECORD.relative_to(ROOT)} is of these sources and this nvcc")
        return 0
    found = parse(build(folder))
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
    early, late_kernels = check_early_loads(folder)
    lines += ["", *early]
    print("\n".join(lines))
    spilling = [row for row in rows if row[4] > 0]
    wrong = [row for row in spilling if not re.search(FOR_MANY_ROWS, row[1])]
    print(f"\n{len(found)} kernels; {len(spilling)} spill registers, {len(wrong)} of decoding")
    print(f"{late_kernels} products of few rows ask for too few weights before they wait")
    if wrong or late_kernels:
        return 1
    if given.record:
        RECORD.write_text("\n".join([mark(folder), *lines]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
