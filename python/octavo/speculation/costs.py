"""How long steps take by the number of their tokens, and how many drafts are worth it.

The number of drafts that gives the most tokens a second ("goodput", Liu et al. 2024, "Optimizing
Speculative Decoding for Serving Large Language Models Using Goodput", arXiv 2406.14066), from times
measured while the engine runs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence as SequenceOf

_RECENT = 0.1  # weight of a new measurement, once there are ten
_MOST_SIZES = 256
# A step of n tokens takes about as long as 9 + n units before anything is known: reading the
# weights takes as long as the arithmetic of nine tokens.
_READING = 9.0
_LEAST_SURVIVAL = 0.02


class StepCosts:
    """Seconds of a step that decodes, by its number of tokens: averages of recent ones."""

    def __init__(self) -> None:
        self._sizes: list[int] = []  # those measured, in order
        self._measured: dict[int, tuple[float, int]] = {}  # seconds, and how often

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        seconds = max(seconds, 1e-9)  # a clock may stand still
        mean, count = self._measured.get(num_tokens, (0.0, 0))
        if not count:
            if len(self._sizes) == _MOST_SIZES:  # the engine has changed its habits
                del self._measured[self._sizes.pop(len(self._sizes) // 2)]
            insort(self._sizes, num_tokens)
        mean += (seconds - mean) * max(_RECENT, 1 / (count + 1))
        self._measured[num_tokens] = (mean, count + 1)

    def is_known(self, num_tokens: int) -> bool:
        """Whether such a step was measured."""
        return num_tokens in self._measured

    def seconds(self, num_tokens: int) -> float:
        """The time of a step: measured, between two measured ones, or guessed from the nearest."""
        if not self._sizes:
            return _READING + num_tokens
        found = self._measured.get(num_tokens)
        if found is not None:
            return found[0]
        place = bisect_left(self._sizes, num_tokens)
        if 0 < place < len(self._sizes):
            low, high = self._sizes[place - 1], self._sizes[place]
            below, above = self._measured[low][0], self._measured[high][0]
            return below + (above - below) * (num_tokens - low) / (high - low)
        nearest = self._sizes[min(place, len(self._sizes) - 1)]
        return self._measured[nearest][0] * (_READING + num_tokens) / (_READING + nearest)


def choose_depths(
    survivals: SequenceOf[SequenceOf[float]],
    num_decodes: int,
    budget: int,
    costs: StepCosts,
    round_seconds: float = 0.0,
    least_gain: float = 1.02,
) -> tuple[list[int], float]:
    """How many drafts each sequence gets, for the most tokens a second; and what they may cost.

    survivals[s][j]: the probability that drafts 0 .. j of sequence s are all right, not increasing
    in j. num_decodes: sequences in the step, with drafts or without. budget: the most drafts in
    all. round_seconds: to make one draft for all sequences. least_gain: drafts must raise the
    number of tokens a second by this factor; 0: take the best number of drafts, one or more.
    Returns the depths, and the seconds that the step takes longer than one without drafts.
    """
    plain = costs.seconds(num_decodes)
    ranked = sorted(
        (-chance, position, index)
        for index, chances in enumerate(survivals)
        for position, chance in enumerate(chances)
        if chance >= _LEAST_SURVIVAL
    )[:budget]
    best, best_count, best_extra = least_gain * num_decodes / plain, 0, 0.0
    expected, deepest = float(num_decodes), 0
    for count, (negative, position, _) in enumerate(ranked, 1):
        expected -= negative
        deepest = max(deepest, position + 1)
        seconds = costs.seconds(num_decodes + count) + deepest * round_seconds
        if expected / seconds > best:
            best, best_count, best_extra = expected / seconds, count, seconds - plain
    depths = [0] * len(survivals)
    for _, _, index in ranked[:best_count]:
        depths[index] += 1
    return depths, best_extra
