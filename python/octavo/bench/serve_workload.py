"""What a load test asks: prompts and lengths, drawn from a distribution or read from a file."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import InvalidArgumentError
from octavo.files import read_text

# Short common words, each of which is one token for nearly every tokenizer.
_TEXT = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an
they which one you were her all she there would their we him been has when who will more no if out
so said what up its about into than them can only other new some could time these two may then do
first any my now such like our over man me even most made after also
"""
_WORDS = tuple(_TEXT.split())


@dataclass(frozen=True)
class Job:
    """One request: its path, its body without the model, and how long its answer may be."""

    path: str
    body: dict[str, Any]


Lengths = Callable[[random.Random], int]


def parse_lengths(name: str, text: str) -> Lengths:
    """A distribution of lengths: "128", "32-512" (uniform) or "200~100" (log-normal, mean~sd)."""
    if text.isdecimal() and int(text) > 0:
        return lambda _: int(text)
    if found := re.fullmatch(r"(\d+)-(\d+)", text):
        low, high = int(found[1]), int(found[2])
        if 1 <= low <= high:
            return lambda rng: rng.randint(low, high)
    if found := re.fullmatch(r"(\d+)~(\d+)", text):
        mean, deviation = int(found[1]), int(found[2])
        if mean >= 1:
            variance = math.log1p((deviation / mean) ** 2)
            middle = math.log(mean) - variance / 2
            return lambda rng: max(1, round(rng.lognormvariate(middle, math.sqrt(variance))))
    raise InvalidArgumentError(
        f"{name} is {text!r}; expected a length as in 128, a range as in 32-512, or mean and "
        f"standard deviation as in 200~100"
    )


def random_jobs(
    prompt_lengths: Lengths, answer_lengths: Lengths, shared_prefix: int, seed: int
) -> Iterator[Job]:
    """Endless requests of random words, about one token each; the same for the same seed.

    shared_prefix: words that all prompts begin with, besides their own.
    """
    rng = random.Random(seed)
    prefix = rng.choices(_WORDS, k=shared_prefix)
    while True:
        words = [*prefix, *rng.choices(_WORDS, k=prompt_lengths(rng))]
        body = {
            "prompt": " ".join(words),
            "max_tokens": answer_lengths(rng),
            "ignore_eos": True,
            "temperature": 0,
        }
        yield Job("/v1/completions", body)


def jobs_of_file(path: Path, answer_lengths: Lengths, seed: int) -> Iterator[Job]:
    """Requests from JSON lines with a "prompt" or "messages", over and over.

    What else a line holds (max_tokens, temperature) goes into its request; a line without
    max_tokens takes its length from the distribution.
    """
    entries = []
    text = read_text(path, 'JSON lines with "prompt" or "messages"')
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise InvalidArgumentError(f"line {number} of {path} is no JSON: {error}") from error
        if not isinstance(entry, dict) or not ({"prompt", "messages"} & entry.keys()):
            raise InvalidArgumentError(
                f'line {number} of {path} has neither "prompt" nor "messages"'
            )
        entries.append(entry)
    if not entries:
        raise InvalidArgumentError(f"{path} has no requests; expected a JSON object a line")
    return _jobs_of(entries, answer_lengths, random.Random(seed))


def _jobs_of(
    entries: list[dict[str, Any]], answer_lengths: Lengths, rng: random.Random
) -> Iterator[Job]:
    while True:
        for entry in entries:
            chat = "messages" in entry
            body = {"max_tokens": answer_lengths(rng), "temperature": 0, **entry}
            yield Job("/v1/chat/completions" if chat else "/v1/completions", body)


def poisson_gaps(rate: float, seed: int) -> Iterator[float]:
    """Seconds between arrivals of which `rate` come in a second; 0 for ever if it is infinite."""
    rng = random.Random(seed ^ 0x5EED)
    while True:
        yield 0.0 if math.isinf(rate) else rng.expovariate(rate)
