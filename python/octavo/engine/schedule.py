"""What one step is: the scheduler's decisions, written down."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple

from octavo.engine.block_manager import BlockCopy
from octavo.engine.request import Sequence


class ScheduledSequence(NamedTuple):
    """One sequence's part in a step.

    It computes its tokens start .. start + num_new_tokens - 1, the last of which are drafts.
    num_samples: how many tokens are sampled, one after each of the last num_samples of those: 0
    before the end of its prompt, then 1 and one more for each draft. branch: the key of its block
    table, where it is one more chain of drafts of the sequence before it (branches.py).
    """

    sequence: Sequence
    start: int
    num_new_tokens: int
    num_samples: int
    draft_token_ids: tuple[int, ...] = ()
    branch: Hashable = None


class ScoredPrompt(NamedTuple):
    """A chunk of a prompt whose log-probabilities are wanted.

    entry: its place in the schedule. It has num_rows logit rows, after the prompt's tokens
    first_row, first_row + 1, …, for the token after each. is_last: the prompt ends with it, and
    nothing is sampled for its sequence.
    """

    entry: int
    sequence: Sequence
    first_row: int
    num_rows: int
    is_last: bool


class Schedule(NamedTuple):
    """One step. number: counted from 0 over non-empty steps. num_tokens: how many it computes.

    entries: the parts of the sequences, first the num_decodes that decode, each with its branches,
    then prompts. row_sequences: the sequence of each sampled logit row, in order. scored: the rows
    of prompts, besides the sampled ones. preempted: sequences that lost their blocks for this step.
    admitted: those that got blocks. copies: to be done before anything else.
    """

    entries: tuple[ScheduledSequence, ...]
    row_sequences: tuple[Sequence, ...] = ()
    preempted: tuple[Sequence, ...] = ()
    admitted: tuple[Sequence, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    num_decodes: int = 0
    num_tokens: int = 0
    number: int = 0
    scored: tuple[ScoredPrompt, ...] = ()

    @property
    def num_attended(self) -> int:
        """The number of tokens attended to, summed over all tokens that the step computes."""
        return sum([n * (2 * start + n + 1) // 2 for _, start, n, *_ in self.entries])


@dataclass(frozen=True)
class SchedulerLimits:
    """max_num_seqs and max_num_batched_tokens bound a step, max_model_len prompt plus answer.

    priority_ageing_seconds: the seconds of one level of priority; see `Scheduler.add`.
    enable_prefix_caching: whether to look for cached beginnings; answers of one request share their
    prompt in any case. headroom_blocks: how many blocks must be free for each running sequence
    when another is admitted; docs/scheduler.md says why two. max_prompt_rows: how many logit rows a
    step has for the log-probabilities of prompts, and for drafts. rope_switch: sequences of more
    tokens have the rope's other frequencies; 0: none. num_spare_seqs: how many branches of drafts a
    step may have beside max_num_seqs sequences.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    priority_ageing_seconds: float = 30.0
    enable_prefix_caching: bool = True
    headroom_blocks: int = 2
    max_prompt_rows: int = 128
    rope_switch: int = 0
    num_spare_seqs: int = 0

    def rope_set(self, num_tokens: int) -> int:
        """Which set of rope frequencies a sequence of so many tokens is computed with: 0 or 1."""
        return int(0 < self.rope_switch < num_tokens)

    def outgrown(self, running: Iterable[Sequence]) -> list[Sequence]:
        """Those that need the other set of frequencies from now on, for all of their keys."""
        if not self.rope_switch:
            return []
        return [each for each in running if each.num_tokens > self.longest(each.rope_set)]

    def longest(self, rope_set: int) -> int:
        """The most tokens with which a sequence keeps its set of rope frequencies."""
        return self.rope_switch if self.rope_switch and not rope_set else self.max_model_len


@dataclass
class ScheduleBuilder:
    """Builds schedule `number`.

    budget: the tokens that may still be added. now: the time in seconds. row_budget: the logit rows
    of prompts and drafts that may still be added. branch_budget: the branches of drafts that may
    still be added. num_branches: those that were. is_short: a sequence that runs lacked blocks.
    """

    number: int
    budget: int
    now: float
    row_budget: int
    branch_budget: int = 0
    num_branches: int = 0
    is_short: bool = False
    num_tokens: int = 0
    entries: list[ScheduledSequence] = field(default_factory=list)
    row_sequences: list[Sequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    scored: list[ScoredPrompt] = field(default_factory=list)

    def add(
        self,
        sequence: Sequence,
        num_new_tokens: int,
        num_samples: int,
        drafts: tuple[int, ...] = (),
    ) -> None:
        """Add a sequence, with so many of its uncomputed tokens, and the drafts."""
        if drafts:
            num_new_tokens += len(drafts)
            num_samples += len(drafts)
            self.row_budget -= len(drafts)
        start = sequence.num_computed_tokens
        self.entries.append(ScheduledSequence(sequence, start, num_new_tokens, num_samples, drafts))
        self.row_sequences += [sequence] * num_samples
        self.budget -= num_new_tokens
        self.num_tokens += num_new_tokens

    def chunk_of(self, sequence: Sequence) -> tuple[int, int]:
        """How many of its uncomputed tokens there is room for, and how many prompt rows they have.

        They end before the first token whose row there is no room for. A sampled token's is none.
        """
        num_tokens = min(sequence.num_uncomputed_tokens, self.budget)
        if sequence.params.prompt_logprobs is None:
            return num_tokens, 0
        start, last = sequence.num_computed_tokens, sequence.num_prompt_tokens - 1
        first_row = max(sequence.first_prompt_row, start)
        num_rows = max(min(start + num_tokens, last) - first_row, 0)
        if num_rows > self.row_budget:
            return first_row + self.row_budget - start, self.row_budget
        return num_tokens, num_rows

    def add_chunk(self, sequence: Sequence, num_new_tokens: int, num_rows: int) -> None:
        """Add the next tokens of a sequence in prefill, and their prompt rows, as of `chunk_of`."""
        is_last = num_new_tokens == sequence.num_uncomputed_tokens
        ends = is_last and sequence.samples_nothing
        if num_rows or ends:
            first_row = max(sequence.first_prompt_row, sequence.num_computed_tokens)
            entry = len(self.entries)
            self.scored.append(ScoredPrompt(entry, sequence, first_row, num_rows, ends))
            self.row_budget -= num_rows
        self.add(sequence, num_new_tokens, int(is_last and not ends))

    def build(self, num_decodes: int) -> Schedule:
        """The finished schedule; its first num_decodes entries decode."""
        return Schedule(
            tuple(self.entries),
            tuple(self.row_sequences),
            tuple(self.preempted),
            tuple(self.admitted),
            tuple(self.copies),
            num_decodes,
            self.num_tokens,
            self.number,
            tuple(self.scored),
        )


def num_agreeing(drafts: SequenceOf[int], sampled: SequenceOf[int]) -> int:
    """How many drafts, from the first on, equal the tokens sampled in their place."""
    for index, draft in enumerate(drafts):
        if draft != sampled[index]:
            return index
    return len(drafts)
