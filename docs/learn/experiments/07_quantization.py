"""What fewer bits cost: SmolLM2 with the matrices of its layers in 3 to 8 bits.

The cost is the KL divergence, in nats a token, of the rounded model's probabilities from the exact
ones: 0 where both expect the same. SmolLM2's weights have been rounded once before they came here,
in blocks of 32 weights to 4 bits, so groups of 32 would find half of that grid again. The groups
here are of 64.
"""

import numpy as np
from measured import COLOURS, axes, load_reference, save

from octavo.reference.llama import ReferenceModel

BITS = [8, 6, 4, 3]
SHARING = {"a scale for a matrix": 0, "a scale for a row": -1, "a scale for 64 weights": 64}
model, tokenizer = load_reference()
TEXT = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having "
    "nothing to do: once or twice she had peeped into the book her sister was reading, but it had "
    "no pictures or conversations in it."
)
tokens = tokenizer.encode(TEXT)


def rounded(weight: np.ndarray, bits: int, group: int) -> np.ndarray:
    """A matrix (outputs, inputs) of the numbers that codes of so many bits stand for."""
    shape = {0: (1, -1), -1: weight.shape}.get(group, (-1, group))
    groups = weight.reshape(shape)
    largest = np.float32(2 ** (bits - 1) - 1)
    scales = np.abs(groups).max(axis=1, keepdims=True) / largest
    return (np.rint(groups / np.maximum(scales, 1e-12)) * scales).reshape(weight.shape)


def log_probabilities(weights: dict[str, np.ndarray]) -> np.ndarray:
    logits = ReferenceModel(model.spec, weights).forward(tokens).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


exact = log_probabilities(model.weights)
costs = {}
for name, group in SHARING.items():
    costs[name] = []
    for bits in BITS:
        weights = {
            key: rounded(value, bits, group)
            if key.startswith("layers.") and value.ndim == 2
            else value
            for key, value in model.weights.items()
        }
        found = log_probabilities(weights)
        costs[name].append(float(np.mean(np.sum(np.exp(exact) * (exact - found), axis=1))))
plot = axes()
for (name, values), colour in zip(costs.items(), ("orange", "purple", "blue"), strict=True):
    plot.plot(BITS, values, color=COLOURS[colour], marker="o", label=name)
plot.set_yscale("log")
plot.set(xlabel="bits of a weight", ylabel="KL divergence (nats a token)")
plot.set_xticks(BITS, BITS)
plot.legend()
table = [["bits", *SHARING]]
for place, bits in enumerate(BITS):
    table.append([str(bits), *(f"{values[place]:.4f}" for values in costs.values())])
save(plot, {"bits": BITS, "kl": costs}, table)
