"""How much of the KV cache is used, paged beside contiguous, by number of requests at a time.

Requests of mixed lengths go through the real engine on a simulated device. At every step it notes
the tokens that are in the cache, the blocks that are held for them, and what a contiguous cache
would hold, which must set aside max_model_len tokens for each sequence. Bytes are those of
Llama-3.2-1B in bf16, 32 KiB a token.

    python benchmarks/kv_memory.py [--svg FILE]       the plot needs octavo[plot]
"""

from __future__ import annotations

import random
import sys
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


def plot(uses: dict[int, Use], path: str) -> None:
    """Write lines over the number of requests as an SVG; both axes linear."""
    import matplotlib
    import matplotlib.style
    from matplotlib.figure import Figure

    matplotlib.style.use("tableau-colorblind10")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    labels = ("tokens in the cache", "blocks held", "contiguous")
    for name, label, style in zip(Use._fields, labels, ("o-", "s-", "^-"), strict=True):
        gib = [getattr(use, name) * BYTES_A_TOKEN / GIB for use in uses.values()]
        axes.plot(list(uses), gib, style, label=label)
    axes.set(xlabel="Requests at a time", ylabel="KV cache (GiB)", xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "octavo"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


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
        plot(uses, sys.argv[sys.argv.index("--svg") + 1])


if __name__ == "__main__":
    main()
