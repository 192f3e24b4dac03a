"""From the plainest loop to an engine, one technique after the other, on the same requests.

    python benchmarks/ladder/ladder.py      # about a minute; writes ladder.json and ladder.svg here

Each rung sends other tokens to the same native core, with the same weights (SmolLM2, bf16):

    naive        one request at a time, its whole text again for each token (docs/learn, chapter 1)
    cache        one request at a time, one new token a step (chapter 2)
    batch        groups of requests; the next group begins when the last of this one has ended. Each
                 has a room for the longest text that may come (chapter 3)
    paged        the same, but a block is taken when a token needs it, so that more requests make a
                 group in the same memory (chapter 4)
    continuous   who is done leaves and who waits joins, before any step (chapter 5)

The last three have the same memory for keys and values. If no block is free, the request that came
last gives its blocks back and is computed again later. The gate: a rung counts only if it gives
each request the same tokens as the first rung does.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs/learn/experiments"))
from measured import COLOURS, axes, load_core, load_tokenizer, save

from octavo import _native
from octavo.runtime.loader import LoadedRuntime

BLOCK, LONGEST = 16, 128  # tokens of a block; of the longest prompt and answer
NUM_BLOCKS = 64  # 1,024 tokens, 22.5 MiB of SmolLM2's keys and values
TEXT = (
    "The old ferry crossed the river twice a day, with mail, with sheep, and now and then with a "
    "traveller who asked the ferryman about the weather. "
)


@dataclass
class Sequence:
    """A request: its tokens so far, how many it ends with, how many are computed, its blocks."""

    number: int
    tokens: list[int]
    end: int
    computed: int = 0
    table: list[int] = field(default_factory=list)

    @property
    def num_missing(self) -> int:
        """Blocks that its tokens need and that it does not have."""
        return -(-len(self.tokens) // BLOCK) - len(self.table)


@dataclass
class Measured:
    """What a rung took."""

    seconds: float
    steps: int
    most: int  # sequences in a step
    answers: dict[int, list[int]]


class Core:
    """The native core, and a count of its steps."""

    def __init__(self, loaded: LoadedRuntime) -> None:
        self._runtime = loaded.runtime
        self.steps = self.most = 0

    def step(self, sequences: list[Sequence]) -> None:
        """The tokens that are not computed yet, of all sequences; each gets its next token."""
        new = [sequence.tokens[sequence.computed :] for sequence in sequences]
        starts = np.cumsum([0, *map(len, new)], dtype=np.int32)
        tables = np.full((1, len(new), max(len(s.table) for s in sequences)), -1, np.int32)
        for place, sequence in enumerate(sequences):
            tables[0, place, : len(sequence.table)] = sequence.table
        batch = _native.Batch(
            token_ids=np.concatenate(new).astype(np.int32),
            row_starts=starts,
            context_lens=np.array([len(s.tokens) for s in sequences], np.int32),
            block_tables=tables,
            logit_rows=starts[1:] - 1,
        )
        for sequence, token in zip(sequences, self._runtime.step(batch).token_ids, strict=True):
            sequence.computed = len(sequence.tokens)
            sequence.tokens.append(int(token))
        self.steps, self.most = self.steps + 1, max(self.most, len(sequences))


def alone(core: Core, sequences: list[Sequence], has_cache: bool) -> None:
    """One request after the other, with a cache or without."""
    for sequence in sequences:
        sequence.table = list(range(LONGEST // BLOCK))
        while len(sequence.tokens) < sequence.end:
            if not has_cache:
                sequence.computed = 0
            core.step([sequence])


def together(core: Core, sequences: list[Sequence], has_rooms: bool, joins: bool) -> None:
    """Many requests in a step. has_rooms: each one's blocks are taken for its longest end.

    joins: requests start whenever there is room; otherwise when all that run have ended.
    """
    waiting, running, free = list(sequences), [], list(range(NUM_BLOCKS))
    while waiting or running:
        begins = joins or not running
        while begins and waiting:
            count = LONGEST // BLOCK if has_rooms else waiting[0].num_missing
            # Without rooms every one that runs will soon need a block: leave one for each.
            if count + (0 if has_rooms else len(running)) > len(free):
                break
            sequence = waiting.pop(0)
            sequence.table = [free.pop() for _ in range(count)]
            running.append(sequence)
        for sequence in list(running):  # in the order of arrival
            while sequence.num_missing > 0 and sequence in running:
                if not free:
                    last = running.pop()
                    free += last.table
                    last.table, last.computed = [], 0
                    waiting.insert(0, last)
                else:
                    sequence.table.append(free.pop())
        core.step(running)
        for sequence in [s for s in running if len(s.tokens) == s.end]:
            running.remove(sequence)
            free += sequence.table


RUNGS: dict[str, Callable[[Core, list[Sequence]], None]] = {
    "naive": lambda core, sequences: alone(core, sequences, has_cache=False),
    "cache": lambda core, sequences: alone(core, sequences, has_cache=True),
    "batch": lambda core, sequences: together(core, sequences, has_rooms=True, joins=False),
    "paged": lambda core, sequences: together(core, sequences, has_rooms=False, joins=False),
    "continuous": lambda core, sequences: together(core, sequences, has_rooms=False, joins=True),
}


def make_requests(count: int) -> list[Sequence]:
    """Prompts of 8 to 40 tokens; most answers are short, some have up to 88 tokens."""
    random = np.random.default_rng(1)
    text = load_tokenizer().encode(TEXT * 8)
    requests = []
    for number in range(count):
        start, length = int(random.integers(len(text) - 40)), int(random.integers(8, 41))
        wanted = int(np.clip(random.lognormal(3.0, 0.9), 4, LONGEST - length))
        requests.append(Sequence(number, text[start : start + length], length + wanted))
    return requests


def measure(name: str, loaded: LoadedRuntime, requests: list[Sequence]) -> Measured:
    """A rung on copies of the requests."""
    core, copies = Core(loaded), [Sequence(r.number, list(r.tokens), r.end) for r in requests]
    start = time.perf_counter()
    RUNGS[name](core, copies)
    seconds = time.perf_counter() - start
    return Measured(seconds, core.steps, core.most, {s.number: s.tokens for s in copies})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=32)
    arguments = parser.parse_args()
    loaded = load_core(max_model_len=LONGEST, num_kv_blocks=NUM_BLOCKS, block_size=BLOCK,
                       max_num_seqs=NUM_BLOCKS, max_num_batched_tokens=2048)  # fmt: skip
    requests = make_requests(arguments.requests)
    tokens = sum(request.end - len(request.tokens) for request in requests)
    measure("continuous", loaded, requests[:2])  # warm
    results: dict[str, Measured] = {}
    for name in RUNGS:
        results[name] = measure(name, loaded, requests)
        if results[name].answers != results["naive"].answers:
            raise SystemExit(f"{name} gives other tokens than naive; expected the same")
    report(results, tokens)


def report(results: dict[str, Measured], tokens: int) -> None:
    """The table and the plot."""
    speeds = {name: tokens / result.seconds for name, result in results.items()}
    table = [["rung", "steps", "most sequences in a step", "tokens a second", "gain", "in all"]]
    before = speeds["naive"]
    for name, result in results.items():
        row = [name, str(result.steps), str(result.most), f"{speeds[name]:.0f}"]
        table.append(
            [*row, f"{speeds[name] / before:.2f} ×", f"{speeds[name] / speeds['naive']:.1f} ×"]
        )
        before = speeds[name]
    plot = axes()
    colours = [COLOURS[name] for name in ("soft", "orange", "purple", "green", "blue")]
    bars = plot.bar(list(speeds), list(speeds.values()), color=colours)
    plot.bar_label(
        bars, [f"{speed:.0f}" for speed in speeds.values()], color=COLOURS["ink"], padding=2
    )
    plot.set(ylabel="tokens a second", ylim=(0, 1.12 * max(speeds.values())))
    plot.grid(axis="x", visible=False)
    figures = {name: {"seconds": r.seconds, "steps": r.steps} for name, r in results.items()}
    save(plot, {"tokens": tokens, "rungs": figures}, table)


if __name__ == "__main__":
    main()
