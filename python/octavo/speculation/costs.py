"""How long steps take by the number of their tokens, and how many drafts are worth it.

The number of drafts that gives the most tokens a second ("goodput", Liu et al. 2024, "Optimizing
Speculative Decoding for Serving Large Language Models Using Goodput", arXiv 2406.14066), from times
measured while the engine runs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

_KEPT = 15  # measurements of a size
_LATEST = 7  # steps that tell the machine's load, by their median
_TRUSTED = 3  # measurements of a size, before others are compared with it
_MOST_SIZES = 256
# A step of n tokens takes about as long as 9 + n units before anything is known: reading the
# weights takes as long as the arithmetic of nine tokens.
_READING = 9.0
_LEAST_SURVIVAL = 0.02


class StepCosts:
    """Seconds of a step that decodes, by its number of tokens: medians of recent ones.

    A machine that others use, too, is faster at one time than at another. This `load` is told apart
    from the size of steps: what is kept are seconds at load 1. So steps of one size tell about
    those of all sizes, and a comparison of two sizes does not compare two times.
    """

    def __init__(self) -> None:
        self._sizes: list[int] = []  # those measured, in order
        self._measured: dict[int, deque[float]] = {}  # seconds at load 1
        self._medians: dict[int, float] = {}
        self._load = 1.0
        self._ratios: deque[float] = deque(maxlen=_LATEST)  # of seconds to those at load 1

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        seconds = max(seconds, 1e-9)  # a clock may stand still
        if self.is_known(num_tokens):
            self._ratios.append(seconds / self._medians[num_tokens])
            self._load = _median(self._ratios)
        if num_tokens not in self._measured:
            if len(self._sizes) == _MOST_SIZES:  # the engine has changed its habits
                dropped = self._sizes.pop(len(self._sizes) // 2)
                del self._measured[dropped], self._medians[dropped]
            insort(self._sizes, num_tokens)
            self._measured[num_tokens] = deque(maxlen=_KEPT)
        self._measured[num_tokens].append(seconds / self._load)
        self._medians[num_tokens] = _median(self._measured[num_tokens])

    def is_known(self, num_tokens: int) -> bool:
        """Whether such steps were measured often enough to compare others with them."""
        return len(self._measured.get(num_tokens, ())) >= _TRUSTED

    def seconds(self, num_tokens: int) -> float:
        """The time of a step now: measured, between two measured ones, or from the nearest."""
        return self._load * self._at_load_one(num_tokens)

    def _at_load_one(self, num_tokens: int) -> float:
        if not self._sizes:
            return _READING + num_tokens
        found = self._medians.get(num_tokens)
        if found is not None:
            return found
        place = bisect_left(self._sizes, num_tokens)
        if 0 < place < len(self._sizes):
            low, high = self._sizes[place - 1], self._sizes[place]
            below, above = self._medians[low], self._medians[high]
            return below + (above - below) * (num_tokens - low) / (high - low)
        nearest = self._sizes[min(place, len(self._sizes) - 1)]
        return self._medians[nearest] * (_READING + num_tokens) / (_READING + nearest)


def choose_branches(
    offers: SequenceOf[tuple[float, int]],
    expected: float,
    num_tokens: int,
    costs: StepCosts,
    fixed_seconds: float = 0.0,
    least_gain: float = 1.02,
) -> set[int]:
    """Which branches to check beside the chains that are chosen, for the most tokens a second.

    offers: of each branch the tokens that it is expected to add, and the rows that it takes.
    expected: tokens that the step brings without them. num_tokens: its size without them.
    fixed_seconds: to make the drafts. least_gain: branches must raise the tokens a second by this
    factor. Returns their indices.
    """
    ranked = sorted(range(len(offers)), key=lambda i: -offers[i][0] / offers[i][1])
    plain = expected / (costs.seconds(num_tokens) + fixed_seconds)
    best, best_count = least_gain * plain, 0
    for count, index in enumerate(ranked, 1):
        expected += offers[index][0]
        num_tokens += offers[index][1]
        speed = expected / (costs.seconds(num_tokens) + fixed_seconds)
        if speed > best:
            best, best_count = speed, count
    return set(ranked[:best_count])


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


class Depths(NamedTuple):
    """How many drafts each sequence gets.

    extra: the seconds that the step takes longer than one without drafts. gain: by what factor
    drafts raise the number of tokens a second.
    """

    counts: list[int]
    extra: float
    gain: float


def choose_depths(
    survivals: SequenceOf[SequenceOf[float]],
    num_decodes: int,
    budget: int,
    costs: StepCosts,
    round_seconds: float = 0.0,
    least_gain: float = 1.05,
) -> Depths:
    """How many drafts each sequence gets, for the most tokens a second.

    survivals[s][j]: the probability that drafts 0 .. j of sequence s are all right, not increasing
    in j. num_decodes: sequences in the step, with drafts or without. budget: the most drafts in
    all. round_seconds: to make one draft for all sequences. least_gain: drafts must raise the
    number of tokens a second by this factor; 0: take the best number of drafts, one or more.
    """
    plain = costs.seconds(num_decodes)
    ranked = sorted(
        (-chance, position, index)
        for index, chances in enumerate(survivals)
        for position, chance in enumerate(chances)
        if chance >= _LEAST_SURVIVAL
    )[:budget]
    best, best_count, best_extra = least_gain, 0, 0.0
    expected, deepest = float(num_decodes), 0
    for count, (negative, position, _) in enumerate(ranked, 1):
        expected -= negative
        deepest = max(deepest, position + 1)
        seconds = costs.seconds(num_decodes + count) + deepest * round_seconds
        gain = expected / num_decodes * plain / seconds
        if gain > best:
            best, best_count, best_extra = gain, count, seconds - plain
    depths = [0] * len(survivals)
    for _, _, index in ranked[:best_count]:
        depths[index] += 1
    return Depths(depths, best_extra, best if best_count else 1.0)
