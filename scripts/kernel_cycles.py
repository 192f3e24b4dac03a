"""Cycles of a CUDA kernel's main loop on a Hopper multiprocessor, by a model of its machine code.

    python scripts/kernel_cycles.py csrc/cuda/products/multiply_tiles.cu 'TileShape<64' --blocks 1

Compiles the source for compute capability 9.0 (needs nvcc, cuobjdump and nvdisasm; no GPU), takes
the first kernel whose name contains the second argument, and lets the warps of so many blocks go
through its main loop: the shortest one with tensor core products and a wait for copies. What it
prints is how long an iteration takes, of which a scheduler issues how much, and what it waits for.

The machine code says how long each instruction keeps its warp from the next one, and which of six
counters it sets and waits for (Jia et al. 2018, arXiv 1804.06826: the layout of these fields). The
model adds what it does not say: how long the units are busy (PIPES), how long loads from shared
memory, special functions and shuffles take, and that four schedulers share one path to shared
memory, 128 bytes a cycle. Copies from memory arrive after 600 cycles, whatever their number: the
model knows no bandwidth. What H100s were measured to take, and where the model is wrong, is in
docs/cuda_products.md.

A conditional branch inside the loop is not taken, but for `if (nothing ends here) continue`: the
first that skips much code after the last product. --take and --fall-through name others by their
address, which --listing prints.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kernel_resources import ROOT, machine_code, readable, run

SCHEDULERS = 4
COUNTERS = 6
# Cycles a scheduler's unit is busy with an instruction of a warp. Tensor cores: 6.2 is what 16 x 8
# x 16 products were measured to take on an H100 (660 TFLOP/s; benchmarks/gpu/limits.py).
PIPES = {
    "tensor": (6.2, "HMMA"),
    "special": (8, "MUFU I2F F2I FRND F2F"),
    "memory": (2, "LDS STS LDGSTS LDG STG SHFL ATOMG"),
    "integer": (
        2,
        "LOP3 IADD3 ISETP SHF SEL FSEL FMNMX PRMT PLOP3 LEA VIADD VIMNMX VIADDMNMX FSETP MOV IABS "
        "SGXT BREV F2FP IMNMX CS2R POPC",
    ),
    "multiply": (2, "IMAD HFMA2 HADD2 HMUL2"),
    "float": (1, "FFMA FADD FMUL"),
}
UNITS = {name: (unit, busy) for unit, (busy, names) in PIPES.items() for name in names.split()}
SHARED, ARRIVAL = 29, 600  # cycles of a load from shared memory, of a copy from memory
LATENCIES = {"special": 22, "S2R": 25, "S2UR": 25, "LDC": 30, "ULDC": 30, "LDG": 300}
AFTER_BARRIER = 8


@dataclass
class Instruction:
    """One of the machine code, and what its control fields say."""

    address: int
    text: str
    stall: int
    sets: int  # counter that falls when the result is there; 7: none
    frees: int  # counter that falls when the operands have been read; 7: none
    waits: int  # a bit for each counter that must be 0

    @property
    def name(self) -> str:
        """Without its predicate and its modifiers."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0].split(".")[0]

    @property
    def jumps_to(self) -> int | None:
        """Where a branch goes; None for others."""
        found = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None

    @property
    def wavefronts(self) -> int:
        """Cycles of the path to shared memory."""
        if self.name in ("LDS", "STS"):
            return 0 if self.text.startswith("@!PT") else 4 if ".128" in self.text else 2
        return {"LDGSTS": 4, "SHFL": 1}.get(self.name, 0)


def parse(sass: str) -> list[Instruction]:
    """The instructions of one function, as cuobjdump prints them: two words of 64 bits each."""
    words = re.findall(
        r"/\*([0-9a-f]{4,5})\*/\s+(\S.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/",
        sass,
    )
    found = []
    for address, text, high in words:
        control = int(high, 16) >> 41
        found.append(
            Instruction(
                int(address, 16),
                text,
                control & 15,
                control >> 5 & 7,
                control >> 8 & 7,
                control >> 11 & 63,
            )
        )
    return found


