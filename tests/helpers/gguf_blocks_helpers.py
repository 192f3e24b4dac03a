"""Blocks of GGUF types for which the package `gguf` has a decoder but no encoder."""

from __future__ import annotations

import gguf
import numpy as np

# Where the float16 numbers of a block lie: bytes from, to.
SCALES = {
    "Q2_K": (80, 84),
    "Q3_K": (108, 110),
    "Q4_K": (0, 4),
    "Q5_K": (0, 4),
    "Q6_K": (208, 210),
    "IQ4_NL": (0, 2),
    "IQ4_XS": (0, 2),
}


def random_blocks(shape: tuple[int, ...], kind: str, seed: int) -> np.ndarray:
    """Random valid blocks: every byte pattern is one, but for float16 numbers, which are small."""
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    first, last = SCALES[kind]
    generator = np.random.default_rng(seed)
    rows, blocks = shape[0], shape[1] // block_elements
    raw = generator.integers(0, 256, (rows, blocks, block_bytes), dtype=np.uint8)
    least = 1e-5 if kind.startswith("IQ4") else 1e-3  # their other factors are up to 32 * 127
    small = generator.uniform(least, 10 * least, (rows, blocks, (last - first) // 2))
    raw[:, :, first:last] = small.astype(np.float16).view(np.uint8)
    return raw.reshape(rows, blocks * block_bytes)


def encode_q4_k(values: np.ndarray) -> np.ndarray:
    """(rows, inputs), inputs a multiple of 256 -> (rows, bytes).

    Each group of 32 has 16 steps from its least number, or 0, to its greatest. Written bit by bit.
    """
    groups = values.reshape(-1, 8, 32)
    low = np.minimum(groups.min(axis=2), 0)
    step = (groups.max(axis=2) - low) / 15
    factors = np.stack([step.max(axis=1) / 63, (-low).max(axis=1) / 63], axis=1)
    factors = factors.astype(np.float16)
    wide = factors.astype(np.float32)
    scales = np.rint(step / wide[:, :1]).astype(np.uint8)
    minima = np.rint(-low / wide[:, 1:]).astype(np.uint8)
    steps, offsets = (wide[:, :1] * scales)[:, :, None], (wide[:, 1:] * minima)[:, :, None]
    codes = np.clip(np.rint((groups + offsets) / steps), 0, 15).astype(np.uint8)
    blocks = np.zeros((len(groups), 144), np.uint8)
    blocks[:, :4] = factors.view(np.uint8)
    for index in range(4):
        blocks[:, 4 + index] = scales[:, index] | (scales[:, index + 4] >> 4) << 6
        blocks[:, 8 + index] = minima[:, index] | (minima[:, index + 4] >> 4) << 6
        blocks[:, 12 + index] = scales[:, index + 4] & 15 | (minima[:, index + 4] & 15) << 4
        pair = codes[:, 2 * index] | codes[:, 2 * index + 1] << 4
        blocks[:, 16 + 32 * index : 48 + 32 * index] = pair
    return blocks.reshape(len(values), -1)


def encode_blocks(values: np.ndarray, kind: str, seed: int) -> np.ndarray:
    """A matrix in blocks of any type; for most K types its own numbers are lost."""
    if kind == "Q4_K":
        return encode_q4_k(values)
    if kind in SCALES:
        return random_blocks(values.shape, kind, seed)
    contiguous = np.ascontiguousarray(values, np.float32)
    return gguf.quantize(contiguous, gguf.GGMLQuantizationType[kind])
