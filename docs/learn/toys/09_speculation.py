"""Speculation: a cheap model guesses some tokens, and one pass of the real model checks them."""

from importlib import import_module

import numpy as np

model, caching = import_module("01_forward_pass"), import_module("02_kv_cache")
quantization = import_module("07_quantization")
exact, cheap = model.layers, quantization.rounded(model.layers, 4)


def draft(tokens, count):  # greedy, by the model of chapter 7 with weights in 4 bits
    model.layers = cheap
    guesses = list(tokens)
    for _ in range(count):
        scores = model.forward(guesses, np.arange(len(guesses)))
        guesses.append(int(scores[-1].argmax()))
    model.layers = exact
    return guesses[len(tokens) :]


def generate(prompt, count, num_drafts):
    tokens, passes = list(prompt), 0
    while len(tokens) < len(prompt) + count:
        guesses = draft(tokens, num_drafts)
        scores = model.forward(tokens + guesses, np.arange(len(tokens + guesses)))
        passes += 1
        for guess in [*guesses, None]:  # the real model's choice at each place
            tokens.append(int(scores[len(tokens) - 1].argmax()))
            if tokens[-1] != guess:
                break  # later guesses followed a wrong token
    return tokens[: len(prompt) + count], passes


if __name__ == "__main__":
    expected, _ = caching.generate([7, 3, 11], 40)
    for num_drafts in (0, 1, 2, 4):
        tokens, passes = generate([7, 3, 11], 40, num_drafts)
        print(num_drafts, "drafts:", passes, "passes, same tokens:", tokens == expected)
