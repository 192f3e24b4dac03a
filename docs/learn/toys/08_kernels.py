"""Tiles: a product that reads less, and attention that never holds all of its scores."""

from importlib import import_module

import numpy as np

model = import_module("01_forward_pass")


def multiply(a, b, tile):
    out, numbers_read = np.zeros((len(a), b.shape[1])), 0
    for i in range(0, len(a), tile):
        for j in range(0, b.shape[1], tile):
            rows, columns = a[i : i + tile], b[:, j : j + tile]  # read once for tile x tile results
            out[i : i + tile, j : j + tile] = rows @ columns
            numbers_read += rows.size + columns.size
    return out, numbers_read


def attend(layer, q, keys, values, positions, tile=4):
    greatest, total, out = np.full((len(q), 1), -np.inf), 0, 0
    for start in range(0, len(keys), tile):
        scores = q @ keys[start : start + tile].T / np.sqrt(model.WIDTH)
        scores[start + np.arange(scores.shape[1]) > positions[:, None]] = -np.inf
        new = np.maximum(greatest, scores.max(axis=1, keepdims=True))
        weights, correction = np.exp(scores - new), np.exp(greatest - new)
        total = total * correction + weights.sum(axis=1, keepdims=True)
        out = out * correction + weights @ values[start : start + tile]
        greatest = new
    return out / total


if __name__ == "__main__":
    a, b = model.random.normal(size=(64, 64)), model.random.normal(size=(64, 64))
    for tile in (1, 4, 16):
        out, numbers_read = multiply(a, b, tile)
        print(f"tile {tile:2}: {numbers_read:7,} numbers read, right: {np.allclose(out, a @ b)}")
    tokens = positions = np.arange(30)
    plain, tiled = model.forward(tokens, positions), model.forward(tokens, positions, attend)
    print("attention in tiles, same scores:", np.allclose(plain, tiled))
