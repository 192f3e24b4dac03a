"""Which sequences compute how many tokens in the next step: continuous batching, FIFO.

There are no prefill and decode phases (Orca, Yu et al. 2022; chunked prefill, Agrawal et al. 2023).
A step has a budget of tokens. Sequences that decode take one each, in order of arrival; what is
left goes to prompts, in order of arrival, a chunk of the size that is left. So a long prompt never
stalls running answers, and a step's cost is bounded.

Memory. A sequence is admitted when blocks for all of its present tokens are free, besides one block
for each sequence already running, so that these can go on for a while. While decoding it takes a
block when it crosses into one. When none is free, the *latest* running sequence is preempted: it
gives all of its blocks back and waits in front of those who have not run yet. The earliest one is
therefore never preempted and always advances; and since no request is accepted that the whole
cache could not hold, it ends, and then the next one is the earliest: everyone ends.

Pure Python: no NumPy, no native code.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

from octavo.engine.block_manager import BlockManager, IntegrityError
from octavo.engine.ranked_queue import RankedQueue
from octavo.engine.request import FinishReason, Sequence, SequenceState
from octavo.errors import InvalidArgumentError


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
    """One step: who computes what, decodes before prompts, and who was preempted to allow it."""

    entries: tuple[ScheduledSequence, ...]
    preempted: tuple[Sequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(entry.num_new_tokens for entry in self.entries)


@dataclass(frozen=True)
class SchedulerLimits:
    """max_num_seqs and max_num_batched_tokens bound a step, max_model_len prompt plus answer.

    priority_ageing_seconds: what one level of priority is worth; see `Scheduler.add`.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    priority_ageing_seconds: float = 30.0


