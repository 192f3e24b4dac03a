"""Quantization: small whole numbers, and a scale for each group of them, instead of the weights."""

from importlib import import_module

import numpy as np

model, caching = import_module("01_forward_pass"), import_module("02_kv_cache")
GROUP = 16  # weights that share a scale


def quantize(weight, bits):
    groups = weight.reshape(-1, GROUP)
    largest = 2 ** (bits - 1) - 1  # 4 bits: whole numbers from -7 to 7
    scales = np.abs(groups).max(axis=1, keepdims=True) / largest
    return np.round(groups / scales).astype(np.int8), scales.astype(np.float16)


def dequantize(codes, scales, shape):
    return (codes * scales.astype(np.float64)).reshape(shape)


def rounded(layers, bits):  # the numbers that the codes stand for
    return [
        {name: dequantize(*quantize(weight, bits), weight.shape) for name, weight in layer.items()}
        for layer in layers
    ]


if __name__ == "__main__":
    tokens, exact = caching.generate([7, 3, 11], 40)[0], model.layers
    print("bits, with the scale, error of the weights, same next tokens of 40")
    for bits in (8, 6, 5, 4, 3):
        model.layers = rounded(exact, bits)
        scores = model.forward(tokens[:-1], np.arange(len(tokens) - 1))
        agree = np.sum(scores.argmax(axis=1)[2:] == tokens[3:])
        weight, error = exact[0]["q"], model.layers[0]["q"] - exact[0]["q"]
        relative = np.linalg.norm(error) / np.linalg.norm(weight)
        print(f"{bits:4} {bits + 16 / GROUP:15.1f} {relative:21.1%} {agree:26}")
