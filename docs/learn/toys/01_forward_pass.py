"""A forward pass: the tokens so far go in, a score for every possible next token comes out."""

import numpy as np

VOCABULARY, LONGEST, WIDTH, LAYERS = 50, 64, 32, 2
random = np.random.default_rng(30)
embedding, places = random.normal(size=(VOCABULARY, WIDTH)), random.normal(size=(LONGEST, WIDTH))
head = random.normal(size=(WIDTH, VOCABULARY))
layers = [
    {name: random.normal(size=(WIDTH, WIDTH)) / 3 for name in ("q", "k", "v", "o", "up", "down")}
    for _ in range(LAYERS)
]


def norm(x):  # every row gets the same length
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True))


def attend(layer, q, keys, values, positions):  # keys and values of positions 0, 1, 2, ...
    scores = q @ keys.T / np.sqrt(WIDTH)
    scores[np.arange(len(keys)) > positions[:, None]] = -np.inf  # no token sees a later one
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ values


def forward(tokens, positions, attention=attend):
    x = embedding[tokens] + places[positions]  # one row a token
    for layer, weight in enumerate(layers):
        q, k, v = (norm(x) @ weight[name] for name in "qkv")
        x = x + attention(layer, q, k, v, positions) @ weight["o"]
        x = x + np.maximum(norm(x) @ weight["up"], 0) @ weight["down"]
    return norm(x) @ head  # (tokens, VOCABULARY): the row of a token scores what may follow it


if __name__ == "__main__":
    tokens = [7, 3, 11]  # the prompt
    for _ in range(8):
        scores = forward(tokens, np.arange(len(tokens)))
        tokens.append(int(scores[-1].argmax()))
    print(tokens)
