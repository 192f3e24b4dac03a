"""What the workers of compare_cpu.py's other Pythons share; octavo is not imported here.

The settings are a JSON list, the first argument. The first line of output is what the worker says
of itself. It then reads a JSON list a line, [prompts, count], and answers each with the seconds.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol


class Worker(Protocol):
    """One model of a peer, loaded."""

    description: dict[str, Any]

    def generate(self, prompts: list[list[int]], count: int) -> float:
        """Seconds for `count` greedy tokens after each prompt."""


def serve(make: Callable[..., Worker]) -> None:
    """Make the worker from the settings, and answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a peer prints is no answer
    worker = make(*json.loads(sys.argv[1]))
    print(json.dumps(worker.description), file=answers, flush=True)
    for line in sys.stdin:
        prompts, count = json.loads(line)
        print(json.dumps(worker.generate(prompts, count)), file=answers, flush=True)


def require_tokens(peer: str, found: list[int], count: int) -> None:
    """Raise RuntimeError unless every answer has `count` tokens. found: how many each has."""
    if any(number != count for number in found):
        raise RuntimeError(f"{peer} answered {found} tokens; expected {count} of each")
