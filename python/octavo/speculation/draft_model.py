"""Drafts from a second, smaller model, or from the first layers of the target itself.

The draft model has a runtime and a KV cache of its own. All sequences of a step draft together: one
batch gives each its first draft, the next one its second, and so on (chains, Leviathan et al. 2023,
arXiv 2211.17192). A draft is sampled with the request's own options and random numbers. The target
takes the same token where the distributions of both are alike, since both add the same Gumbel
noise to each token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from octavo.engine.batch import pack_block_tables, pack_sampling
from octavo.engine.block_manager import BlockManager
from octavo.engine.request import Sequence
from octavo.engine.schedule import num_agreeing
from octavo.runtime.loader import LoadedRuntime
from octavo.speculation.source import DraftSource

_NUM_CLASSES = 8  # positions in a chain whose acceptance is told apart


@dataclass
class _Cached:
    """What the draft model's cache holds of a sequence: num_tokens of its own, then `drafts`.

    todo: tokens to be computed next. drafted: the drafts of this step so far. wanted: how many.
    """

    num_tokens: int = 0
    drafts: list[int] = field(default_factory=list)
    todo: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    wanted: int = 0


class DraftModelSource(DraftSource):
    """Chains of a draft model.

    loaded: its runtime, with num_kv_blocks blocks allocated. kv_windows: of its KV groups; blocks
    behind a window are kept, because rejected drafts move a sequence back. vocab_size: the
    target's; a draft that it does not have ends a chain. make_batch: `_native.Batch`, or a test's.
    """

    num_classes = _NUM_CLASSES

    def __init__(
        self,
        loaded: LoadedRuntime,
        kv_windows: SequenceOf[int],
        vocab_size: int,
        make_batch: Callable[..., Any] | None = None,
    ) -> None:
        if make_batch is None:
            from octavo._native import Batch

            make_batch = Batch
        self.loaded = loaded
        self.num_batches = 0
        self._vocab_size = vocab_size
        self._make_batch = make_batch
        windows = (0,) * len(kv_windows)
        self.blocks = BlockManager(loaded.num_kv_blocks, loaded.options.block_size, windows)
        self._cached: dict[Sequence, _Cached] = {}

    def begin_step(self, running: Iterable[Sequence]) -> None:
        """Free the blocks of sequences that have ended or were preempted."""
        for sequence in self._cached.keys() - set(running):
            del self._cached[sequence]
            self.blocks.free(sequence)

    def draft(self, wanted: SequenceOf[tuple[Sequence, Any, int]]) -> SequenceOf[SequenceOf[int]]:
        """Chains of all sequences, a batch for each place in them; none without memory for it."""
        chains = []
        for sequence, _, count in wanted:
            cached = self._prepare(sequence, count)
            if cached is not None:
                chains.append((sequence, cached))
        while unfinished := [chain for chain in chains if chain[1].todo]:
            self._compute(unfinished)
        found = dict(chains)
        return [found[s].drafted if s in found else () for s, _, _ in wanted]

    def _prepare(self, sequence: Sequence, count: int) -> _Cached | None:
        """Bring the sequence's cache in line with its tokens, and reserve blocks for the chain."""
        # The last draft of a chain is not computed.
        num_tokens = sequence.num_tokens + count - 1
        if num_tokens > self.loaded.options.max_model_len:
            return None
        cached = self._cached.get(sequence)
        if cached is None:
            if self.blocks.num_blocks_needed(num_tokens) > self.blocks.num_free_blocks:
                return None
            self.blocks.start(sequence, num_tokens)
            cached = self._cached[sequence] = _Cached()
        elif not self.blocks.reserve(sequence, num_tokens):
            return None
        came = sequence.token_ids[cached.num_tokens : cached.num_tokens + len(cached.drafts)]
        cached.num_tokens += num_agreeing(came, cached.drafts)
        cached.num_tokens = min(cached.num_tokens, sequence.num_tokens - 1)
        cached.drafts = []
        cached.todo = sequence.token_ids[cached.num_tokens :]
        cached.drafted, cached.wanted = [], count
        return cached

    def _compute(self, chains: SequenceOf[tuple[Sequence, _Cached]]) -> None:
        """One batch: of every chain its next token, or as much of its prompt as there is room."""
        options, size = self.loaded.options, self.loaded.options.max_num_batched_tokens
        parts: list[tuple[Sequence, _Cached, list[int]]] = []
        for sequence, cached in chains[: options.max_num_seqs]:
            tokens = cached.todo[:size]
            if not tokens:
                break
            size -= len(tokens)
            parts.append((sequence, cached, tokens))
        starts = np.cumsum([0, *(len(tokens) for _, _, tokens in parts)], dtype=np.int32)
        drawn = [
            i for i, (_, cached, tokens) in enumerate(parts) if len(tokens) == len(cached.todo)
        ]
        rows = pack_sampling([parts[i][0] for i in drawn], [-1] * len(drawn), self._vocab_size)
        rows["num_logprobs"] = -1
        lengths = [cached.num_tokens + len(cached.drafts) + len(t) for _, cached, t in parts]
        batch = self._make_batch(
            token_ids=np.concatenate([np.array(tokens, np.int32) for _, _, tokens in parts]),
            row_starts=starts,
            context_lens=np.array(lengths, np.int32),
            block_tables=pack_block_tables([sequence for sequence, _, _ in parts], self.blocks),
            logit_rows=np.array([starts[i + 1] - 1 for i in drawn], np.int32),
            sampling=rows,
            adapter_ids=None,
        )
        output = self.loaded.runtime.wait(self.loaded.runtime.submit(batch, sample=True))
        self.num_batches += 1
        sampled = output.token_ids.tolist()
        for sequence, cached, tokens in parts:
            del cached.todo[: len(tokens)]
            num_own = min(len(tokens), sequence.num_tokens - cached.num_tokens)
            cached.num_tokens += num_own
            cached.drafts += tokens[num_own:]
        for index, token, is_finite in zip(drawn, sampled, output.finite.tolist(), strict=True):
            cached = parts[index][1]
            if is_finite and token < self._vocab_size:
                cached.drafted.append(token)
                if len(cached.drafted) < cached.wanted:
                    cached.todo = [token]
