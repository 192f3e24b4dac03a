"""Drafts from a second, smaller model, or from the first layers of the target itself.

The draft model has a runtime and a KV cache of its own. All sequences of a step draft together: one
batch gives each its first draft, the next one its second, and so on (chains, Leviathan et al. 2023,
arXiv 2211.17192). A draft is sampled with the request's own options and random numbers. The target
takes the same token where the distributions of both are alike, since both add the same Gumbel
noise to each token.

In a tree, a chain leaves another one where it has a less probable token. From there on it has a
block table of its own, as in the target (engine/branches.py), and drafts in the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from octavo.draft_tree import Ranks
from octavo.engine.batch import copy_blocks, pack_block_tables, pack_sampling, pack_unless_all
from octavo.engine.block_manager import NO_PREFIX, BlockManager
from octavo.engine.branches import num_shared
from octavo.engine.request import Sequence
from octavo.engine.schedule import num_agreeing
from octavo.runtime.loader import LoadedRuntime
from octavo.speculation.source import DraftSource

_NUM_CLASSES = 8  # positions in a chain whose acceptance is told apart


@dataclass
class _Chain:
    """A chain in the draft model's cache: num_tokens of the sequence's own, then `drafts`.

    key: of its block table. todo: tokens to be computed next. drafted: the drafts of this step so
    far. path: the ranks of all that are wanted. guesses[i]: the tokens of place i, best first,
    where other chains need them. parent, shared: of a chain that leaves another one, which one, and
    after how many drafts; it begins when the other one has come there. num_named: how many of its
    blocks others can find. rope_set: which of the rope's frequencies its keys have; the second for
    more tokens than the draft model's rope_switch.
    """

    sequence: Sequence
    key: Hashable
    num_tokens: int = 0
    drafts: list[int] = field(default_factory=list)
    todo: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    path: Ranks = ()
    guesses: dict[int, list[int]] = field(default_factory=dict)
    children: list[_Chain] = field(default_factory=list)
    parent: _Chain | None = None
    shared: int = 0
    num_named: int = 0
    rope_set: int = 0


class DraftModelSource(DraftSource):
    """Chains and trees of a draft model.

    loaded: its runtime, with num_kv_blocks blocks allocated. kv_windows: of its KV groups; blocks
    behind a window are kept, because rejected drafts move a sequence back. vocab_size: the
    target's; a draft that it does not have ends a chain. make_batch: `_native.Batch`, or a test's.
    """

    num_classes = num_places = _NUM_CLASSES

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
        self.num_cached_tokens = 0  # of prompts, that were in the cache already
        self._vocab_size = vocab_size
        self._make_batch = make_batch
        windows = (0,) * len(kv_windows)
        self.blocks = BlockManager(loaded.num_kv_blocks, loaded.options.block_size, windows)
        self._chains: dict[Sequence, _Chain] = {}  # of best guesses, kept between steps

    def begin_step(self, running: Iterable[Sequence]) -> None:
        """Free the blocks of sequences that have ended or were preempted."""
        for sequence in self._chains.keys() - set(running):
            self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        del self._chains[sequence]
        self.blocks.free(sequence)

    def draft_trees(
        self, wanted: SequenceOf[tuple[Sequence, Any, SequenceOf[Ranks]]]
    ) -> SequenceOf[SequenceOf[SequenceOf[int]]]:
        """Trees of all sequences, with a batch for each place in their chains."""
        trees: list[list[_Chain]] = []
        for sequence, _, paths in wanted:
            first = self._prepare(sequence, paths[0])
            trees.append([] if first is None else _plant(first, paths))
        active = [tree[0] for tree in trees if tree]
        try:
            while unfinished := [chain for chain in active if chain.todo]:
                for chain in self._compute(unfinished):
                    active += self._begin_children(chain)
        finally:
            leaving = {chain.key for tree in trees for chain in tree[1:]}
            for key in leaving.intersection(self.blocks.holders()):
                self.blocks.free(key)
        return [
            [chain.drafted for chain in tree] or [[] for _ in paths]
            for (_, _, paths), tree in zip(wanted, trees, strict=True)
        ]

    def _prepare(self, sequence: Sequence, path: Ranks) -> _Chain | None:
        """Bring the sequence's cache in line with its tokens, and reserve blocks for the chain."""
        # The last draft of a chain is not computed.
        num_tokens = sequence.num_tokens + len(path) - 1
        if num_tokens > self.loaded.options.max_model_len:
            return None
        chain = self._chains.get(sequence)
        rope_set = int(0 < self.loaded.options.rope_switch < num_tokens)
        if chain is not None and chain.rope_set < rope_set:  # all of its keys change
            self._forget(sequence)
            chain = None
        if chain is None:
            chain = self._start(sequence, num_tokens, rope_set)
            if chain is None:
                return None
        elif not self.blocks.reserve(sequence, num_tokens):
            return None
        came = sequence.token_ids[chain.num_tokens : chain.num_tokens + len(chain.drafts)]
        chain.num_tokens += num_agreeing(came, chain.drafts)
        chain.num_tokens = min(chain.num_tokens, sequence.num_tokens - 1)
        chain.drafts, chain.guesses, chain.children = [], {}, []
        chain.todo = sequence.token_ids[chain.num_tokens :]
        chain.drafted, chain.path = [], path
        return chain

    def _start(self, sequence: Sequence, num_tokens: int, rope_set: int) -> _Chain | None:
        """A sequence that holds no blocks here gets some, with what others have computed.

        Blocks have the names of the target's (prefix_cache.py); where those are not made, none is
        found. Keys with the rope's second frequencies are not shared: names do not tell them.
        """
        names = () if rope_set else sequence.block_hashes
        prefix = self.blocks.find_prefix(names, sequence.num_tokens - 1)
        prefix = prefix if prefix.num_tokens else NO_PREFIX
        if self.blocks.num_blocks_needed(num_tokens, prefix) > self.blocks.num_free_blocks:
            return None
        copy_blocks(self.loaded.runtime, self.blocks.start(sequence, num_tokens, prefix))
        self.num_cached_tokens += prefix.num_tokens
        chain = _Chain(sequence, sequence, prefix.num_tokens, rope_set=rope_set)
        chain.num_named = prefix.num_tokens // self.blocks.block_size
        self._chains[sequence] = chain
        return chain

    def _begin_children(self, chain: _Chain) -> list[_Chain]:
        """The chains that leave this one after the drafts that it has so far."""
        begun = []
        for child in chain.children:
            guesses = chain.guesses.get(child.shared, [])
            rank = child.path[child.shared]
            if child.shared != len(chain.drafted) - 1 or rank >= len(guesses):
                continue
            num_computed = chain.num_tokens + len(chain.drafts)
            num_tokens = child.sequence.num_tokens + len(child.path) - 1
            child.drafted = [*chain.drafted[: child.shared], guesses[rank]]
            if len(child.drafted) < len(child.path):
                copies = self.blocks.branch(chain.key, child.key, num_computed, num_tokens, 0)
                if copies is not None:
                    copy_blocks(self.loaded.runtime, copies)
                    child.num_tokens, child.drafts = chain.num_tokens, list(chain.drafts)
                    child.todo = child.drafted[-1:]
            begun.append(child)
        return begun

    def _compute(self, chains: SequenceOf[_Chain]) -> list[_Chain]:
        """One batch: of every chain its next token, or as much of its prompt as there is room.

        Returns the chains that have got a draft.
        """
        options, size = self.loaded.options, self.loaded.options.max_num_batched_tokens
        parts: list[tuple[_Chain, list[int]]] = []
        for chain in chains[: options.max_num_seqs]:
            tokens = chain.todo[:size]
            if not tokens:
                break
            size -= len(tokens)
            parts.append((chain, tokens))
        starts = np.cumsum([0, *(len(tokens) for _, tokens in parts)], dtype=np.int32)
        drawn = [i for i, (chain, tokens) in enumerate(parts) if len(tokens) == len(chain.todo)]
        sequences = [parts[i][0].sequence for i in drawn]
        rows = pack_sampling(sequences, [-1] * len(drawn), self._vocab_size)
        rows["num_logprobs"] = [_num_guesses(parts[i][0]) for i in drawn]
        lengths = [chain.num_tokens + len(chain.drafts) + len(tokens) for chain, tokens in parts]
        batch = self._make_batch(
            token_ids=np.concatenate([np.array(tokens, np.int32) for _, tokens in parts]),
            row_starts=starts,
            context_lens=np.array(lengths, np.int32),
            block_tables=pack_block_tables([chain.key for chain, _ in parts], self.blocks),
            logit_rows=np.array([starts[i + 1] - 1 for i in drawn], np.int32),
            sampling=rows,
            adapter_ids=None,
            rope_sets=pack_unless_all(0, [chain.rope_set for chain, _ in parts]),
        )
        output = self.loaded.runtime.wait(self.loaded.runtime.submit(batch, sample=True))
        for chain, tokens in parts:
            self._take_computed(chain, tokens)
        drafted = []
        for row, index in enumerate(drawn):
            chain, token = parts[index][0], int(output.token_ids[row])
            if bool(output.finite[row]) and token < self._vocab_size:
                others = [int(t) for t in output.top_token_ids[row] if 0 <= t < self._vocab_size]
                others = [other for other in others if other != token]
                chain.guesses[len(chain.drafted)] = [token, *others]
                chain.drafted.append(token)
                drafted.append(chain)
                if len(chain.drafted) < len(chain.path):
                    chain.todo = [token]
        return drafted

    def _take_computed(self, chain: _Chain, tokens: SequenceOf[int]) -> None:
        """The chain's next tokens are in the cache; let others find its blocks that are full."""
        del chain.todo[: len(tokens)]
        num_own = min(len(tokens), chain.sequence.num_tokens - chain.num_tokens)
        chain.num_tokens += num_own
        chain.drafts += tokens[num_own:]
        names = chain.sequence.block_hashes[: chain.num_tokens // self.blocks.block_size]
        if chain.parent is None and not chain.rope_set:
            for index in range(chain.num_named, len(names)):
                self.blocks.publish(chain.key, index, names[index])
            chain.num_named = max(chain.num_named, len(names))


def _plant(first: _Chain, paths: SequenceOf[Ranks]) -> list[_Chain]:
    """The chains of a tree; each knows from which one it leaves, which computes that place."""
    chains = [first]
    for index, path in enumerate(paths[1:], 1):
        shared = max(num_shared(other.path, path) for other in chains)
        parent = next(other for other in chains if num_shared(other.path, path) == shared)
        key = (first.sequence.key, index)
        chain = _Chain(first.sequence, key, path=path, parent=parent, shared=shared)
        chain.rope_set = first.rope_set
        parent.children.append(chain)
        chains.append(chain)
    return chains


def _num_guesses(chain: _Chain) -> int:
    """How many of the most probable tokens the chain's next draft needs; -1: none."""
    place = len(chain.drafted)
    ranks = [child.path[place] for child in chain.children if child.shared == place]
    return max(ranks) + 1 if ranks else -1
