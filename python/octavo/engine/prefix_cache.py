"""Which tokens of a sequence are in the KV cache already, or being computed for another sequence.

Blocks are found by their names, which are chained hashes of tokens. The keys and values in a block
depend on its own tokens and on all tokens before them. So a block's name is a hash of the name of
the block before it and its own tokens: two blocks of the same name hold the same numbers, and
finding the longest known beginning of a prompt is one lookup a block (the scheme of vLLM's
automatic prefix caching; Zheng et al. 2024 keep a tree instead).

The hash is cryptographic (BLAKE2b, 256 bits). With a weak one a prompt could be made that is taken
for another one, and answered with another user's keys and values.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from octavo.engine.block_manager import NO_PREFIX, BlockManager, Prefix
from octavo.engine.request import Sequence, SequenceState

_DIGEST_SIZE = 32


def extend_block_hashes(
    hashes: list[bytes],
    token_ids: SequenceOf[int],
    block_size: int,
    cache_salt: str | None,
    adapter_load: int = 0,
    rope_set: int = 0,
) -> None:
    """Append to `hashes` the names of the full blocks among the tokens.

    The salt, the adapter (`Loan.load`; 0: none) and the set of rope frequencies are the name before
    the first block: another one gives other names to all that follow.
    """
    label = b"rope:%d:" % rope_set if rope_set else b""
    label += b"adapter:%d:" % adapter_load if adapter_load else b""
    label += b"" if cache_salt is None else b"salt:" + cache_salt.encode("utf-8", "surrogatepass")
    parent = hashes[-1] if hashes else hashlib.blake2b(label, digest_size=_DIGEST_SIZE).digest()
    for start in range(len(hashes) * block_size, len(token_ids) - block_size + 1, block_size):
        tokens = array("q", token_ids[start : start + block_size]).tobytes()
        parent = hashlib.blake2b(parent + tokens, digest_size=_DIGEST_SIZE).digest()
        hashes.append(parent)


class PrefixCache:
    """Finds and publishes the blocks of sequences by their names.

    is_enabled: if False, only the answers of one request share their prompt's blocks.
    num_queries, num_hits: prompt tokens that were looked up, and those that were found.
    """

    def __init__(self, blocks: BlockManager, is_enabled: bool) -> None:
        self.is_enabled = is_enabled
        self.num_queries = 0
        self.num_hits = 0
        self._blocks = blocks

    def names_of(self, sequence: Sequence) -> list[bytes]:
        """The names of the full blocks among the sequence's known tokens."""
        names, block_size = sequence.block_hashes, self._blocks.block_size
        salt, load = sequence.cache_salt, sequence.adapter.load
        rope_set = sequence.rope_set
        extend_block_hashes(names, sequence.token_ids, block_size, salt, load, rope_set)
        return names

    def find(self, sequence: Sequence) -> Prefix:
        """The sequence's tokens that are in the cache, up to the first whose logits are needed.

        That one is computed again, since the cache holds no logits: most often the last token.
        """
        prefix = NO_PREFIX
        if self.is_enabled:
            names = self.names_of(sequence)
            prefix = self._blocks.find_prefix(names, sequence.num_reusable_tokens)
        leader = _running_leader(sequence)
        if leader is not None:
            num_alike = sequence.num_prompt_tokens - 1
            if leader.num_computed_tokens > num_alike > prefix.num_tokens:
                prefix = self._blocks.prefix_of(leader.key, num_alike) or prefix
        return prefix

    def is_being_computed(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        """Whether a running sequence is computing the next block that this sequence lacks.

        Then waiting a step or two saves computing it twice: when requests that begin alike come
        together, one computes the beginning.
        """
        leader = _running_leader(sequence)
        if leader is not None:
            return leader.num_computed_tokens < leader.num_prompt_tokens
        if not self.is_enabled:
            return False
        most = sequence.num_reusable_tokens
        names = self.names_of(sequence)[: self._blocks.groups.blocks_in_group(most)]
        index = len(self._blocks.find_prefix(names, most).blocks[0])
        return index < len(names) and any(
            other.num_published_blocks <= index < len(other.block_hashes)
            and other.block_hashes[index] == names[index]
            for other in running
        )

    def publish(self, sequence: Sequence, num_full_blocks: int) -> None:
        """Let others find the sequence's first num_full_blocks blocks, which are computed."""
        if self.is_enabled:
            names = self.names_of(sequence)
            for index in range(sequence.num_published_blocks, num_full_blocks):
                self._blocks.publish(sequence.key, index, names[index])
        sequence.num_published_blocks = num_full_blocks

    def note_first_admission(self, sequence: Sequence, prefix: Prefix) -> None:
        """Count a lookup; the answers of one request count once."""
        sequence.num_cached_tokens = prefix.num_tokens
        if self.is_enabled and sequence.leader is None:
            self.num_queries += sequence.num_tokens
            self.num_hits += prefix.num_tokens


def _running_leader(sequence: Sequence) -> Sequence | None:
    """The leader whose blocks the sequence may share."""
    leader = sequence.leader
    if leader is None or leader.state is not SequenceState.RUNNING:
        return None
    return leader if leader.rope_set == sequence.rope_set else None
