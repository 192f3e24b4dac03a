"""How much of the KV cache is used, paged beside contiguous, by number of requests at a time.

Requests of mixed lengths go through the real engine on a simulated device. At every step it notes
the tokens that are in the cache, the blocks that are held for them, and what a contiguous cache
would hold, which must set aside max_model_len tokens for each sequence. Bytes are those of
Llama-3.2-1B in bf16, 32 KiB a token.

    python benchmarks/kv_memory.py [--svg FILE]
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import NamedTuple

from octavo.config import RuntimeOptions
from octavo.trace.simulation import Arrival, CostModel, Simulation

BYTES_A_TOKEN = 32 * 1024
BLOCK_SIZE, MAX_MODEL_LEN = 16, 2048
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
GIB = 2**30


class Use(NamedTuple):
    """Mean tokens of the steps in which the batch was full."""

    live: float
    paged: float
    contiguous: float


def requests(count: int) -> list[Arrival]:
    """Prompts of 20 to 480 tokens, answers of 50 to 350: 450 in the end on the average."""
    generator = random.Random(3)
    return [
        Arrival(0.0, str(i), generator.randrange(20, 480), generator.randrange(50, 350))
        for i in range(count)
    ]


def measure(batch_size: int) -> Use:
    options = RuntimeOptions(
        "bf16", "bf16", BLOCK_SIZE, MAX_MODEL_LEN, batch_size, 512, event_log_capacity=1000
    )
    simulation = Simulation(options, batch_size * MAX_MODEL_LEN // BLOCK_SIZE, CostModel())
    engine, used = simulation.engine, []
    compute = engine.step

    def step() -> list[object]:
        chunks = compute()
        scheduler, blocks = engine.scheduler, engine.blocks
        if scheduler.num_running == batch_size:
            num_held = blocks.num_blocks - blocks.num_free_blocks
            used.append((scheduler.num_live_tokens, num_held * BLOCK_SIZE))
        return list(chunks)

    engine.step = step  # type: ignore[assignment,method-assign]
    simulation.run(requests(6 * batch_size + 20))
    live, paged = (sum(column) / len(used) for column in zip(*used, strict=True))
    return Use(live, paged, batch_size * MAX_MODEL_LEN)


def plot(uses: dict[int, Use]) -> str:
    """Lines over the number of requests; both axes linear."""
    width, height, left, bottom = 640, 400, 70, 50
    most = max(use.contiguous for use in uses.values()) * BYTES_A_TOKEN / GIB

    def point(batch_size: int, tokens: float) -> str:
        x = left + (width - left - 20) * batch_size / max(uses)
        y = (height - bottom) * (1 - tokens * BYTES_A_TOKEN / GIB / most) + 10
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + 20}" '
        'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>'
    ]
    for i in range(5):
        y = (height - bottom) * (1 - i / 4) + 10
        label = f"{most * i / 4:.1f}{' GiB' * (i == 4)}"
        parts.append(
            f'<line x1="{left}" x2="{width - 20}" y1="{y}" y2="{y}" stroke="#ddd"/>'
            f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{label}</text>'
        )
    for batch_size in uses:
        x = point(batch_size, 0).split(",")[0]
        if batch_size >= 8 or batch_size == 1:
            label = f'y="{height - bottom + 28}" text-anchor="middle">{batch_size}'
            parts.append(f'<text x="{x}" {label}</text>')
    lines = (("contiguous", "#c0392b"), ("paged", "#2471a3"), ("live", "#27ae60"))
    for name, color in lines:
        points = " ".join(point(size, getattr(use, name)) for size, use in uses.items())
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
    for i, (name, color) in enumerate(lines):
        text = {"live": "tokens in the cache", "paged": "blocks held"}.get(name, name)
        parts.append(f'<text x="{left + 20}" y="{30 + 18 * i}" fill="{color}">{text}</text>')
    parts.append(
        f'<text x="{width / 2}" y="{height + 5}" text-anchor="middle">requests at a time</text>'
        "</svg>"
    )
    return "".join(parts)


def main() -> None:
    uses = {batch_size: measure(batch_size) for batch_size in BATCH_SIZES}
    print("requests  live GiB  paged GiB  contiguous GiB  live/paged  live/contiguous")
    for batch_size, use in uses.items():
        gib = [tokens * BYTES_A_TOKEN / GIB for tokens in use]
        print(
            f"{batch_size:8} {gib[0]:9.3f} {gib[1]:10.3f} {gib[2]:15.3f} "
            f"{use.live / use.paged:10.1%} {use.live / use.contiguous:15.1%}"
        )
    if "--svg" in sys.argv:
        Path(sys.argv[sys.argv.index("--svg") + 1]).write_text(plot(uses), encoding="utf-8")


if __name__ == "__main__":
    main()
