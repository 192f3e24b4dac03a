"""Batching: one pass through the weights gives every sequence its next token."""

from importlib import import_module

import numpy as np

model, caching = import_module("01_forward_pass"), import_module("02_kv_cache")


class Sequence:
    def __init__(self, prompt, cache, computed=0):  # computed: how many tokens the cache holds
        self.tokens, self.cache, self.computed = list(prompt), cache, computed


def step(sequences):
    tokens = np.concatenate([s.tokens[s.computed :] for s in sequences])
    positions = np.concatenate([np.arange(s.computed, len(s.tokens)) for s in sequences])
    ends = np.cumsum([len(s.tokens) - s.computed for s in sequences])

    def attention(layer, *rows):  # q, k, v and positions; each sequence looks at itself alone
        parts = zip(*(np.split(x, ends[:-1]) for x in rows), strict=True)
        pairs = zip(sequences, parts, strict=True)
        return np.concatenate([s.cache.attention(layer, *part) for s, part in pairs])

    scores = model.forward(tokens, positions, attention)  # every matrix is read once, for all
    for s, end in zip(sequences, ends, strict=True):
        s.computed = len(s.tokens)
        s.tokens.append(int(scores[end - 1].argmax()))


if __name__ == "__main__":
    prompts = [[7, 3, 11], [20, 4], [1, 2, 3, 4, 5]]
    sequences = [Sequence(prompt, caching.Cache()) for prompt in prompts]
    for _ in range(6):
        step(sequences)
    for s, prompt in zip(sequences, prompts, strict=True):
        print(s.tokens, "as alone:", s.tokens == caching.generate(prompt, 6)[0])
