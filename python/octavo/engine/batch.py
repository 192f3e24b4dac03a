"""From a schedule to the arrays that the native core takes: no decisions here, only packing."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from collections.abc import Sequence as SequenceOf
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo.engine.block_manager import NO_BLOCK, BlockCopy, BlockManager
from octavo.engine.request import Sequence
from octavo.engine.schedule import Schedule
from octavo.reference.sampling import SamplingRows, sampling_rows

Int32 = NDArray[np.int32]
_TINY = float(np.finfo(np.float32).tiny)
_HUGE = float(np.finfo(np.float32).max)


class BatchArrays(NamedTuple):
    """The arguments of `_native.Batch`, which documents their shapes."""

    token_ids: Int32
    row_starts: Int32
    context_lens: Int32
    block_tables: Int32
    logit_rows: Int32
    sampling: SamplingRows
    adapter_ids: Int32 | None  # None: no sequence has an adapter
    rope_sets: Int32 | None  # None: all have the first one


def copy_blocks(runtime: Any, copies: Iterable[BlockCopy]) -> None:
    """Copy in the order given: a block may be written for one KV group and then for another one."""
    for group, of_group in groupby(copies, lambda copy: copy.group):
        runtime.copy_blocks(group, np.array([pair for _, *pair in of_group], np.int32))


def build_batch(schedule: Schedule, blocks: BlockManager, vocab_size: int) -> BatchArrays:
    """Pack one step. A sequence gets a logit row for each token that is sampled for it.

    A token that a step in flight samples is named by its sequence's state row. This is never done
    for a sequence with drafts: which of its samples is the last one is only known after the step.

    Raises ValueError on a schedule with no entries.
    """
    entries = schedule.entries
    if not entries:
        raise ValueError("the schedule is empty; expected at least one sequence")
    token_ids: list[int] = []
    row_starts = [0]
    logit_rows: list[int] = []
    state_rows: list[int] = []
    for sequence, start, num_new_tokens, num_samples, drafts, branch in entries:
        if num_new_tokens == 1:  # decoding, the most frequent case: no slicing
            known = sequence.token_ids
            token_ids.append(known[start] if start < len(known) else -1 - sequence.state_row)
        else:
            token_ids.extend(sequence.token_ids[start : start + num_new_tokens])
            token_ids.extend(drafts)
        num_tokens = len(token_ids)
        row_starts.append(num_tokens)
        if num_samples == 1 and branch is None:
            logit_rows.append(num_tokens - 1)
            state_rows.append(sequence.state_row)
        elif num_samples:
            logit_rows.extend(range(num_tokens - num_samples, num_tokens))
            state_rows.extend([-1] * num_samples)
    return BatchArrays(
        token_ids=np.array(token_ids, np.int32),
        row_starts=np.array(row_starts, np.int32),
        context_lens=np.array([e.start + e.num_new_tokens for e in entries], np.int32),
        block_tables=pack_block_tables([e.branch or e.sequence.key for e in entries], blocks),
        logit_rows=np.array(logit_rows, np.int32),
        sampling=pack_sampling(schedule.row_sequences, state_rows, vocab_size),
        adapter_ids=pack_unless_all(-1, [entry.sequence.adapter.slot for entry in entries]),
        rope_sets=pack_unless_all(0, [entry.sequence.rope_set for entry in entries]),
    )


def pack_sampling(
    sequences: SequenceOf[Sequence], state_rows: list[int], vocab_size: int
) -> SamplingRows:
    """The options of each row's sequence, within what the row's types hold."""
    rows = sampling_rows(len(sequences))
    params = [sequence.params for sequence in sequences]
    fitted = {
        "temperature": [_temperature(p.temperature) for p in params],
        # A top_k above the vocabulary's size keeps all tokens, also where an int32 cannot hold it.
        "top_k": [p.top_k if p.top_k < vocab_size else 0 for p in params],
        "top_p": [max(p.top_p, _TINY) for p in params],
        "min_p": [p.min_p for p in params],
        "seed": [p.seed or 0 for p in params],
        "sample_index": [sequence.sample_index for sequence in sequences],
        "num_logprobs": [
            sequence.num_candidates or (-1 if p.logprobs is None else min(p.logprobs, vocab_size))
            for sequence, p in zip(sequences, params, strict=True)
        ],
        "state_row": state_rows,
    }
    if any([p.has_unusual_filters for p in params]):
        fitted["top_n_sigma"] = [min(p.top_n_sigma, _HUGE) for p in params]
        fitted["typical_p"] = [max(p.typical_p, _TINY) for p in params]
        fitted["xtc_probability"] = [p.xtc_probability for p in params]
        fitted["xtc_threshold"] = [p.xtc_threshold for p in params]
    for name, values in fitted.items():  # not the position, which the core sets, nor a target
        rows[name] = values
    return rows


def _temperature(value: float) -> float:
    """The temperature, limited to numbers by which float32 can divide.

    Below 1e-30 the quotients could overflow; there only the most probable token is ever sampled,
    so it becomes 0 (greedy). Above float32's range all tokens are equally probable anyway.
    """
    return min(value, _HUGE) if value >= 1e-30 else 0.0


def pack_unless_all(usual: int, values: list[int]) -> Int32 | None:
    """The values; None where all are the usual one, which the core takes without them."""
    return np.array(values, np.int32) if any([each != usual for each in values]) else None


def pack_block_tables(keys: SequenceOf[Hashable], blocks: BlockManager) -> Int32:
    """(num_kv_groups, num_seqs, most blocks of one sequence), NO_BLOCK after each last block."""
    groups = range(len(blocks.groups.windows))
    tables = [[blocks.block_table(key, group) for key in keys] for group in groups]
    width = max([len(table) for of_group in tables for table in of_group])
    packed = np.full((len(groups), len(keys), width), NO_BLOCK, np.int32)
    for group in groups:
        for row, table in enumerate(tables[group]):
            packed[group, row, : len(table)] = table
    return packed
