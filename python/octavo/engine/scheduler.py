"""Which sequences compute how many tokens in the next step: continuous batching.

There are no prefill and decode phases (Orca, Yu et al. 2022; chunked prefill, Agrawal et al. 2023).
A step has a budget of tokens. Sequences that decode take one each; the rest goes to prompts, in
chunks of at most that size. So a long prompt never stops running answers, and a step's cost is
bounded. Both are in the order of rank: time of arrival, shifted by priority (see `add`). Drafts, if
there is a drafter, take what is left after one token for every decoding sequence.

Memory. A sequence is admitted when blocks for all of its present tokens are free, and also some
headroom for those already running. It shares the blocks of its beginning that the cache still
holds. While it decodes, or its window moves over its prompt, it takes more blocks. When none is
free, the *last* running sequence in rank is preempted: it gives its blocks back and waits again. So
the first in rank always advances (it is preempted once at most, where it outgrows `rope_switch`).
It ends, since no request is accepted that the whole cache could not hold. Then the next one is the
first. So every request ends.

Pure Python: no NumPy, no native code.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as SequenceOf

from octavo.engine.block_manager import BlockManager, Prefix
from octavo.engine.block_pool import IntegrityError
from octavo.engine.branches import Branches, judge
from octavo.engine.drafter import DraftCounts, Drafter
from octavo.engine.events import EventLog
from octavo.engine.prefix_cache import PrefixCache
from octavo.engine.queues import SequenceQueues
from octavo.engine.request import FinishReason, Sequence, SequenceState
from octavo.engine.schedule import Schedule, ScheduleBuilder, SchedulerLimits
from octavo.errors import InvalidArgumentError


class Scheduler(SequenceQueues):
    """Holds every unfinished sequence and decides each step.

    A step is `schedule()`, `advance(schedule)` when it is submitted, `complete(schedule)` when it
    has ended; the next one may be scheduled before that. `rollback` undoes a step that failed.
    events: where every decision is noted. drafter: proposes tokens for sequences that decode.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: BlockManager,
        events: EventLog | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        super().__init__(blocks, limits.max_num_seqs)
        self.limits = limits
        self.prefix_cache = PrefixCache(blocks, limits.enable_prefix_caching)
        self.events = EventLog() if events is None else events
        self.num_schedules = 0
        self.num_preemptions = 0
        self.waiting_reason: str | None = None  # of the first in the queue; None: it is empty
        self.draft_counts = DraftCounts()
        self.branches = Branches(blocks, self.draft_counts)
        self.drafter = drafter
        self._arrival_numbers = itertools.count()
        self._noted_wait: tuple[object, str | None] | None = None

    def max_total_tokens(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """The length of prompt and answer together at which the answer ends.

        max_tokens: None for as many as context and KV cache hold.
        """
        longest = self.limits.max_model_len
        if max_tokens is not None:
            return min(num_prompt_tokens + max_tokens, longest)
        # The last token is sampled but never computed, so it needs no place in the cache.
        return max(num_prompt_tokens + 1, min(longest, self.blocks.num_tokens_capacity + 1))

    def check_fits(self, num_prompt_tokens: int, max_tokens: int | None) -> None:
        """Raise an InvalidArgumentError if such a request could never be answered."""
        max_model_len = self.limits.max_model_len
        if num_prompt_tokens < 1:
            raise InvalidArgumentError(
                "the prompt has no tokens; expected at least one: write something to continue"
            )
        if num_prompt_tokens > (most := max_model_len - (max_tokens != 0)):
            raise InvalidArgumentError(
                f"the prompt is too long: it has {num_prompt_tokens} tokens; expected at most "
                f"{most}, since prompt and answer together may have {max_model_len} "
                f"(max_model_len): shorten the prompt"
            )
        num_total = self.max_total_tokens(num_prompt_tokens, max_tokens)
        num_cached = max(num_total - 1, num_prompt_tokens)
        if self.blocks.groups.blocks_in_all(num_cached) > self.blocks.num_blocks:
            raise InvalidArgumentError(
                f"prompt and answer may have {num_cached + 1} tokens; the whole KV cache holds "
                f"{self.blocks.num_tokens_capacity}: shorten the prompt, lower max_tokens, or give "
                f"the cache more blocks (num_kv_blocks)"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; InvalidArgumentError if it could never be answered.

        Its rank is its time of arrival, plus priority_ageing_seconds for each level of priority: no
        rank ever changes, and no sequence starves, however many urgent ones come. Those of one
        request stay together, so that of two searches one has all of its beams before the other.
        """
        max_tokens, leader = sequence.params.max_tokens, sequence.leader
        self.check_fits(sequence.num_prompt_tokens, max_tokens)
        delay = sequence.priority * self.limits.priority_ageing_seconds
        number = next(self._arrival_numbers) if leader is None else leader.rank[1]
        sequence.rank = (sequence.arrival_time + delay, number, sequence.sample_index)
        sequence.max_total_tokens = self.max_total_tokens(sequence.num_prompt_tokens, max_tokens)
        self._waiting.add(sequence)

    def schedule(self, now: float = 0.0) -> Schedule:
        """Decide the next step; its entries are empty only when nothing is unfinished.

        now: for the event log, in seconds.
        """
        limits = self.limits
        step = ScheduleBuilder(
            self.num_schedules, limits.max_num_batched_tokens, now, limits.max_prompt_rows
        )
        for sequence in limits.outgrown(self._running):
            self._preempt(sequence, "rope", sequence, now)  # it may come back in this very step
        self._make_room_for_urgent(step)
        self._schedule_decodes(step)
        num_decodes = len(step.entries) - step.num_branches
        self._schedule_prefills(step)
        self._note_wait(*self._admit(step), now)
        self._wake_beams(step)
        if step.entries:
            step.copies[:0] = self._fork_copies
            self._fork_copies = []
        self.num_schedules += bool(step.entries)
        return step.build(num_decodes)

    def advance(self, schedule: Schedule) -> None:
        """The step was submitted: the next `schedule` counts its tokens as computed."""
        for sequence, start, num_new_tokens, num_samples, _, branch in schedule.entries:
            if branch is None:
                sequence.num_computed_tokens = start + num_new_tokens
                sequence.num_pending_tokens += num_samples

    def complete(self, schedule: Schedule, token_ids: SequenceOf[int]) -> set[int]:
        """The step has ended: its keys and values are in the cache, and it sampled token_ids.

        Returns the logit rows after wrong drafts (see `judge`): their tokens must be dropped, and
        do not count as computed.
        """
        block_size, entries = self.blocks.block_size, schedule.entries
        has_drafts = any([entry.draft_token_ids for entry in entries])
        judged = iter(judge(schedule, token_ids) if has_drafts else ())
        rejected_rows: set[int] = set()
        for index, (sequence, start, num_new_tokens, num_samples, drafts, branch) in enumerate(
            entries
        ):
            if branch is not None:
                continue  # judged with the entry before it
            sequence.num_pending_tokens -= num_samples
            # If it runs now, it was not preempted since: it could not be admitted again so soon.
            is_running = sequence.state is SequenceState.RUNNING
            num_rejected = 0
            if (found := next(judged, None)) is not None and drafts:
                rejected_rows.update(found.other_rows)
                num_rejected = len(drafts) - found.num_accepted
                sequence.num_computed_tokens -= num_rejected if is_running else 0
                self.branches.settle(schedule, index, found, is_running)
            # Blocks with drafts get no name yet: the next step publishes those of right drafts.
            num_full_blocks = (start + num_new_tokens - len(drafts)) // block_size
            if num_full_blocks > sequence.num_published_blocks and is_running:
                self.prefix_cache.publish(sequence, num_full_blocks)
            if self.blocks.has_windows and is_running:
                self.blocks.advance(sequence.key, start + num_new_tokens - num_rejected)
        return rejected_rows

    def rollback(self, schedule: Schedule) -> None:
        """The step failed, after `advance`: undo it; sequences that it admitted wait again.

        With several steps in flight, undo the latest first.
        """
        for sequence, start, _, num_samples, _, branch in schedule.entries:
            if branch is not None:
                self.branches.free(branch)
                continue
            sequence.num_pending_tokens -= num_samples
            if sequence.state is SequenceState.RUNNING:
                sequence.num_computed_tokens = start
        for sequence in schedule.admitted:
            if sequence.state is SequenceState.RUNNING:
                self.requeue(sequence)
        # The step may have copied blocks for beams that were not in it.
        for sequence in [each for each in self._running if each.num_candidates]:
            self.requeue(sequence)

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        now: float = 0.0,
        stop_reason: str | int | None = None,
    ) -> None:
        """Remove a sequence, waiting or running, and free its blocks at once."""
        if sequence.state is SequenceState.RUNNING:
            self._running.remove(sequence)
            self._free_state_rows.append(sequence.state_row)
            # Others must not find the blocks of a failed sequence.
            self.blocks.free(sequence.key, keep_cached=reason != "error")
        elif sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        elif sequence.state is SequenceState.FINISHED:
            raise IntegrityError(f"{sequence!r} was finished twice")
        sequence.state = SequenceState.FINISHED
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        self.events.record((now, "finished", sequence.key, reason, sequence.num_output_tokens))

    def _wake_beams(self, step: ScheduleBuilder) -> None:
        """Where all that run are beams that pause for others which wait: make room for these."""
        while not step.entries and self._waiting and self._running:
            first, last = self._waiting[0], self._running[-1]
            if last.rank < first.rank or not all([each.is_paused for each in self._running]):
                return
            step.preempted.append(last)
            self._preempt(last, "kv_blocks", first, step.now)
            self._admit(step)

    # ---- what a step computes ----

    def _schedule_decodes(self, step: ScheduleBuilder) -> None:
        drafter = self.drafter
        if drafter is not None:
            num_free = self.limits.max_num_seqs - len(self._running) - len(self._waiting)
            step.branch_budget = self.limits.num_spare_seqs + max(0, num_free)
            drafter.begin_step(self._running, step)
        index = 0
        # A preemption shortens the queue from its end. The sequences before `index` stay, so no
        # sequence loses blocks that this step uses.
        while index < len(self._running) and step.budget:
            sequence = self._running[index]
            index += 1
            num_tokens = len(sequence.token_ids) + sequence.num_pending_tokens
            start = sequence.num_computed_tokens
            # A sequence whose last token is being sampled has nothing left to compute.
            end = min(sequence.max_total_tokens, self.limits.longest(sequence.rope_set) + 1)
            if num_tokens - start != 1 or num_tokens >= end:
                continue
            if sequence.num_candidates and sequence.num_pending_tokens:
                continue
            drafts: tuple[int, ...] = ()
            if drafter is not None and sequence.takes_drafts:
                if sequence.num_pending_tokens > 1:  # which of them is the last is not known yet
                    continue
                if sequence.num_pending_tokens and drafter.awaits(sequence):
                    continue
                if not sequence.num_pending_tokens:
                    drafts = self._drafts(sequence, step, len(self._running) - index)
            if self._make_room(sequence, num_tokens, step):
                step.add(sequence, 1, 1, drafts)
                if drafts and drafter is not None:
                    chains = drafter.branches(sequence)
                    num_behind = len(self._running) - index
                    self.branches.add(step, chains, end - 1 - num_tokens, num_behind)

    def _make_room(self, sequence: Sequence, num_tokens: int, step: ScheduleBuilder) -> bool:
        """Reserve blocks for so many tokens; for want of them the last sequence is preempted.

        False if that is the sequence itself, or one that the step computes already.
        """
        while not self.blocks.reserve(sequence.key, num_tokens):
            step.is_short = True
            last = self._running[-1]
            if last in [entry.sequence for entry in step.entries]:
                return False
            step.preempted.append(last)
            self._preempt(last, "kv_blocks", sequence, step.now)
            if last is sequence:
                return False
        return True

    def _drafts(
        self, sequence: Sequence, step: ScheduleBuilder, num_behind: int
    ) -> tuple[int, ...]:
        """The drafts that the step has room to check, with blocks reserved for them.

        A draft takes no token and no block that one of the num_behind sequences behind may need.
        """
        longest = min(sequence.max_total_tokens - 1, self.limits.longest(sequence.rope_set))
        room = min(step.budget - 1 - num_behind, step.row_budget, longest - sequence.num_tokens)
        if self.drafter is None or room < 1:
            return ()
        drafts = tuple(self.drafter.propose(sequence)[:room])
        num_tokens = sequence.num_tokens + len(drafts)
        return drafts if self.blocks.reserve(sequence.key, num_tokens, num_behind) else ()

    def _schedule_prefills(self, step: ScheduleBuilder) -> None:
        for sequence in [other for other in self._running if other.is_in_prefill]:
            if step.budget and sequence.state is SequenceState.RUNNING:  # not preempted meanwhile
                self._schedule_chunk(sequence, step)

    def _schedule_chunk(self, sequence: Sequence, step: ScheduleBuilder) -> None:
        start = sequence.num_computed_tokens
        num_new_tokens, num_rows = step.chunk_of(sequence)
        if not num_new_tokens or not self._make_room(sequence, start + num_new_tokens, step):
            return
        self.events.record((step.now, "chunk", sequence.key, start, num_new_tokens, step.number))
        step.add_chunk(sequence, num_new_tokens, num_rows)

    # ---- admission ----

    def _admit(self, step: ScheduleBuilder) -> tuple[Sequence | None, str | None]:
        """Admit sequences in the order of the queue; returns the next one, and why it waits."""
        if step.is_short and self._waiting:
            return self._waiting[0], "preemption"
        while True:
            sequence = self._next_candidate()
            if sequence is None:
                return (self._waiting[0], "prefix") if self._waiting else (None, None)
            if not step.budget:
                return sequence, "token_budget"
            if sequence.num_pending_tokens or sequence in step.preempted:
                return sequence, "preemption"  # a step in flight still computes for it
            prefix = self.prefix_cache.find(sequence)
            obstacle = self._obstacle(sequence, prefix)
            if obstacle is not None:
                return sequence, obstacle
            self._start(sequence, prefix, step)
            self._schedule_chunk(sequence, step)

    def _next_candidate(self) -> Sequence | None:
        """The first in the queue whose beginning is not being computed for another one now."""
        for sequence in itertools.islice(self._waiting, self.limits.max_num_seqs):
            sequence.use_rope(self.limits.rope_set(sequence.num_tokens))
            if not self.prefix_cache.is_being_computed(sequence, self._running):
                return sequence
        return None

    def _obstacle(self, sequence: Sequence, prefix: Prefix) -> str | None:
        """The reason why the sequence cannot be admitted now."""
        if len(self._running) >= self.limits.max_num_seqs:
            return "max_num_seqs"
        num_spare = self.blocks.num_free_blocks
        num_spare -= self.blocks.num_blocks_needed(sequence.num_tokens, prefix)
        is_short = num_spare < 0 or num_spare < self._headroom(len(self._running))
        return "kv_blocks" if is_short else None

    def _headroom(self, num_running: int) -> int:
        """Blocks to leave for the first num_running running sequences when one more is admitted.

        A few for each, as far as it may still need them. Without them the new sequence would soon
        be preempted again, with many tokens computed and few sampled.
        """
        few, running = self.limits.headroom_blocks, itertools.islice(self._running, num_running)
        # The last token is sampled but never computed. Beams share much, and pause for each other.
        ends = [
            (s.key, max(s.max_total_tokens - 1, s.num_prompt_tokens))
            for s in running
            if not s.num_candidates
        ]
        return sum([self.blocks.num_blocks_to_come(key, end, few) for key, end in ends])

    def _start(self, sequence: Sequence, prefix: Prefix, step: ScheduleBuilder) -> None:
        if sequence.num_cached_tokens is None:
            self.prefix_cache.note_first_admission(sequence, prefix)
        step.copies += self.blocks.start(sequence.key, sequence.num_tokens, prefix)
        self.resume(sequence)
        sequence.num_computed_tokens = prefix.num_tokens
        sequence.num_published_blocks = prefix.num_tokens // self.blocks.block_size
        step.admitted.append(sequence)
        sizes = (sequence.num_tokens, prefix.num_tokens)
        after = (len(self._running), self.blocks.num_free_blocks)
        self.events.record((step.now, "admitted", sequence.key, *sizes, *after))

    # ---- preemption ----

    def _make_room_for_urgent(self, step: ScheduleBuilder) -> None:
        """Preempt sequences of lower priority if then the first in the queue can be admitted.

        Only those behind it in rank, which cannot preempt it in turn.
        """
        urgent = self._next_candidate()
        if urgent is None or not self._running or self._running[-1].priority <= urgent.priority:
            return
        prefix = self.prefix_cache.find(urgent)
        if self._obstacle(urgent, prefix) is None:
            return
        num_missing = self.blocks.num_blocks_needed(urgent.num_tokens, prefix)
        num_missing -= self.blocks.num_free_blocks
        for num_left in range(len(self._running) - 1, -1, -1):
            victim = self._running[num_left]
            if victim.priority <= urgent.priority or victim.rank < urgent.rank:
                return
            num_missing -= self.blocks.num_blocks_freed(victim.key, prefix)
            if num_missing + self._headroom(num_left) <= 0:
                while len(self._running) > num_left:
                    step.preempted.append(self._running[-1])
                    self._preempt(self._running[-1], "priority", urgent, step.now)
                return

    def _preempt(self, sequence: Sequence, why: str, by: Sequence, now: float) -> None:
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        num_lost = sequence.num_computed_tokens
        self.events.record((now, "preempted", sequence.key, why, by.key, num_lost))
        self.requeue(sequence)

    # ---- the event log, and checks ----

    def _note_wait(self, sequence: Sequence | None, reason: str | None, now: float) -> None:
        """Record why the first in the queue waits, unless that was recorded before."""
        self.waiting_reason = reason
        noted = None if sequence is None else (sequence.key, reason)
        if sequence is not None and noted != self._noted_wait:
            num_needed = self.blocks.groups.blocks_in_all(sequence.num_tokens)
            numbers = (num_needed, self.blocks.num_free_blocks, len(self._waiting))
            self.events.record((now, "waited", sequence.key, reason, *numbers))
        self._noted_wait = noted

    @property
    def num_live_tokens(self) -> int:
        """Tokens of running sequences in the cache, in KV group 0; in shared blocks only once."""
        return self.blocks.num_live_tokens({s.key: s.num_computed_tokens for s in self._running})

    def check_integrity(self) -> None:
        """The queues, the states and the blocks agree; IntegrityError if not."""
        self.blocks.check_integrity()
        for sequence in self._waiting:
            if sequence.state is not SequenceState.WAITING or sequence.num_computed_tokens:
                raise IntegrityError(f"{sequence!r} is in the waiting queue")
        for sequence in self._running:
            if sequence.state is not SequenceState.RUNNING:
                raise IntegrityError(f"{sequence!r} is among the running")
            self.blocks.check_sequence(sequence.key, sequence.num_computed_tokens)
        running = {sequence.key for sequence in self._running}
        holders = self.blocks.holders() - self.branches.keys
        if len(running) != len(self._running) or holders != running:
            raise IntegrityError(f"blocks are held by {holders}, but {running} are running")
        rows = [*self._free_state_rows, *(sequence.state_row for sequence in self._running)]
        if sorted(rows) != list(range(self.limits.max_num_seqs)):
            raise IntegrityError(f"of max_num_seqs state rows some are lost or shared: {rows}")
