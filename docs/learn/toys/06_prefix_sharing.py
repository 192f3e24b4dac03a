"""Prefix sharing: texts that begin alike read the same blocks, and who writes gets a copy."""

from collections import Counter
from importlib import import_module

caching, batching, paging = map(import_module, ("02_kv_cache", "03_batching", "04_paging"))
POOL, BLOCK = paging.Pool(12), paging.BLOCK
known, sharers = {}, Counter()  # tokens up to a block's end -> the block; its further readers


class Cache(paging.PagedCache):
    def __init__(self, blocks):
        super().__init__(POOL)
        self.table += blocks
        sharers.update(blocks)

    def attention(self, layer, q, k, v, positions):
        place = positions[0] // BLOCK  # of the block that is written to
        if place < len(self.table) and sharers[old := self.table[place]]:  # copy on write
            sharers[old], self.table[place] = sharers[old] - 1, (new := POOL.free.pop(0))
            POOL.keys[:, new], POOL.values[:, new] = POOL.keys[:, old], POOL.values[:, old]
        return super().attention(layer, q, k, v, positions)


def start(prompt):
    names = [tuple(prompt[:end]) for end in range(BLOCK, len(prompt), BLOCK)]
    blocks = [known[name] for name in names if name in known]  # computed for somebody else
    sequence = batching.Sequence(prompt, Cache(blocks), len(blocks) * BLOCK)
    batching.step([sequence])
    known.update(zip(names, sequence.cache.table, strict=False))
    print("computed:", prompt[len(blocks) * BLOCK :], "block table:", sequence.cache.table)
    return sequence


if __name__ == "__main__":
    first, second = start([*range(10), 20]), start([*range(10), 30])
    fork = batching.Sequence([*first.tokens[:-1], 44], Cache(first.cache.table), first.computed)
    batching.step([first, fork])  # the fork has another next token, so the two differ from here on
    print("after the fork's first step:", first.cache.table, fork.cache.table)
    print([s.tokens == caching.generate(s.tokens[:-1], 1)[0] for s in (first, second, fork)])
