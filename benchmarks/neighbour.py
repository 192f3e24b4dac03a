"""What is left of the speed when another program keeps one core busy: octavo beside llama.cpp.

    python benchmarks/neighbour.py [MODEL] [--formats int8] [--llama-bench PATH --gguf FILE]

A prompt and decoding, on a quiet machine and with a busy process bound to one core, every core in
turn. All sides and states take turns in every round, and the order turns round too. A ratio is the
median of the rounds' ratios to the quiet speed; of two cores, 1.5 are free, so 0.75 is there to
have. Nothing of octavo's is timed before its gate has passed: the same bits in both states.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpu_sides import OctavoSide
from llama_sides import LlamaBinaries
from machine import asked, stamp
from rows import Row
from sides import Remote

from octavo import _native
from octavo.config import read_environment
from octavo.machine import processor
from octavo.weights.hub import resolve_model


def _spin(core: int) -> None:
    os.sched_setaffinity(0, [core])
    while True:
        pass


@contextmanager
def neighbour(core: int | None) -> Iterator[None]:
    """A process that keeps a core busy; None: no such process."""
    if core is None:
        yield
        return
    process = multiprocessing.get_context("spawn").Process(target=_spin, args=(core,), daemon=True)
    process.start()
    time.sleep(0.3)  # Python takes its time to start
    try:
        yield
    finally:
        process.kill()
        process.join()


def ask(side: Remote | LlamaBinaries, what: str, row: Row) -> Any:
    """Ask a side, wherever it runs."""
    return side(what, row) if isinstance(side, Remote) else getattr(side, what)(row)


def check(sides: dict[str, Remote | LlamaBinaries], rows: list[Row], cores: list[int]) -> Any:
    """octavo's gate in both states, by side and row; exits with 1 where the bits differ."""
    found: dict[str, dict[str, Any]] = {}
    for core in (None, *cores):
        with neighbour(core):
            for name, side in sides.items():
                if isinstance(side, LlamaBinaries):
                    continue
                answers = {row.name: ask(side, "check", row) for row in rows}
                passed = all(answer["passed"] for answer in answers.values())
                if not passed or found.setdefault(name, answers) != answers:
                    sys.exit(f"error: {name}: other bits with a neighbour on core {core}")
    return found


def measure(
    sides: dict[str, Remote | LlamaBinaries], rows: list[Row], cores: list[int], rounds: int
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Row -> side -> state ("quiet" or "core 1") -> tokens a second of each round."""
    speeds: dict[str, dict[str, dict[str, list[float]]]] = {
        row.name: {name: {} for name in sides} for row in rows
    }
    for number in range(rounds):
        turn = 1 if number % 2 == 0 else -1
        for core in [None, *cores][::turn]:
            state = "quiet" if core is None else f"core {core}"
            with neighbour(core):
                for row in rows:
                    for name in list(sides)[::turn]:
                        speed = float(ask(sides[name], "run", row))
                        speeds[row.name][name].setdefault(state, []).append(speed)
                        print(f"{number + 1}: {state:8} {row.name:8} {name:18} {speed:9.1f} tok/s")
    return speeds


def summarize(speeds: dict[str, dict[str, dict[str, list[float]]]]) -> dict[str, Any]:
    """Of every row, side and state: the median speed, and of the rounds' ratios to quiet."""
    return {
        row: {
            side: {
                state: {
                    "speed": statistics.median(found),
                    "of_quiet": statistics.median(
                        [speed / quiet for speed, quiet in zip(found, states["quiet"], strict=True)]
                    ),
                }
                for state, found in states.items()
            }
            for side, states in of_row.items()
        }
        for row, of_row in speeds.items()
    }


def main() -> None:
    """Measure, print, and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("model", nargs="?", help="a name or folder, as octavo takes it")
    add("--formats", default="int8", help="octavo's, with commas")
    add("--load-format", default="auto", choices=("auto", "dummy"))
    add("--threads", type=int, default=_native.build_info()["physical_cores"])
    add("-p", "--prompt", type=int, default=512, help="tokens of the prompt")
    add("-n", "--generate", type=int, default=96, help="tokens decoded")
    add("-r", "--rounds", type=int, default=5)
    add("--llama-bench", type=Path, help="path of the binary; left out: octavo alone")
    add("--gguf", type=Path, help="the model for it, as write_gguf.py writes it")
    add("--output", type=Path, help="also write everything to this JSON file")
    arguments = parser.parse_args()
    if (arguments.llama_bench is None) != (arguments.gguf is None):
        parser.error("--llama-bench and --gguf belong together")
    path = resolve_model(arguments.model, read_environment())
    rows = [Row("prefill", arguments.prompt, 1), Row("decode", 1, arguments.generate)]
    cores = sorted(os.sched_getaffinity(0))
    print(f"{path.name}: {processor()}, {arguments.threads} threads")
    sides: dict[str, Remote | LlamaBinaries] = {
        f"octavo {kind}": Remote(
            OctavoSide, path, kind, arguments.threads, arguments.load_format, rows
        )
        for kind in arguments.formats.split(",")
    }
    if arguments.llama_bench is not None:
        bench, file = arguments.llama_bench, arguments.gguf
        batched = bench.with_name("llama-batched-bench")
        sides[f"llama.cpp {file.stem.rpartition('-')[2]}"] = LlamaBinaries(
            bench, batched, file, arguments.threads
        )
    try:
        checks = check(sides, rows, cores)
        for side in sides.values():
            for row in rows:
                ask(side, "warm_up", row)
        speeds = measure(sides, rows, cores, arguments.rounds)
    finally:
        for side in sides.values():
            side.close()
    summary = summarize(speeds)
    for name, of_row in summary.items():
        for side, states in of_row.items():
            shares = "  ".join(
                f"{state} {figures['speed']:.0f} ({figures['of_quiet']:.2f})"
                for state, figures in states.items()
            )
            print(f"{name:8} {side:18} {shares}")
    if arguments.output is not None:
        result = {
            "benchmark": "neighbour",
            "model": path.name,
            "arguments": asked(arguments),
            "machine": stamp(arguments.threads),
            "checks": checks,
            "tokens_per_second": speeds,
            "summary": summary,
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
