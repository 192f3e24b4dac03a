"""What is left of the speed when another program keeps one core busy: octavo beside llama.cpp.

    python benchmarks/neighbour.py [MODEL] [--formats int8] [--llama-bench PATH --gguf FILE]

A prompt and decoding, on a quiet machine and with a busy process bound to one core, every core in
turn. All systems and states take turns in every round, and the order turns round too. A ratio is
the median of the rounds' ratios to the quiet speed; of two cores, 1.5 are free, so 0.75 is there
to have. Nothing of octavo's is timed before its gate has passed: the same bits in both states.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import add_common, header, in_turns, make_parser, median_ratio, write_json
from peers import LlamaBinaries
from systems import Process, Row

from octavo.config import read_environment
from octavo.machine import processor
from octavo.weights.hub import resolve_model

Systems = dict[str, Process | LlamaBinaries]
Speeds = dict[str, dict[str, dict[str, list[float]]]]
"""Row -> system -> state ("quiet" or "core 1") -> tokens a second of each round."""


@contextmanager
def neighbour(core: int | None) -> Iterator[None]:
    """Keep a core busy; None: no core."""
    if core is None:
        yield
        return
    code = f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    time.sleep(0.3)  # Python takes its time to start
    try:
        yield
    finally:
        process.kill()
        process.wait()


def check(systems: Systems, rows: list[Row], cores: list[int]) -> dict[str, Any]:
    """octavo's gate in both states, by format and row; exits with 1 where the bits differ."""
    found: dict[str, dict[str, Any]] = {}
    for core in (None, *cores):
        with neighbour(core):
            for name, system in systems.items():
                if isinstance(system, LlamaBinaries):
                    continue
                answers = {row.name: system.check(row) for row in rows}
                passed = all(answer["passed"] for answer in answers.values())
                if not passed or found.setdefault(name, answers) != answers:
                    sys.exit(f"error: {name}: other bits with a neighbour on core {core}")
    return found


def measure(systems: Systems, rows: list[Row], cores: list[int], rounds: int) -> Speeds:
    speeds: Speeds = {row.name: {name: {} for name in systems} for row in rows}
    for number in range(rounds):
        for core in in_turns([None, *cores], number):
            state = "quiet" if core is None else f"core {core}"
            with neighbour(core):
                for row in rows:
                    for name in in_turns(systems, number):
                        speed = row.speed(systems[name].run(row))
                        speeds[row.name][name].setdefault(state, []).append(speed)
                        print(f"{number + 1}: {state:8} {row.name:8} {name:18} {speed:9.1f} tok/s")
    return speeds


def summarize(speeds: Speeds) -> dict[str, Any]:
    """Print and return of every row, system and state: speed, and how much of quiet it is."""
    summary: dict[str, Any] = {}
    for row, of_row in speeds.items():
        summary[row] = {}
        for name, states in of_row.items():
            found = {
                state: {
                    "speed": statistics.median(values),
                    "of_quiet": median_ratio(values, states["quiet"]),
                }
                for state, values in states.items()
            }
            summary[row][name] = found
            shares = (f"{k} {v['speed']:.0f} ({v['of_quiet']:.2f})" for k, v in found.items())
            print(f"{row:8} {name:18} {'  '.join(shares)}")
    return summary


def main() -> None:
    """Measure, print, and write JSON where asked to."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("model", nargs="?", help="a name or folder, as octavo takes it")
    add("--formats", default="int8", help="octavo's, with commas")
    add("--load-format", default="auto", choices=("auto", "dummy"))
    add_common(parser)
    add("-p", "--prompt", type=int, default=512, help="tokens of the prompt")
    add("-n", "--generate", type=int, default=96, help="tokens decoded")
    add("-r", "--rounds", type=int, default=5)
    add("--llama-bench", type=Path, help="path of the binary; left out: octavo alone")
    add("--gguf", type=Path, help="the model for it, as write_gguf.py writes it")
    arguments = parser.parse_args()
    if (arguments.llama_bench is None) != (arguments.gguf is None):
        parser.error("--llama-bench and --gguf belong together")
    path = resolve_model(arguments.model, read_environment())
    rows = [Row("prefill", arguments.prompt, 1), Row("decode", 1, arguments.generate)]
    cores = sorted(os.sched_getaffinity(0))
    print(f"{path.name}: {processor()}, {arguments.threads} threads")
    settings = (arguments.threads, arguments.load_format, rows)
    systems: Systems = {
        f"octavo {kind}": Process("octavo_system.OctavoCore", path, kind, *settings)
        for kind in arguments.formats.split(",")
    }
    if arguments.llama_bench is not None:
        llama = LlamaBinaries(str(arguments.llama_bench), str(arguments.gguf), arguments.threads)
        systems[f"llama.cpp {arguments.gguf.stem.rpartition('-')[2]}"] = llama
    try:
        checks = check(systems, rows, cores)
        for system in systems.values():
            for row in rows:
                system.warm_up(row)
        speeds = measure(systems, rows, cores, arguments.rounds)
    finally:
        for system in systems.values():
            system.close()
    result = {
        **header("neighbour", arguments),
        "model": path.name,
        "checks": checks,
        "tokens_per_second": speeds,
        "summary": summarize(speeds),
    }
    write_json(arguments.output, result)


if __name__ == "__main__":
    main()
