"""Decides for each step which sequences get how many drafts, and learns from what became of them.

Two promises. Answers do not change, because drafts are only ever checked (docs/speculation.md).
Nor do they get slower by more than a little: what drafts cost above plain decoding is kept as an
account, and while it is overdrawn there are no drafts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

from octavo.engine.drafter import Drafter
from octavo.engine.request import Sequence
from octavo.engine.schedule import Schedule, ScheduleBuilder, num_agreeing
from octavo.speculation.costs import StepCosts, choose_depths
from octavo.speculation.source import DraftSource

_FIRST_RATE = 0.5  # acceptance of drafts before any were seen
_OF_ALL, _OF_ONE = 1 / 32, 1 / 8  # weight of a new draft in the rates of all and of one sequence
_MOST_LOSS = 0.01  # part of the time that drafts may cost more than they save
_PROBING = 0.005  # part of the time for drafts that should not pay, to see whether they do now
_MEMORY = 0.998  # the account forgets: what counts are the last 500 steps
_REFRESH = 8  # steps with drafts, before one without is measured again, if drafts gain nothing
_FIRST_STEPS = 2  # the account begins with the time of so many steps


@dataclass
class _Drafting:
    """What is known about a sequence.

    own: what the source keeps. rates: acceptance by class. position, kind, drafts: of the last
    drafts that were made, whether they were checked or not; the first of them stands in for the
    token `position`.
    """

    own: Any
    rates: list[float]
    position: int = 0
    kind: int = -1
    drafts: SequenceOf[int] = ()


@dataclass
class _Account:
    """What drafts cost beyond what they saved, and the time of all steps; both fade."""

    lost: float = 0.0
    elapsed: float = 0.0
    allowance: float = 0.0  # for drafts that are not expected to pay

    def add(self, loss: float, seconds: float) -> None:
        self.lost = max(0.0, self.lost * _MEMORY + loss)
        self.elapsed = self.elapsed * _MEMORY + seconds
        self.allowance = min(self.allowance + _PROBING * seconds, 0.02 * self.elapsed)


@dataclass
class _Step:
    """Drafts of a step in preparation. seconds: spent on making them."""

    seconds: float = 0.0
    drafts: dict[int, SequenceOf[int]] = field(default_factory=dict)  # by id of the sequence


class Speculator(Drafter):
    """Drafts of one source, in numbers that follow acceptance and the time of steps.

    depth: the most drafts of a sequence. adaptive: False: always as many. is_paused: no drafts for
    now, and nothing is learned.
    """

    def __init__(
        self,
        source: DraftSource,
        depth: int,
        *,
        adaptive: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.is_paused = False
        self.taps = source.taps
        self._clock = clock
        self.use(source, depth, adaptive=adaptive)

    def use(self, source: DraftSource, depth: int, *, adaptive: bool = True) -> None:
        """Draft from this source from now on, for requests to come, and forget what was learned."""
        self.source = source
        self.depth = depth
        self.costs = StepCosts()
        self.rates = [_FIRST_RATE] * source.num_classes
        self._adaptive = adaptive
        self._account = _Account()
        self._round_seconds = 0.0  # to make one draft for all sequences
        self._step = _Step()
        self._spent: dict[int, float] = {}  # by the number of a step, seconds spent on its drafts
        self._num_decodes = 1
        self._num_drafted = 0  # steps with drafts since one without was measured

    def begin_step(self, running: Iterable[Sequence], step: ScheduleBuilder) -> None:
        """Choose and make the drafts for every sequence of the step."""
        started = self._clock()
        self._step = _Step()
        if self.is_paused:
            return
        sequences = list(running)
        self.source.begin_step(sequences)
        decoding = [sequence for sequence in sequences if not sequence.is_in_prefill]
        self._num_decodes = max(1, len(decoding))
        ready: list[tuple[Sequence, _Drafting]] = []
        for sequence in decoding:
            if not sequence.num_pending_tokens and sequence.takes_drafts:
                known = self._known(sequence)
                if known.kind >= 0:
                    ready.append((sequence, known))
        if not ready:
            return
        # A step that computes prompts is full of arithmetic: drafts would only make it longer.
        is_free = len(decoding) == len(sequences) or not self._adaptive
        room = max(0, min(step.budget - len(decoding), step.row_budget))
        depths = self._depths(ready, room) if is_free else [0] * len(ready)
        asked = [self.depth if self.source.is_free else depth for depth in depths]
        wanted = [
            (sequence, known.own, count)
            for (sequence, known), count in zip(ready, asked, strict=True)
            if count
        ]
        made = iter(self.source.draft(wanted) if wanted else ())
        for (sequence, known), count, depth in zip(ready, asked, depths, strict=True):
            if count:
                known.position, known.drafts = sequence.num_tokens, next(made)
                self._step.drafts[id(sequence)] = known.drafts[:depth]
        self._step.seconds = self._clock() - started
        rounds = max(asked)
        if rounds and not self.source.is_free:
            seconds = self._step.seconds / rounds
            weight = 0.2 if self._round_seconds else 1.0
            self._round_seconds += weight * (seconds - self._round_seconds)
        if any(depths):
            self._spent[step.number] = self._step.seconds

    def propose(self, sequence: Sequence) -> SequenceOf[int]:
        """The drafts that `begin_step` has made."""
        return self._step.drafts.get(id(sequence), ())

    def awaits(self, sequence: Sequence) -> bool:
        """Whether drafts after the tokens known now would pay, if the next token comes true."""
        if self.is_paused:
            return False
        known = self._known(sequence)
        if known.kind < 0:
            return False
        if not self._adaptive:
            return True
        chances = [self._survivals(known)]
        found = choose_depths(chances, self._num_decodes, self.depth, self.costs)
        return found.counts[0] > 0

    def end_step(self, schedule: Schedule, output: Any, seconds: float) -> None:
        """Learn what a step of this size costs, and whether its drafts have paid."""
        if self.is_paused:
            return
        spent = self._spent.pop(schedule.number, 0.0)
        self._spent = {n: s for n, s in self._spent.items() if n > schedule.number}
        entries = schedule.entries
        num_drafts = sum([len(entry.draft_token_ids) for entry in entries])
        accepted = _count_accepted(schedule, output.token_ids.tolist())
        self.source.end_step(schedule, output, accepted)
        if schedule.scored or schedule.num_tokens != len(entries) + num_drafts:
            return  # some of it are prompts
        first = not self.costs.is_known(len(entries))
        if num_drafts and not first:
            num_tokens = len(entries) + sum(accepted)
            plain = self.costs.seconds(len(entries)) * num_tokens / len(entries)
            self._account.add(seconds - plain, seconds)
        else:
            self._account.add(0.0, seconds)
        # Where steps overlap, the drafts were made while the step before was computed.
        self.costs.observe(schedule.num_tokens, max(seconds - spent, 0.2 * seconds))

    def _known(self, sequence: Sequence) -> _Drafting:
        """What is known about a sequence, brought up to date with its tokens."""
        known: _Drafting | None = sequence.drafting
        if known is None:
            known = _Drafting(self.source.create(sequence), list(self.rates))
            sequence.drafting = known
        elif known.drafts:
            self._learn(known, sequence.token_ids[known.position :])
        known.kind = self.source.look(sequence, known.own)
        return known

    def _learn(self, known: _Drafting, came: SequenceOf[int]) -> None:
        """Compare the last drafts with what came, as far as it has."""
        kind = known.kind
        for draft, token in zip(known.drafts, came, strict=False):
            place = min(kind, len(self.rates) - 1)
            is_right = float(draft == token)
            self.rates[place] += _OF_ALL * (is_right - self.rates[place])
            known.rates[place] += _OF_ONE * (is_right - known.rates[place])
            if draft != token:
                break
            kind += 1
        if came:
            known.drafts = ()

    def _survivals(self, known: _Drafting) -> list[float]:
        """The probabilities that the first draft is right, the first two are, and so on."""
        last, chance, chances = len(known.rates) - 1, 1.0, []
        for position in range(self.depth):
            chance *= known.rates[min(known.kind + position, last)]
            chances.append(chance)
        return chances

    def _depths(self, ready: SequenceOf[tuple[Sequence, _Drafting]], room: int) -> list[int]:
        if not self._adaptive:
            return [self.depth] * len(ready)
        costs, account, num_decodes = self.costs, self._account, self._num_decodes
        none = [0] * len(ready)
        if not costs.is_known(num_decodes):
            return none  # some steps without drafts, to compare with
        plain = costs.seconds(num_decodes)
        if account.lost > _MOST_LOSS * account.elapsed + _FIRST_STEPS * plain:
            return none
        chances = [self._survivals(known) for _, known in ready]
        seconds = self._round_seconds
        found = choose_depths(chances, num_decodes, room, costs, seconds)
        if any(found.counts):
            # The less drafts gain, the more often a step without them is measured again.
            self._num_drafted += 1
            if self._num_drafted <= min(_REFRESH * found.gain**2, 8 * _REFRESH):
                return found.counts
            self._num_drafted = 0
            return none
        probe = choose_depths(chances, num_decodes, room, costs, seconds, least_gain=0.0)
        extra = max(probe.extra, 0.1 * plain)
        if extra > account.allowance:
            return none
        account.allowance -= extra
        return probe.counts


def _count_accepted(schedule: Schedule, token_ids: SequenceOf[int]) -> list[int]:
    """How many drafts of each entry were right."""
    accepted, row = [], 0
    for entry in schedule.entries:
        accepted.append(num_agreeing(entry.draft_token_ids, token_ids[row:]))
        row += entry.num_samples
    return accepted
