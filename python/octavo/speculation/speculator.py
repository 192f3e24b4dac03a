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

from octavo.draft_tree import MOST_RANKS, Ranks, leaves
from octavo.engine.branches import judge, num_shared
from octavo.engine.drafter import Drafter
from octavo.engine.request import Sequence
from octavo.engine.schedule import Schedule, ScheduleBuilder
from octavo.speculation.costs import StepCosts, choose_branches, choose_depths
from octavo.speculation.source import DraftSource

_FIRST_RATE = 0.5  # acceptance of drafts before any were seen
_FIRST_SECOND = 0.3  # and of second guesses, where the first was wrong
_FORGET = 1 / 1024  # what is known about second guesses fades while they are not tried
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
    token `position`. others: the other chains made then, each with its ranks.
    """

    own: Any
    rates: list[float]
    position: int = 0
    kind: int = -1
    drafts: SequenceOf[int] = ()
    others: SequenceOf[tuple[Ranks, SequenceOf[int]]] = ()


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
    # By id of the sequence: its drafts, and its other chains.
    drafts: dict[int, SequenceOf[int]] = field(default_factory=dict)
    branches: dict[int, SequenceOf[SequenceOf[int]]] = field(default_factory=dict)


Ready = SequenceOf[tuple[Sequence, _Drafting]]
"""Sequences that may have drafts in a step."""


class Speculator(Drafter):
    """Drafts of one source, in numbers that follow acceptance and the time of steps.

    depth: the most drafts of a chain. adaptive: False: always as many. num_branches: the most
    chains of a sequence. tree: the chains of a tree of a given shape, in place of num_branches; see
    draft_tree.py. is_paused: no drafts for now, and nothing is learned.
    """

    def __init__(
        self,
        source: DraftSource,
        depth: int,
        *,
        adaptive: bool = True,
        num_branches: int = 1,
        tree: SequenceOf[Ranks] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.is_paused = False
        self.states = source.states
        self._clock = clock
        self.use(source, depth, adaptive=adaptive, num_branches=num_branches, tree=tree)

    def use(
        self,
        source: DraftSource,
        depth: int,
        *,
        adaptive: bool = True,
        num_branches: int = 1,
        tree: SequenceOf[Ranks] = (),
    ) -> None:
        """Draft from this source from now on, for requests to come, and forget what was learned."""
        self.source = source
        self.depth = depth
        self.num_branches, self.tree = num_branches, tree
        self.settings: dict[str, Any] = {  # with which `use` comes back to this
            **{"source": source, "depth": depth, "adaptive": adaptive},
            **{"num_branches": num_branches, "tree": tree},
        }
        # By rank, how often a guess is right where the best one of its place is wrong.
        self.second_rates = [_FIRST_SECOND / rank for rank in range(1, MOST_RANKS)]
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
        if self.num_branches > 1 or self.tree:
            self._draft_trees(ready, depths, asked, step, room - sum(depths))
        else:
            self._draft_chains(ready, depths, asked)
        self._step.seconds = self._clock() - started
        rounds = max(asked)
        if rounds and not self.source.is_free:
            seconds = self._step.seconds / rounds
            weight = 0.2 if self._round_seconds else 1.0
            self._round_seconds += weight * (seconds - self._round_seconds)
        if any(depths):
            self._spent[step.number] = self._step.seconds

    def _draft_chains(self, ready: Ready, depths: SequenceOf[int], asked: SequenceOf[int]) -> None:
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

    def _draft_trees(
        self,
        ready: Ready,
        depths: SequenceOf[int],
        asked: SequenceOf[int],
        step: ScheduleBuilder,
        room: int,
    ) -> None:
        """As `_draft_chains`, with other chains; room: rows that these may take."""
        offered = [
            self._offers(sequence, known, depth or count)
            for (sequence, known), depth, count in zip(ready, depths, asked, strict=True)
        ]
        chosen = self._choose(ready, depths, offered, min(room, step.budget), step.branch_budget)
        wanted, owners = [], []
        for index, ((sequence, known), count) in enumerate(zip(ready, asked, strict=True)):
            if count:
                # What costs nothing is made to learn from, whether it is checked or not.
                others = offered[index] if self.source.is_free else chosen[index]
                wanted.append((sequence, known.own, [(0,) * count, *others]))
                owners.append(index)
        made = self.source.draft_trees(wanted) if wanted else ()
        for index, (_, _, paths), chains in zip(owners, wanted, made, strict=True):
            sequence, known = ready[index]
            known.position, known.drafts = sequence.num_tokens, chains[0]
            known.others = list(zip(paths[1:], chains[1:], strict=True))
            self._step.drafts[id(sequence)] = chains[0][: depths[index]]
            self._step.branches[id(sequence)] = [
                chain for path, chain in known.others if path in chosen[index] and chain
            ]

    def _offers(self, sequence: Sequence, known: _Drafting, depth: int) -> SequenceOf[Ranks]:
        """The other chains that a sequence could have, in order."""
        if not depth:
            return ()
        if self.tree:
            return [p for p in leaves({path[:depth] for path in self.tree}) if any(p)]
        return self.source.branches(sequence, known.own, depth, self.num_branches - 1)

    def _choose(
        self,
        ready: Ready,
        depths: SequenceOf[int],
        offered: SequenceOf[SequenceOf[Ranks]],
        room: int,
        most: int,
    ) -> list[SequenceOf[Ranks]]:
        """Of the chains offered to each sequence with drafts those that are worth their rows."""
        places: list[tuple[int, Ranks]] = []
        offers: list[tuple[float, int]] = []
        expected = float(self._num_decodes)
        for index, ((_, known), depth) in enumerate(zip(ready, depths, strict=True)):
            before: Ranks = (0,) * depth
            if depth:
                expected += sum(self._survivals(known)[:depth])
            for path in offered[index] if depth else ():
                places.append((index, path))
                offers.append((self._gain(known, path, num_shared(before, path)), len(path) + 1))
                before = path
        kept = set(range(len(offers)))
        if self._adaptive:
            fixed = self._round_seconds * max(depths)
            size = self._num_decodes + sum(depths)
            kept = choose_branches(offers, expected, size, self.costs, fixed)
        chosen: list[list[Ranks]] = [[] for _ in ready]
        for place, (index, path) in enumerate(places):
            if place in kept and most and offers[place][1] <= room:
                chosen[index].append(path)
                room, most = room - offers[place][1], most - 1
            else:
                rank = max(path) - 1
                forgotten = _FIRST_SECOND / (rank + 1) - self.second_rates[rank]
                self.second_rates[rank] += _FORGET * forgotten
        return list(chosen)

    def _gain(self, known: _Drafting, path: Ranks, shared: int) -> float:
        """The tokens that a chain is expected to add to those that have its first drafts, too."""
        last, chance, gain = len(known.rates) - 1, 1.0, 0.0
        for place, rank in enumerate(path):
            rate = known.rates[min(known.kind + place, last)]
            chance *= (1 - rate) * self.second_rates[rank - 1] if rank else rate
            gain += chance if place >= shared else 0.0
        return gain

    def propose(self, sequence: Sequence) -> SequenceOf[int]:
        """The drafts that `begin_step` has made."""
        return self._step.drafts.get(id(sequence), ())

    def branches(self, sequence: Sequence) -> SequenceOf[SequenceOf[int]]:
        """The other chains that `begin_step` has made and chosen."""
        return self._step.branches.get(id(sequence), ())

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
        judged = judge(schedule, output.token_ids.tolist())
        self.source.end_step(schedule, output, judged)
        if schedule.scored or schedule.num_tokens != len(entries) + num_drafts:
            return  # some of it are prompts
        first = not self.costs.is_known(len(judged))
        if num_drafts and not first:
            num_tokens = len(judged) + sum([found.num_accepted for found in judged])
            plain = self.costs.seconds(len(judged)) * num_tokens / len(judged)
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
                self._learn_second(known, kind - known.kind, token)
                break
            kind += 1
        if came:
            known.drafts = known.others = ()

    def _learn_second(self, known: _Drafting, place: int, token: int) -> None:
        """The draft in a place was wrong: which other guess of the place was right?"""
        best = (0,) * place
        for path, chain in known.others:
            if path[:place] == best and place < len(chain) and path[place]:
                rank = path[place] - 1
                is_right = float(chain[place] == token)
                self.second_rates[rank] += _OF_ALL * (is_right - self.second_rates[rank])

    def _survivals(self, known: _Drafting) -> list[float]:
        """The probabilities that the first draft is right, the first two are, and so on."""
        last, chance, chances = len(known.rates) - 1, 1.0, []
        for position in range(self.depth):
            chance *= known.rates[min(known.kind + position, last)]
            chances.append(chance)
        return chances

    def _depths(self, ready: Ready, room: int) -> list[int]:
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
