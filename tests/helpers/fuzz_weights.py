"""Damaging files in repeatable ways, and counting what a loader makes of them.

OCTAVO_TEST_EXPLORE asks for a thousand damaged files a test in place of two hundred.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from octavo.errors import OctavoError

COUNT = 1000 if os.environ.get("OCTAVO_TEST_EXPLORE") else 200  # damaged files of a test

# Numbers at which arithmetic on sizes and offsets tends to break.
EDGES = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def mutations(original: bytes, header: int, seed: int, count: int = COUNT) -> Iterator[bytes]:
    """`count` damaged copies of a file; most of the damage falls into its first `header` bytes."""
    generator = random.Random(seed)
    for _ in range(count):
        content = bytearray(original)
        for _ in range(generator.choice((1, 1, 1, 2, 5))):
            end = len(content) if generator.random() < 0.1 else min(header, len(content))
            if end == 0:
                break
            mutate(content, generator, generator.randrange(end))
        yield bytes(content)


def mutate(content: bytearray, generator: random.Random, place: int) -> None:
    """One change: a byte, a bit, an edge number, a digit, a cut, a run removed or repeated."""
    kind = generator.randrange(8)
    if kind == 0:
        content[place] = generator.randrange(256)
    elif kind == 1:
        content[place] ^= 1 << generator.randrange(8)
    elif kind == 2:
        width = generator.choice((1, 2, 4, 8))
        number = generator.choice(EDGES) % (1 << 8 * width)
        content[place : place + width] = number.to_bytes(width, "little")
    elif kind == 3:
        digits = [i for i in range(len(content[:4096])) if 0x30 <= content[i] <= 0x39]
        if digits:
            content[generator.choice(digits)] = generator.choice(b"0123456789-.e")
    elif kind == 4:
        del content[place:]
    elif kind == 5:
        del content[place : place + generator.randint(1, 16)]
    elif kind == 6:
        run = content[place : place + generator.randint(1, 32)]
        content[place:place] = run
    else:
        content[place:place] = bytes(generator.randrange(256) for _ in range(8))


def count_outcomes(
    load: Callable[[Path], None], path: Path, damaged: Iterator[bytes]
) -> dict[str, int]:
    """How often `load` read a damaged file, and how often it raised an OctavoError.

    Anything else that it raises goes through, and fails the test.
    """
    outcomes = {"read": 0, "refused": 0}
    for content in damaged:
        path.write_bytes(content)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            try:
                load(path)
            except OctavoError as error:
                assert str(error).encode("utf-8")  # can be printed
                outcomes["refused"] += 1
            else:
                outcomes["read"] += 1
    return outcomes
