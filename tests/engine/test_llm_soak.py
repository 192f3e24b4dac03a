"""One LLM over the real core, asked by many threads at once: nothing is wrong, nothing leaks.

OCTAVO_TEST_EXPLORE asks for ten thousand requests, other ones in every run.
"""

from __future__ import annotations

import gc
import os
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from server_helpers import tiny_llm

from octavo.engine.outputs import RequestOutput
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams

EXPLORE = bool(os.environ.get("OCTAVO_TEST_EXPLORE"))
COUNT = 10_000 if EXPLORE else 400
THREADS = 12
Question = tuple[list[int], SamplingParams]
Texts = list[str]


def make_question(rng: random.Random) -> Question:
    """A request whose answer is a function of itself alone."""
    prompt = [rng.randrange(6, 80) for _ in range(rng.choice([3, 17, 40, 90]))]
    if rng.random() < 0.3:
        prompt = [*range(6, 6 + 48), *prompt[:9]]  # a prefix that many share
    params = SamplingParams(
        max_tokens=rng.choice([1, 8, 30, 60]),
        temperature=rng.choice([0.0, 0.9]),
        seed=rng.randrange(1000),
        n=rng.choice([1, 1, 1, 2, 3]),
        presence_penalty=rng.choice([0, 0, 0, 0.7]),
    )
    return prompt, params


def texts_of(output: RequestOutput) -> Texts:
    return [answer.text for answer in output.outputs]


class User:
    """A thread that asks one thing after another, by every door, and counts what came of it."""

    def __init__(self, llm: LLM, known: list[tuple[Question, Texts]], seed: int) -> None:
        self.llm, self.known, self.rng = llm, known, random.Random(seed)
        self.counts: Counter[str] = Counter()

    def run(self, count: int) -> Counter[str]:
        doors = (self.generate, self.stream, self.leave, self.as_completed)
        while self.counts["asked"] < count:
            door = self.rng.choice(doors)
            chosen = self.rng.choices(self.known, k=self.rng.randrange(1, 7))
            before = self.counts["asked"]
            door(chosen)
            self.counts[door.__name__] += self.counts["asked"] - before
        return self.counts

    def check(self, found: Texts, want: Texts) -> None:
        self.counts["asked"] += 1
        self.counts["wrong"] += found != want

    def generate(self, chosen: list[tuple[Question, Texts]]) -> None:
        prompts, params = zip(*(question for question, _ in chosen), strict=True)
        outputs = self.llm.generate(list(prompts), list(params), progress=False)
        for output, (_, want) in zip(outputs, chosen, strict=True):
            self.check(texts_of(output), want)

    def stream(self, chosen: list[tuple[Question, Texts]]) -> None:
        (prompt, params), want = chosen[0]
        texts = [""] * params.n
        for chunk in self.llm.stream(prompt, params):
            texts[chunk.index] += chunk.text
        self.check(texts, want)

    def leave(self, chosen: list[tuple[Question, Texts]]) -> None:
        (prompt, params), _ = chosen[0]
        for number, _ in enumerate(self.llm.stream(prompt, params)):
            if number == self.rng.randrange(9):
                break
        self.counts["asked"] += 1

    def as_completed(self, chosen: list[tuple[Question, Texts]]) -> None:
        items = ((i, *question) for i, (question, _) in enumerate(chosen))
        num_wanted = self.rng.randrange(1, 9)
        for key, output in self.llm.generate_as_completed(items, max_in_flight=3):
            self.check(texts_of(output), chosen[key][1])
            num_wanted -= 1
            if not num_wanted:
                return


def known_answers(llm: LLM, rng: random.Random, count: int) -> Iterator[tuple[Question, Texts]]:
    for _ in range(count):
        prompt, params = make_question(rng)
        (output,) = llm.generate([prompt], params, progress=False)
        yield (prompt, params), texts_of(output)


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("overlap", [False, True])
def test_everything_at_once(tmp_path: Path, overlap: bool) -> None:
    rng = random.Random(None if EXPLORE else 5)
    known = list(known_answers(tiny_llm(tmp_path / "alone"), rng, COUNT // 10))
    # Eight sequences of up to 150 tokens want 76 blocks; there are 18.
    llm = tiny_llm(tmp_path / "asked", num_blocks=18, overlap_steps=overlap)
    counts: Counter[str] = Counter()
    memory: list[int] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(5):
            users = [User(llm, known, rng.randrange(10**9)) for _ in range(THREADS)]
            for found in pool.map(lambda user: user.run(-(-COUNT // (5 * THREADS))), users):
                counts += found
            memory.append(resident_bytes())
    gc.collect()
    stats = llm.engine.stats()
    print(dict(counts), f"{stats.num_steps} steps, {stats.num_preemptions} preemptions", memory)
    assert counts["asked"] >= COUNT and counts["wrong"] == 0
    assert min(counts[door] for door in ("generate", "stream", "leave", "as_completed")) > 10
    assert stats.num_preemptions > 0 and stats.num_prefix_hits > 0
    assert not llm.engine.has_unfinished_requests and stats.num_free_blocks == stats.num_blocks
    llm.engine.check_integrity()
    assert memory[-1] - memory[0] < 30 << 20, memory
