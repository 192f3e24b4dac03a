"""What must hold of every sequence between two steps, whatever has happened."""

from __future__ import annotations

from octavo.engine.block_manager import BlockManager
from octavo.engine.block_pool import IntegrityError
from octavo.engine.request import Sequence, SequenceState


def check_waiting(sequence: Sequence) -> None:
    """A sequence in the waiting queue has nothing in the cache; IntegrityError if it has."""
    if sequence.state is not SequenceState.WAITING or sequence.num_computed_tokens:
        raise IntegrityError(f"{sequence!r} is in the waiting queue")


def check_running(sequence: Sequence, blocks: BlockManager) -> None:
    """It holds what it has computed, and alone what it is going to write; IntegrityError if not."""
    if sequence.state is not SequenceState.RUNNING:
        raise IntegrityError(f"{sequence!r} is among the running")
    table = blocks.block_table(sequence.key)
    if len(table) < blocks.blocks_for(sequence.num_computed_tokens):
        raise IntegrityError(f"{sequence!r} holds only {len(table)} blocks")
    for block in table[sequence.num_computed_tokens // blocks.block_size :]:
        if blocks.pool.num_holders(block) != 1 or blocks.pool.is_published(block):
            raise IntegrityError(f"{sequence!r} is going to write to block {block}, shared")