class Scheduler:
    """Holds every unfinished sequence and decides each step.

    A step is `schedule()`, then the computation, then `update(schedule)`; nothing counts as
    computed before `update`, so a step that fails in between can simply be scheduled again.
    """

    def __init__(self, limits: SchedulerLimits, blocks: BlockManager) -> None:
        self.limits = limits
        self.blocks = blocks
        self._waiting = RankedQueue()
        self._running = RankedQueue()
        self._arrival_numbers = itertools.count()

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks yet, or not any more."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def has_unfinished(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self._running)

    def max_total_tokens(self, num_prompt_tokens: int, max_tokens: int) -> int:
        """How long prompt and answer may become together: the answer ends there."""
        return min(num_prompt_tokens + max_tokens, self.limits.max_model_len)

    def check_fits(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """Raise an InvalidArgumentError if such a request could never be answered."""
        max_model_len = self.limits.max_model_len
        if num_prompt_tokens < 1:
            raise InvalidArgumentError(
                "the prompt has no tokens; expected at least one: write something to continue"
            )
        if num_prompt_tokens >= max_model_len:
            raise InvalidArgumentError(
                f"the prompt has {num_prompt_tokens} tokens; expected at most {max_model_len - 1}, "
                f"since prompt and answer together may have {max_model_len} (max_model_len): "
                f"shorten the prompt"
            )
        # The last token is drawn but never computed, so it needs no place in the cache.
        num_cached = self.max_total_tokens(num_prompt_tokens, max_tokens) - 1
        if self.blocks.blocks_for(num_cached) > self.blocks.num_blocks:
            raise InvalidArgumentError(
                f"prompt and answer may have {num_cached + 1} tokens; the whole KV cache holds "
                f"{self.blocks.num_tokens_capacity}: shorten the prompt, lower max_tokens, or give "
                f"the cache more blocks (num_kv_blocks)"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; InvalidArgumentError if it could never be answered.

        Its rank is its time of arrival, put off by priority_ageing_seconds for each level of
        priority. All who wait age equally fast, so ranks need not change: ageing is in the
        numbers from the start. Who comes later than that difference cannot overtake, however
        urgent, so nobody starves.
        """
        self.check_fits(sequence.num_prompt_tokens, sequence.params.max_tokens)
        delay = sequence.priority * self.limits.priority_ageing_seconds
        sequence.rank = (sequence.arrival_time + delay, next(self._arrival_numbers))
        self._waiting.add(sequence)

    def schedule(self) -> Schedule:
        """Decide the next step; its entries are empty only when nothing is unfinished."""
        entries, preempted = self._schedule_decodes(self.limits.max_num_batched_tokens)
        budget = self.limits.max_num_batched_tokens - len(entries)
        for sequence in self._running:
            if budget == 0:
                break
            if sequence.num_uncomputed_tokens > 1:
                budget -= self._schedule_prefill(sequence, budget, entries)
        # A step that had to take blocks away admits nobody.
        while budget > 0 and not preempted and (admitted := self._admit_next()):
            budget -= self._schedule_prefill(admitted, budget, entries)
        return Schedule(tuple(entries), tuple(preempted))

    def update(self, schedule: Schedule) -> None:
        """Note that the step was computed: its keys and values are in the cache."""
        for sequence, start, num_new_tokens, _ in schedule.entries:
            sequence.num_computed_tokens = start + num_new_tokens

    def finish(
        self, sequence: Sequence, reason: FinishReason, stop_reason: str | int | None = None
    ) -> None:
        """Let a sequence leave, waiting or running, and take its blocks back at once."""
        if sequence.state is SequenceState.RUNNING:
            self._running.remove(sequence)
            self.blocks.free(sequence.key)
        elif sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        else:
            raise IntegrityError(f"{sequence!r} was finished twice")
        sequence.finish(reason, stop_reason)

    def check_integrity(self) -> None:
        """The queues, the states and the blocks agree; IntegrityError if not."""
        self.blocks.check_integrity()
        for sequence in self._waiting:
            if sequence.state is not SequenceState.WAITING or sequence.num_computed_tokens:
                raise IntegrityError(f"{sequence!r} is in the waiting queue")
        for sequence in self._running:
            if sequence.state is not SequenceState.RUNNING:
                raise IntegrityError(f"{sequence!r} is among the running")
            num_held = len(self.blocks.block_tables(sequence.key)[0])
            if num_held < self.blocks.blocks_for(sequence.num_computed_tokens):
                raise IntegrityError(f"{sequence!r} holds only {num_held} blocks")
        running = {sequence.key for sequence in self._running}
        if len(running) != len(self._running) or self.blocks.holders() != running:
            raise IntegrityError(
                f"blocks are held by {self.blocks.holders()}, but {running} are running"
            )
        if len(running) > self.limits.max_num_seqs:
            raise IntegrityError(f"{len(running)} run, over max_num_seqs")

    def _schedule_decodes(self, budget: int) -> tuple[list[ScheduledSequence], list[Sequence]]:
        entries: list[ScheduledSequence] = []
        preempted: list[Sequence] = []
        index = 0
        # The list shrinks from its end when someone is preempted. Those before `index` stay, so
        # nobody loses blocks that this very step is going to use.
        while index < len(self._running) and len(entries) < budget:
            sequence = self._running[index]
            index += 1
            if sequence.num_uncomputed_tokens > 1:
                continue
            while not self.blocks.reserve(sequence.key, sequence.num_tokens):
                preempted.append(self._preempt_latest())
                if preempted[-1] is sequence:
                    break
            else:
                entries.append(ScheduledSequence(sequence, sequence.num_computed_tokens, 1, True))
        return entries, preempted

    @staticmethod
    def _schedule_prefill(sequence: Sequence, budget: int, entries: list[ScheduledSequence]) -> int:
        remaining = sequence.num_uncomputed_tokens
        chunk = min(remaining, budget)
        entries.append(
            ScheduledSequence(sequence, sequence.num_computed_tokens, chunk, chunk == remaining)
        )
        return chunk

    def _admit_next(self) -> Sequence | None:
        """Admit the first one waiting, with blocks for all of its tokens, if there is room."""
        if not self._waiting or len(self._running) >= self.limits.max_num_seqs:
            return None
        sequence = self._waiting[0]
        num_needed = self.blocks.blocks_for(sequence.num_tokens)
        if num_needed + len(self._running) > self.blocks.num_free_blocks:
            return None
        self.blocks.reserve(sequence.key, sequence.num_tokens)
        self._waiting.remove(sequence)
        self._running.add(sequence)
        sequence.state = SequenceState.RUNNING
        return sequence

    def _preempt_latest(self) -> Sequence:
        sequence = self._running.pop_last()
        self.blocks.free(sequence.key)
        sequence.state = SequenceState.WAITING
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self._waiting.add(sequence)
        return sequence
