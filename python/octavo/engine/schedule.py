"""What one step is: the scheduler's decisions, written down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from octavo.engine.block_manager import BlockCopy
from octavo.engine.request import Sequence


class ScheduledSequence(NamedTuple):
    """One sequence's part in a step.

    It computes its tokens start .. start + num_new_tokens - 1. draws_token: these are the last it
    has, so that its next token is drawn in this step.
    """

    sequence: Sequence
    start: int
    num_new_tokens: int
    draws_token: bool


class Schedule(NamedTuple):
    """One step. number: counted from 0 over all that computed something.

    entries: who computes what, the num_decodes that decode before the prompts. preempted: who lost
    its blocks to allow it. admitted: who got blocks. copies: to be done before anything else.
    """

    entries: tuple[ScheduledSequence, ...]
    preempted: tuple[Sequence, ...] = ()
    admitted: tuple[Sequence, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    num_decodes: int = 0
    number: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        prompts = self.entries[self.num_decodes :]
        return self.num_decodes + sum([entry.num_new_tokens for entry in prompts])

    @property
    def num_attended(self) -> int:
        """For every token the step computes the tokens it attends to, summed."""
        total = self.num_decodes + sum([entry.start for entry in self.entries[: self.num_decodes]])
        for _, start, num_new_tokens, _ in self.entries[self.num_decodes :]:
            total += num_new_tokens * start + num_new_tokens * (num_new_tokens + 1) // 2
        return total


@dataclass(frozen=True)
class SchedulerLimits:
    """max_num_seqs and max_num_batched_tokens bound a step, max_model_len prompt plus answer.

    priority_ageing_seconds: what one level of priority is worth; see `Scheduler.add`.
    enable_prefix_caching: whether to look for known beginnings; answers of one request share their
    prompt in any case. headroom_blocks: how many blocks must be free for each running sequence
    when another joins; docs/scheduler.md says why two.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    priority_ageing_seconds: float = 30.0
    enable_prefix_caching: bool = True
    headroom_blocks: int = 2


@dataclass
class ScheduleBuilder:
    """A schedule in the making, the number-th.

    budget: the tokens that may still be added. now: the time in seconds.
    """

    number: int
    budget: int
    now: float
    entries: list[ScheduledSequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)

    def add(self, sequence: Sequence, num_new_tokens: int) -> None:
        """Let the sequence compute so many of its uncomputed tokens."""
        start = sequence.num_computed_tokens
        draws_token = num_new_tokens == sequence.num_uncomputed_tokens
        self.entries.append(ScheduledSequence(sequence, start, num_new_tokens, draws_token))
        self.budget -= num_new_tokens

    def schedule(self, num_decodes: int) -> Schedule:
        """What it has become; the first num_decodes entries decode."""
        return Schedule(
            tuple(self.entries),
            tuple(self.preempted),
            tuple(self.admitted),
            tuple(self.copies),
            num_decodes,
            self.number,
        )
