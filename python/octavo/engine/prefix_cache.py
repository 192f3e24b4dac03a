"""What of a sequence is in the KV cache already, or is just being computed for another one."""

from __future__ import annotations

from collections.abc import Iterable

from octavo.engine.block_hash import extend_block_hashes
from octavo.engine.block_manager import NO_PREFIX, BlockManager, Prefix
from octavo.engine.request import Sequence, SequenceState


class PrefixCache:
    """Finds and publishes the blocks of sequences by their names; see block_hash.py.

    is_enabled: False finds nothing but what the first answer of a request has for the others.
    num_queries, num_hits: prompt tokens that were looked up, and those that were there.
    """

    def __init__(self, blocks: BlockManager, is_enabled: bool) -> None:
        self.is_enabled = is_enabled
        self.num_queries = 0
        self.num_hits = 0
        self._blocks = blocks

    def names_of(self, sequence: Sequence) -> list[bytes]:
        """The names of the full blocks among the sequence's known tokens."""
        extend_block_hashes(
            sequence.block_hashes,
            sequence.token_ids,
            len(sequence.token_ids),
            self._blocks.block_size,
            sequence.cache_salt,
        )
        return sequence.block_hashes

    def find(self, sequence: Sequence) -> Prefix:
        """What is in the cache of the sequence's tokens; the last is always computed anew.

        Its logits are wanted, and they are not in the cache.
        """
        prefix = NO_PREFIX
        if self.is_enabled:
            prefix = self._blocks.find_prefix(self.names_of(sequence), sequence.num_tokens - 1)
        leader = sequence.leader
        if leader is not None and leader.state is SequenceState.RUNNING:
            num_alike = sequence.num_prompt_tokens - 1
            if leader.num_computed_tokens > num_alike > prefix.num_tokens:
                num_blocks = self._blocks.blocks_for(num_alike)
                prefix = Prefix(self._blocks.block_table(leader.key)[:num_blocks], num_alike)
        return prefix

    def is_being_computed(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        """Whether the next block that the sequence lacks is on its way, for one that runs.

        Then waiting a step or two saves computing it twice: of requests that begin alike and come
        together, one computes the beginning.
        """
        leader = sequence.leader
        if leader is not None and leader.state is SequenceState.RUNNING:
            return leader.num_computed_tokens < leader.num_prompt_tokens
        if not self.is_enabled:
            return False
        for index, name in enumerate(self.names_of(sequence)):
            if self._blocks.pool.find(name) is None:
                return any(
                    other.num_published_blocks <= index < len(other.block_hashes)
                    and other.block_hashes[index] == name
                    for other in running
                )
        return False

    def publish(self, sequence: Sequence, num_full_blocks: int) -> None:
        """Let others find the sequence's blocks up to num_full_blocks, which are computed."""
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
