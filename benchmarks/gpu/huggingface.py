"""Hugging Face transformers on the same GPU, in the same shape.

    python benchmarks/gpu/huggingface.py [--compiled]

Plain: eager, sdpa, dynamic cache. Compiled: a static cache and torch.compile with CUDA graphs
("reduce-overhead"), its fastest way to decode one sequence; compiling takes minutes. Decoding is a
greedy loop behind a prompt, which is part of the time, and small.
"""

from __future__ import annotations

import argparse
import statistics

from results import EMULATE, SHAPE, TORCH_DEVICE, keep
from systems import Row
from transformers_system import Transformers

DECODED, ROUNDS, PROMPTS, DEPTHS = 128, 3, (128, 512, 2048, 8192), (128, 2048)
if EMULATE:
    DECODED, ROUNDS, PROMPTS, DEPTHS = 2, 1, (5,), (5,)


def main() -> None:
    """Time prefill and decoding and keep the medians, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiled", action="store_true")
    given = parser.parse_args()
    # There is no compiler in the emulation's place: the static cache alone.
    cache = "dynamic" if not given.compiled else "static" if EMULATE else "compiled"
    system = Transformers(str(SHAPE), "bf16", 8, "dummy", cache, TORCH_DEVICE)
    name = "huggingface-compiled" if given.compiled else "huggingface"
    rows = {f"prefill {length}": Row("prefill", length, 1) for length in PROMPTS}
    if given.compiled:
        rows = {}
    mark = ", compiled" if given.compiled else ""
    rows |= {f"decode @{depth}{mark}": Row("context", depth, DECODED) for depth in DEPTHS}
    found: dict[str, float] = {}
    for what, row in rows.items():
        speeds = [row.speed(system.run(row)) for _ in range(ROUNDS + 1)]
        found[what] = statistics.median(speeds[1:])  # the first one warms up
        print(f"{what}: {found[what]:.1f} tokens/s", flush=True)
        keep(name, {"tokens_per_second": found})


if __name__ == "__main__":
    main()