def main_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """The shortest loop with products and a wait for copies."""
    loops = []
    for last in code:
        first = last.jumps_to
        if first is None or first >= last.address:
            continue
        body = [each for each in code if first <= each.address <= last.address]
        if {"HMMA", "DEPBAR"} <= {each.name for each in body}:
            loops.append(body)
    if not loops:
        raise SystemExit("no loop has both products (HMMA) and a wait for copies (DEPBAR)")
    return min(loops, key=len)


def one_pass(loop: list[Instruction], take: set[int], fall_through: set[int]) -> list[Instruction]:
    """What a warp executes in one iteration."""
    last_product = max(each.address for each in loop if each.name == "HMMA")
    skips = [
        each.address
        for each in loop
        if each.address > last_product and (each.jumps_to or 0) > each.address + 0x100
    ]
    take = take | set(skips[:1]) - fall_through
    places = {each.address: index for index, each in enumerate(loop)}
    done, index = [], 0
    while index < len(loop):
        each = loop[index]
        done.append(each)
        target, is_conditional = each.jumps_to, each.text.startswith("@")
        if target in places and target > each.address:
            index = places[target] if each.address in take or not is_conditional else index + 1
        else:
            index += 1
        if len(done) > 20_000:
            raise SystemExit("the loop does not come to its end: see --take")
    return done


@dataclass
class Warp:
    """Where a warp is, and when it may go on."""

    block: int
    at: int = 0  # in the pass
    passes: int = 0
    free: float = 0.0
    barrier: int | None = None  # the block's barrier that it waits for
    counters: list[list[float]] = field(default_factory=lambda: [[] for _ in range(COUNTERS)])
    copies: float = 0.0  # when the last one arrives
    ends: list[int] = field(default_factory=list)


