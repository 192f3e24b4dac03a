"""Log-probabilities of a prompt's own tokens: the logit rows that they take, and what comes back.

The logits after prompt token i are the model's opinion of token i + 1. So a chunk of a prompt whose
log-probabilities are wanted has a logit row for each of its tokens, with the next token as the
row's target. The scheduler bounds these rows (`SchedulerLimits.max_prompt_rows`): a step never
holds prompt x vocabulary numbers, but that many rows. What was computed is kept through a
preemption, and not computed again.

Everything else in the engine sees the sampled rows alone: rows of prompts are added when a step is
packed, and taken out when it has ended.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo.engine.adjustments import LogitAdjustments
from octavo.engine.batch import BatchArrays, Int32
from octavo.engine.block_pool import IntegrityError
from octavo.engine.outputs import TokenLogprob
from octavo.engine.request import Sequence
from octavo.engine.schedule import Schedule, ScoredPrompt
from octavo.reference.sampling import sampling_rows

Places = NDArray[np.int64]


class Rows(NamedTuple):
    """Some rows of a step's results; `_native.StepOutput` documents the arrays."""

    token_ids: Int32
    logprobs: NDArray[np.float32]
    ranks: Int32
    top_token_ids: Int32
    top_logprobs: NDArray[np.float32]
    finite: NDArray[np.bool_]
    states: NDArray[np.float32] | None = None  # only of sampled rows, or of all tokens


class RowPlaces(NamedTuple):
    """Where sampled rows, and then rows of prompts, lie among all logit rows of a step."""

    sampled: Places
    prompts: Places

    def split(self, output: Any, *, of_rows: bool) -> tuple[Rows, Rows]:
        """The results of the sampled rows, and those of prompts; output: a StepOutput.

        of_rows: it has the hidden states of logit rows.
        """
        arrays = [getattr(output, name) for name in Rows._fields if name != "states"]
        found = [Rows(*(array[places] for array in arrays)) for places in self]
        states = getattr(output, "states", None)
        if states is not None and of_rows:
            states = states[self.sampled]
        return found[0]._replace(states=states), found[1]

    def spread_masks(self, masks: Int32 | None) -> Int32 | None:
        """Masks of the sampled rows -> masks of all rows; a target needs none."""
        if masks is None:
            return None
        spread = np.full((sum(map(len, self)), masks.shape[1]), -1, np.int32)
        spread[self.sampled] = masks
        return spread

    def spread_adjustments(self, adjustments: LogitAdjustments | None) -> LogitAdjustments | None:
        """Adjustments of the sampled rows -> those of all rows: none for prompts."""
        if adjustments is None:
            return None
        counts = np.zeros(sum(map(len, self)), np.int32)
        counts[self.sampled] = np.diff(adjustments.row_starts)
        return adjustments._replace(row_starts=np.cumsum([0, *counts], dtype=np.int32))


def add_prompt_rows(arrays: BatchArrays, schedule: Schedule) -> tuple[BatchArrays, RowPlaces]:
    """Add the schedule's rows of prompts to a batch that has its sampled rows."""
    rows, targets, counts = [arrays.logit_rows], [], []
    for scored in schedule.scored:
        entry = schedule.entries[scored.entry]
        first = int(arrays.row_starts[scored.entry]) + scored.first_row - entry.start
        rows.append(np.arange(first, first + scored.num_rows, dtype=np.int32))
        next_token = scored.first_row + 1
        targets += entry.sequence.token_ids[next_token : next_token + scored.num_rows]
        counts += [entry.sequence.params.prompt_logprobs or 0] * scored.num_rows
    logit_rows = np.concatenate(rows)
    order = np.argsort(logit_rows)
    sampling = sampling_rows(len(targets), target=targets, num_logprobs=counts)
    sampling = np.concatenate([arrays.sampling, sampling])[order]
    places = np.argsort(order)
    num_sampled = len(arrays.logit_rows)
    together = arrays._replace(logit_rows=logit_rows[order], sampling=sampling)
    return together, RowPlaces(places[:num_sampled], places[num_sampled:])


def take_prompt_rows(scored: tuple[ScoredPrompt, ...], rows: Rows | None) -> list[Sequence]:
    """Give every sequence the log-probabilities of its prompt that a step has computed.

    Returns the sequences whose logits are not finite; they get none. rows: None where no prompt has
    any.
    """
    not_finite, begin = [], 0
    for _, sequence, first_row, num_rows, _ in scored:
        part = slice(begin, begin + num_rows)
        begin += num_rows
        if sequence.is_finished or rows is None or not num_rows:
            continue
        if not rows.finite[part].all():
            not_finite.append(sequence)
            continue
        if sequence.first_prompt_row != first_row:
            raise IntegrityError(
                f"{sequence!r} got the log-probabilities after its token {first_row}; expected "
                f"those after token {sequence.first_prompt_row}"
            )
        count = sequence.params.prompt_logprobs or 0
        entries = zip(
            rows.token_ids[part].tolist(),
            rows.logprobs[part].tolist(),
            map(tuple, rows.top_token_ids[part, :count].tolist()),
            map(tuple, rows.top_logprobs[part, :count].tolist()),
            rows.ranks[part].tolist(),
            strict=True,
        )
        sequence.prompt_logprobs += [TokenLogprob(*entry) for entry in entries]
    return not_finite


def whole_prompt(sequence: Sequence) -> tuple[TokenLogprob | None, ...] | None:
    """One entry for each prompt token, None where there is none; None if they were not asked for.

    There is none for the first token, for those before `prompt_logprobs_start`, and for those that
    a request which ended early did not come to.
    """
    if sequence.params.prompt_logprobs is None:
        return None
    num_before = sequence.first_prompt_row + 1 - len(sequence.prompt_logprobs)
    entries = [*[None] * num_before, *sequence.prompt_logprobs]
    missing = sequence.num_prompt_tokens - len(entries)
    return (*entries, *[None] * missing)
