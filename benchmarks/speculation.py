"""Speed-up by the acceptance of drafts: always seven of them, and as many as pay.

The real drafter decides for sequences on a simulated device, whose step of n tokens takes
max(1, n / 16) units and 0.02 n more: it reads its weights for a unit, and is full of arithmetic
from 16 tokens on. Each draft is right with the given probability. The same figures on any machine.

    python benchmarks/speculation.py [--svg FILE]       the plot needs octavo[plot]
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence as SequenceOf
from types import SimpleNamespace
from typing import Any

import numpy as np

from octavo.engine.request import Sequence
from octavo.engine.schedule import ScheduleBuilder, num_agreeing
from octavo.sampling_params import SamplingParams
from octavo.speculation.source import DraftSource
from octavo.speculation.speculator import Speculator

ACCEPTANCES = [i / 20 for i in range(21)]
BATCHES = (1, 4, 16, 64)
DEPTH, NUM_STEPS, RIGHT = 7, 500, 1


class Coin(DraftSource):
    """Drafts that are right, each with the same probability."""

    is_free = True

    def __init__(self, acceptance: float) -> None:
        self._rng, self._acceptance = random.Random(3), acceptance

    def draft(self, wanted: SequenceOf[tuple[Sequence, Any, int]]) -> SequenceOf[SequenceOf[int]]:
        """RIGHT, or something else."""
        return [
            [RIGHT if self._rng.random() < self._acceptance else 0 for _ in range(count)]
            for _, _, count in wanted
        ]


def step_seconds(num_tokens: int) -> float:
    """The simulated device."""
    return max(1.0, num_tokens / 16) + 0.02 * num_tokens


def speed_up(acceptance: float, batch: int, *, adaptive: bool) -> float:
    """Of a batch that decodes for NUM_STEPS steps, over the same tokens without drafts."""
    drafter = Speculator(Coin(acceptance), DEPTH, adaptive=adaptive, clock=lambda: 0.0)
    params = SamplingParams(max_tokens=10**6)
    sequences = [Sequence(i, [2, 3], params) for i in range(batch)]
    total = plain = 0.0
    for number in range(NUM_STEPS):
        for sequence in sequences:
            sequence.num_computed_tokens = sequence.num_tokens - 1
        step = ScheduleBuilder(number, 1024, 0.0, 512)
        drafter.begin_step(sequences, step)
        for sequence in sequences:
            step.add(sequence, 1, 1, tuple(drafter.propose(sequence)))
        schedule = step.build(batch)
        rows = np.full(len(schedule.row_sequences), RIGHT, np.int32)
        seconds = step_seconds(schedule.num_tokens)
        drafter.end_step(schedule, SimpleNamespace(token_ids=rows), seconds)
        for entry in schedule.entries:
            count = 1 + num_agreeing(entry.draft_token_ids, [RIGHT] * DEPTH)
            entry.sequence.token_ids += [RIGHT] * count
            plain += step_seconds(batch) * count / batch
        total += seconds
    return plain / total


def main(arguments: SequenceOf[str]) -> None:
    """Print the table; draw the plot where --svg names a file."""
    found = {
        (batch, adaptive): [speed_up(a, batch, adaptive=adaptive) for a in ACCEPTANCES]
        for batch in BATCHES
        for adaptive in (False, True)
    }
    heads = [f"{batch} {'adaptive' if adaptive else 'always 7'}" for batch, adaptive in found]
    print("| right | " + " | ".join(heads) + " |")
    print("|" + " ---: |" * (len(heads) + 1))
    for row in range(0, len(ACCEPTANCES), 4):
        cells = " | ".join(f"{speeds[row]:.2f}" for speeds in found.values())
        print(f"| {ACCEPTANCES[row]:.1f} | {cells} |")
    if arguments[:1] == ["--svg"]:
        draw(found, arguments[1])


def draw(found: dict[tuple[int, bool], list[float]], path: str) -> None:
    """Speed-up over acceptance, a line for each batch size; dashed: always seven drafts."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "octavo"}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for (batch, adaptive), speeds in found.items():
            color = f"C{BATCHES.index(batch)}"
            label = f"batch {batch}" if adaptive else None
            axes.plot(ACCEPTANCES, speeds, "-" if adaptive else "--", color=color, label=label)
        axes.axhline(1.0, color="gray", linewidth=0.8)
        axes.set_xlabel("probability that a draft is right (dashed: always seven drafts)")
        axes.set_ylabel("speed-up over plain decoding")
        axes.set_yscale("log", base=2)
        axes.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["0.25", "0.5", "1", "2", "4", "8"])
        axes.legend()
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1:])