class Multiprocessor:
    """Four schedulers, each with every fourth warp, and what they share."""

    def __init__(
        self, code: list[Instruction], warps_of_block: int, blocks: int, apart: int = 0
    ) -> None:
        self.code = code
        self.warps = [Warp(index // warps_of_block) for index in range(warps_of_block * blocks)]
        for warp in self.warps:
            warp.free = warp.block * apart
        self.units = [dict.fromkeys(PIPES, 0.0) for _ in range(SCHEDULERS)]
        self.shared_free = 0.0
        self.arrived = [0] * blocks
        self.barriers = [0] * blocks  # that all have passed
        self.warps_of_block = warps_of_block
        self.spent: Counter[str] = Counter()  # of the first scheduler

    def run(self, passes: int) -> float:
        """Cycles of a pass; the first one, in which the warps still march in step, is left out."""
        time, turn = 0, [0] * SCHEDULERS
        while any(warp.passes < passes for warp in self.warps):
            for scheduler in range(SCHEDULERS):
                mine = self.warps[scheduler::SCHEDULERS]
                why = "nothing left"
                for step in range(len(mine)):
                    index = (turn[scheduler] + step) % len(mine)
                    if mine[index].passes == passes:
                        continue
                    why = self.try_to_issue(mine[index], self.units[scheduler], time)
                    if why == "issued":
                        turn[scheduler] = index + 1  # the others first
                        break
                if scheduler == 0:
                    self.spent[why] += 1
            time += 1
        first, last = (max(warp.ends[at] for warp in self.warps) for at in (0, -1))
        return (last - first) / (passes - 1)

    def try_to_issue(self, warp: Warp, units: dict[str, float], time: int) -> str:
        """Issue the warp's next instruction, or say what it waits for."""
        if warp.barrier is not None:
            if self.barriers[warp.block] <= warp.barrier:
                return "barrier"
            warp.barrier, warp.free = None, time + AFTER_BARRIER
        if warp.free > time:
            return "its last instruction"
        each = self.code[warp.at]
        for index, counter in enumerate(warp.counters):
            counter[:] = [end for end in counter if end > time]
            if each.waits >> index & 1 and counter:
                return f"operands of {each.name}"
        if each.name == "DEPBAR":
            left = int(each.text.split(",")[1], 16)
            if len(warp.counters[0]) > left:
                return "copies"
        unit, busy = UNITS.get(each.name, (None, 0))
        if unit:
            if units[unit] > time + 0.999:
                return f"{unit} unit"
            units[unit] = max(units[unit], time) + busy
        self.note_results(warp, each, time)
        warp.free = time + max(1, each.stall)
        if each.name == "BAR":
            warp.barrier = self.barriers[warp.block]
            self.arrived[warp.block] += 1
            if self.arrived[warp.block] % self.warps_of_block == 0:
                self.barriers[warp.block] += 1
        warp.at += 1
        if warp.at == len(self.code):
            warp.at, warp.passes = 0, warp.passes + 1
            warp.ends.append(time)
        return "issued"

    def note_results(self, warp: Warp, each: Instruction, time: int) -> None:
        """Set the counters that later instructions wait for."""
        unit = UNITS.get(each.name, ("", 0))[0]
        done = time + LATENCIES.get(each.name, LATENCIES.get(unit, 20))
        if each.wavefronts:
            self.shared_free = max(self.shared_free, time) + each.wavefronts
            done = max(time + SHARED, int(self.shared_free) + SHARED - 4)
        if each.name == "LDGSTS":
            warp.copies = time + ARRIVAL
        elif each.name == "LDGDEPBAR":
            warp.counters[0].append(warp.copies)
            return
        if each.sets < COUNTERS:
            warp.counters[each.sets].append(done)
        if each.frees < COUNTERS:
            warp.counters[each.frees].append(time + 14)


def compiled(source: Path) -> str:
    """The machine code of a source, as cuobjdump prints it."""
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "kernel.cubin"
        flags = ["-cubin", "-arch=sm_90", "-O3", "-std=c++20", "--expt-relaxed-constexpr"]
        run("nvcc", *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(built))
        return machine_code(built)


def main() -> None:
    """Print what the model says of one kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("kernel", help="a part of its readable name")
    parser.add_argument("--warps", type=int, default=8, help="of a block (default: 8)")
    parser.add_argument("--blocks", type=int, default=1, help="of the multiprocessor (default: 1)")
    parser.add_argument("--apart", type=int, default=0, help="cycles between blocks' beginnings")
    parser.add_argument("--take", action="append", default=[], metavar="ADDRESS")
    parser.add_argument("--fall-through", action="append", default=[], metavar="ADDRESS")
    parser.add_argument("--listing", action="store_true", help="print what a warp executes")
    given = parser.parse_args()
    functions = compiled(given.source).split("Function : ")[1:]
    names = readable([each.split()[0] for each in functions])
    chosen = [index for index, name in enumerate(names) if given.kernel in name]
    if not chosen:
        raise SystemExit(
            f"no kernel's name contains {given.kernel}; there are:\n" + "\n".join(names)
        )
    addresses = [{int(each, 16) for each in few} for few in (given.take, given.fall_through)]
    code = one_pass(main_loop(parse(functions[chosen[0]])), *addresses)
    if given.listing:
        print("\n".join(f"{each.address:05x} {each.stall:2} {each.text}" for each in code))
    processor = Multiprocessor(code, given.warps, given.blocks, given.apart)
    cycles = processor.run(passes=8)
    products = sum(each.name == "HMMA" for each in code)
    print(names[chosen[0]])
    print(
        f"{len(code)} instructions, {products} of them products; {cycles:.0f} cycles an iteration"
    )
    total = sum(processor.spent.values())
    for why, spent in processor.spent.most_common(6):
        print(f"  {spent / total:4.0%} {why}")


if __name__ == "__main__":
    main()
