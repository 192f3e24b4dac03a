"""Beam search and diverse beam search over the most probable tokens of each beam.

`reference/search.py` defines both; this is the same with lists of candidates in place of whole
rows, and gives the same tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np

from octavo.engine.request import FinishReason
from octavo.engine.search import Candidates, Move
from octavo.search.params import BeamSearchParams

Found = tuple[SequenceOf[int], FinishReason, float]


@dataclass
class Beam:
    """Tokens so far, and the sum of their log-probabilities: as the search counts it, and true."""

    token_ids: tuple[int, ...]
    score: np.float32
    logprob: float


@dataclass
class Finished:
    """An answer that has ended, by the score that its length makes of its sum."""

    beam: Beam
    score: np.float32
    reason: FinishReason


@dataclass
class Group:
    """Beams that compete with each other. is_done: nothing better can come."""

    beams: list[Beam]
    finished: list[Finished] = field(default_factory=list)
    is_done: bool = False


class BeamSearch:
    """A search for one request.

    stop_token_ids: tokens that end an answer. max_tokens: the length at which it ends in any case.
    """

    def __init__(
        self, params: BeamSearchParams, stop_token_ids: Collection[int], max_tokens: int
    ) -> None:
        self.num_beams = params.beam_width
        self._params = params
        self._stops = frozenset(stop_token_ids)
        self._max_tokens = max_tokens
        # One beam is greedy decoding, which ends with its first answer.
        self._early_stopping = True if params.beam_width == 1 else params.early_stopping
        num_groups = params.num_beam_groups
        self._width = params.beam_width // num_groups
        # With so many, at least `width` are left that do not end.
        self._num_kept = max(2, 1 + len(self._stops)) * self._width
        # A penalty can push so many tokens back.
        self.num_candidates = self._num_kept + (self.num_beams if num_groups > 1 else 0)
        start = Beam((), np.float32(0), 0.0)
        self._groups = [Group([start]) for _ in range(num_groups)]
        self._length = 0

    def advance(self, rows: SequenceOf[Candidates]) -> list[Move]:
        """See `engine.search.Search`."""
        active = [group for group in self._groups if not group.is_done]
        if not self._length:  # all groups begin with the prompt
            rows = [rows[0]] * len(active)
        moves: list[Move] = []
        chosen: Counter[int] = Counter()
        first = 0
        for group in active:
            own = rows[first : first + len(group.beams)]
            offset = first if self._length else 0
            first += len(group.beams)
            parents = self._advance_group(group, own, chosen)
            chosen.update(beam.token_ids[-1] for beam in group.beams)
            if not group.is_done:
                moves += [
                    Move(offset + parent, beam.token_ids[-1])
                    for parent, beam in zip(parents, group.beams, strict=True)
                ]
        self._length += 1
        return moves

    def results(self) -> list[Found]:
        """See `engine.search.Search`."""
        finished = [each for group in self._groups for each in group.finished]
        best = sorted(finished, key=lambda each: -each.score)
        return [(each.beam.token_ids, each.reason, each.beam.logprob) for each in best]

    def _advance_group(
        self, group: Group, rows: SequenceOf[Candidates], chosen: Counter[int]
    ) -> list[int]:
        """Choose the group's next beams; returns the beam, of the group, that each comes from."""
        ends_now = self._length + 1 >= self._max_tokens
        kept = self._best(group, rows, chosen)[: self._num_kept]
        ended = [ends_now or beam.token_ids[-1] in self._stops for _, beam in kept]
        going = [each for each, is_end in zip(kept, ended, strict=True) if not is_end]
        for (_, beam), is_end in zip(kept[: self._width], ended, strict=False):
            if is_end:
                self._finish(group, beam)
        parents = [parent for parent, _ in going[: self._width]]
        group.beams = [beam for _, beam in going[: self._width]]
        group.is_done = not group.beams or self._cannot_improve(group)
        return parents

    def _best(
        self, group: Group, rows: SequenceOf[Candidates], chosen: Counter[int]
    ) -> list[tuple[int, Beam]]:
        """Every continuation that a beam reports, the best first, with the beam it comes from."""
        penalty = np.float32(self._params.diversity_penalty)
        found = []
        for parent, (beam, row) in enumerate(zip(group.beams, rows, strict=True)):
            for token, logprob in zip(row.token_ids, row.logprobs, strict=True):
                counted = np.float32(logprob) - penalty * np.float32(chosen[token])
                score = np.float32(beam.score + counted)
                next_beam = Beam((*beam.token_ids, token), score, beam.logprob + logprob)
                found.append((parent, next_beam))
        found.sort(key=lambda each: (-each[1].score, each[0], each[1].token_ids[-1]))
        return found

    def _is_full(self, group: Group) -> bool:
        return len(group.finished) >= self._width

    def _finish(self, group: Group, beam: Beam) -> None:
        is_stop = beam.token_ids[-1] in self._stops
        score = np.float32(beam.score / np.float32(self._scale(len(beam.token_ids))))
        group.finished.append(Finished(beam, score, "stop" if is_stop else "length"))
        group.finished.sort(key=lambda each: -each.score)
        del group.finished[self._width :]

    def _scale(self, length: int) -> float:
        return float(length**self._params.length_penalty)

    def _cannot_improve(self, group: Group) -> bool:
        if not self._is_full(group):
            return False
        early, penalty = self._early_stopping, self._params.length_penalty
        if early is True:
            return True
        length = self._max_tokens if early == "never" and penalty > 0 else self._length + 1
        best = np.float32(group.beams[0].score / np.float32(self._scale(length)))
        return not best > group.finished[-1].score
