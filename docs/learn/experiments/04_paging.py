"""How many answers fit into the same memory: rooms of the longest length, and blocks of 1 to 256.

Requests as a chat server has them, drawn at random: most answers are short, few are long. octavo's
own BlockManager deals the blocks out; a token of SmolLM2's cache takes 22.5 KiB in bf16.
"""

import numpy as np
from measured import COLOURS, axes, save

from octavo.engine.block_manager import BlockManager

MEMORY, LONGEST = 16384, 2048  # tokens: 360 MiB of SmolLM2's cache, and the longest conversation
lengths = np.minimum(np.random.default_rng(1).lognormal(5.3, 0.8, 4000).astype(int) + 8, LONGEST)
SIZES = [1, 16, 32, 64, 128, 256]


def fill(block_size: int) -> tuple[int, float]:
    """Admit requests in order until one does not fit: (how many fit, part that holds a token)."""
    blocks = BlockManager(MEMORY // block_size, block_size)
    for number, length in enumerate(lengths.tolist()):
        if blocks.num_blocks_needed(length) > blocks.num_free_blocks:
            return number, int(lengths[:number].sum()) / MEMORY
        blocks.start(number, length)
    raise ValueError("all requests fit; expected more of them than the memory holds")


rooms = MEMORY // LONGEST
results = [(rooms, int(lengths[:rooms].sum()) / MEMORY), *map(fill, SIZES)]
names = ["rooms", *map(str, SIZES)]
plot = axes()
colours = [COLOURS["orange"], *[COLOURS["blue"]] * len(SIZES)]
bars = plot.bar(names, [100 * part for _, part in results], color=colours)
plot.bar_label(bars, [str(count) for count, _ in results], color=COLOURS["ink"], padding=2)
plot.set(xlabel="rooms of 2,048 tokens, or tokens in a block", ylim=(0, 112))
plot.set_ylabel("memory that holds a token (%)")
plot.grid(axis="x", visible=False)
table = [["memory is dealt out in", "sequences that fit", "memory that holds a token"]]
table += [
    [f"{'rooms of 2048' if name == 'rooms' else 'blocks of ' + name}", str(count), f"{part:.1%}"]
    for name, (count, part) in zip(names, results, strict=True)
]
save(plot, {"names": names, "fit": [r[0] for r in results], "part": [r[1] for r in results]}, table)
