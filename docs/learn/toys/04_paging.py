"""Paging: keys and values lie in blocks anywhere; a block table tells where."""

from importlib import import_module

import numpy as np

model, caching = import_module("01_forward_pass"), import_module("02_kv_cache")
batching = import_module("03_batching")
BLOCK = 4  # tokens


class Pool:  # the memory of all sequences, taken once
    def __init__(self, num_blocks):
        shape = (model.LAYERS, num_blocks, BLOCK, model.WIDTH)
        self.keys, self.values = np.zeros(shape), np.zeros(shape)
        self.free = list(range(num_blocks))


class PagedCache:
    def __init__(self, pool):
        self.pool, self.table = pool, []  # the table: which block holds tokens 0-3, 4-7, ...

    def attention(self, layer, q, k, v, positions):
        while len(self.table) * BLOCK <= positions[-1]:
            self.table.append(self.pool.free.pop(0))  # a block is taken when a token needs it
        blocks, places = np.array(self.table)[positions // BLOCK], positions % BLOCK
        self.pool.keys[layer, blocks, places], self.pool.values[layer, blocks, places] = k, v
        keys, values = self.pool.keys[layer, self.table], self.pool.values[layer, self.table]
        return model.attend(layer, q, np.concatenate(keys), np.concatenate(values), positions)


if __name__ == "__main__":
    pool = Pool(num_blocks=8)
    sequences = [batching.Sequence(p, PagedCache(pool)) for p in ([7, 3, 11], [20, 4])]
    for _ in range(8):
        batching.step(sequences)
    for s in sequences:
        expected, _ = caching.generate(s.tokens[:-8], 8)
        print("block table", s.cache.table, "same tokens:", s.tokens == expected)
    print("free blocks", pool.free)
