"""Names for what a block holds: chained hashes of tokens.

The keys and values in a block depend on its own tokens and on all tokens before them. So a block's
name is a hash of the name of the block before it and its own tokens: two blocks of the same name
hold the same numbers, and finding the longest known beginning of a prompt is one lookup a block
(the scheme of vLLM's automatic prefix caching; Zheng et al. 2024 keep a tree instead).

The hash is cryptographic (BLAKE2b, 256 bits). With a weak one a prompt could be made that is taken
for another one, and answered from somebody else's cache.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as SequenceOf

_DIGEST_SIZE = 32


def root_hash(cache_salt: str | None) -> bytes:
    """The name before the first block; another salt gives other names to all that follow."""
    label = b"" if cache_salt is None else b"salt:" + cache_salt.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(label, digest_size=_DIGEST_SIZE).digest()


def extend_block_hashes(
    hashes: list[bytes],
    token_ids: SequenceOf[int],
    num_tokens: int,
    block_size: int,
    cache_salt: str | None,
) -> None:
    """Append to `hashes` the names of the full blocks among the first num_tokens tokens."""
    parent = hashes[-1] if hashes else root_hash(cache_salt)
    for start in range(len(hashes) * block_size, num_tokens - block_size + 1, block_size):
        tokens = array("q", token_ids[start : start + block_size]).tobytes()
        parent = hashlib.blake2b(parent + tokens, digest_size=_DIGEST_SIZE).digest()
        hashes.append(parent)
