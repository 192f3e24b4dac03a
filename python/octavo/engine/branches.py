"""Trees of drafts: several chains of one sequence in one step, of which one may be right.

Each chain is a row span of the batch, with a block table of its own: it shares the full blocks
before the sequence's last token, has a copy of the block in which that token lies, and computes
that token and all of its drafts by itself. So chains need nothing of each other, every row has the
bits that it has without drafts, and the cache of the chain that was right is complete: the sequence
takes its table over. The price is a row for every draft that two chains share, and one for the
token before them.

Chains come in the order of a depth-first walk through their tree. A chain then shares more drafts
with the one just before it than with any other, and samples only after those that it does not
share.
"""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from octavo.engine.block_manager import BlockManager
from octavo.engine.drafter import DraftCounts
from octavo.engine.schedule import Schedule, ScheduleBuilder, ScheduledSequence, num_agreeing


class BranchKey(NamedTuple):
    """Names the block table of a chain beside the first one, from its step to that step's end."""

    sequence: Hashable
    step: int
    number: int


class Judged(NamedTuple):
    """What a step found out about a sequence's drafts.

    entry: of its chains, the one that is right for longest. num_accepted: how many of that chain's
    drafts are. rows: the sampled rows whose tokens go to the answer, in order. other_rows: its
    other rows.
    """

    entry: int
    num_accepted: int
    rows: list[int]
    other_rows: list[int]


def num_shared(one: SequenceOf[int], other: SequenceOf[int]) -> int:
    """How many drafts two chains begin with alike."""
    length = min(len(one), len(other))
    return num_agreeing(one[:length], other)


def judge(schedule: Schedule, token_ids: SequenceOf[int]) -> list[Judged]:
    """One for each sequence of a step, in order; token_ids: sampled, one a row.

    A token that was sampled after right drafts is right; the first that differs from the draft in
    its place is the last right one.
    """
    found: list[Judged] = []
    row, path = 0, list[int]()  # the rows along a chain: after the known token, then its drafts
    for index, entry in enumerate(schedule.entries):
        drafts, count = entry.draft_token_ids, entry.num_samples
        own = list(range(row, row + count))
        row += count
        path = path[: len(drafts) + 1 - count] + own if entry.branch is not None else own
        num_right = num_agreeing(drafts, [token_ids[place] for place in path]) if drafts else 0
        right = path[: num_right + 1]
        if entry.branch is None:
            found.append(Judged(index, num_right, right, path[num_right + 1 :]))
            continue
        best = found[-1]
        rows = {*best.rows, *best.other_rows, *own}
        if num_right > best.num_accepted:
            best = Judged(index, num_right, right, [])
        found[-1] = best._replace(other_rows=sorted(rows.difference(best.rows)))
    return found


class Branches:
    """The chains beside the first ones, of all steps in flight, and their block tables.

    counts: where drafts are counted when they are checked.
    """

    def __init__(self, blocks: BlockManager, counts: DraftCounts) -> None:
        self.keys: set[Hashable] = set()
        self._blocks, self._counts = blocks, counts

    def add(
        self,
        step: ScheduleBuilder,
        chains: SequenceOf[SequenceOf[int]],
        longest: int,
        num_behind: int,
    ) -> None:
        """Add chains beside the one that the step's last entry has, as far as there is room.

        longest: the most drafts of a chain. As drafts do, they take no token and no block that one
        of the num_behind sequences behind may need.
        """
        sequence, before = step.entries[-1].sequence, step.entries[-1].draft_token_ids
        first_new = sequence.num_computed_tokens
        for number, chain in enumerate(chains):
            drafts = tuple(chain[:longest])
            num_rows = len(drafts) - num_shared(before, drafts)
            has_room = len(drafts) + 1 <= step.budget - num_behind and num_rows <= step.row_budget
            if not num_rows or not has_room or not step.branch_budget:
                continue
            key = BranchKey(sequence.key, step.number, number)
            shape = (first_new, 1 + len(drafts))
            copies = self._blocks.branch(sequence.key, key, first_new, sum(shape), num_behind)
            if copies is None:
                return
            self.keys.add(key)
            step.copies += copies
            _add_entry(step, ScheduledSequence(sequence, *shape, num_rows, drafts, key))
            before = drafts

    def settle(self, schedule: Schedule, first: int, found: Judged, is_running: bool) -> None:
        """A sequence's drafts are judged: it keeps the table of the chain that was right.

        first: its first entry in the schedule; its branches come next. is_running: it still runs.
        """
        entries, index = schedule.entries, first + 1
        num_drafts = len(entries[first].draft_token_ids)
        while index < len(entries) and (branch := entries[index].branch) is not None:
            num_drafts += entries[index].num_samples
            if found.entry == index and is_running:
                self._blocks.adopt(entries[index].sequence.key, branch)
                self.keys.discard(branch)
            else:
                self.free(branch)
            index += 1
        num_branches = index - first - 1
        self._counts.add(num_drafts, found.num_accepted, num_branches, found.entry > first)

    def free(self, branch: Hashable) -> None:
        """Give a branch's blocks back."""
        self.keys.discard(branch)
        self._blocks.free(branch)


def _add_entry(step: ScheduleBuilder, entry: ScheduledSequence) -> None:
    step.entries.append(entry)
    step.row_sequences += [entry.sequence] * entry.num_samples
    step.budget -= entry.num_new_tokens
    step.row_budget -= entry.num_samples
    step.num_tokens += entry.num_new_tokens
    step.branch_budget -= 1
    step.num_branches += 1
