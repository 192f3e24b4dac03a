"""Blocks of GGUF types for which the package `gguf` has a decoder but no encoder.

Each part of a block has a step that spans its numbers; ggml's own encoders search for better ones.
gguf is imported where it is used: tests that need no such blocks run without it.
"""

from __future__ import annotations

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
    import gguf

    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    first, last = SCALES[kind]
    generator = np.random.default_rng(seed)
    rows, blocks = shape[0], shape[1] // block_elements
    raw = generator.integers(0, 256, (rows, blocks, block_bytes), dtype=np.uint8)
    least = 1e-5 if kind.startswith("IQ4") else 1e-3  # their other factors are up to 32 * 127
    small = generator.uniform(least, 10 * least, (rows, blocks, (last - first) // 2))
    raw[:, :, first:last] = small.astype(np.float16).view(np.uint8)
    return raw.reshape(rows, blocks * block_bytes)


def packed(values: np.ndarray, axis: int, bits: int) -> np.ndarray:
    """Numbers of so many bits along an axis, the first in the lowest bits of a byte."""
    shape = [1] * values.ndim
    shape[axis] = -1
    places = (np.arange(values.shape[axis]) * bits).reshape(shape)
    return (values.astype(np.uint32) << places).sum(axis=axis).astype(np.uint8)


def with_minima(values: np.ndarray, size: int, top: int, most: int) -> tuple[np.ndarray, ...]:
    """float16 (blocks, 2), scales and minima (blocks, parts) up to `most`, codes 0 to `top`."""
    parts = values.reshape(-1, 256 // size, size)
    low = np.minimum(parts.min(axis=2), 0)
    step = (parts.max(axis=2) - low) / top
    factors = np.stack([step.max(axis=1) / most, (-low).max(axis=1) / most], axis=1)
    factors = factors.astype(np.float16)
    wide = factors.astype(np.float32)
    scales = np.rint(step / wide[:, :1]).astype(np.uint8)
    minima = np.rint(-low / wide[:, 1:]).astype(np.uint8)
    steps, offsets = (wide[:, :1] * scales)[:, :, None], (wide[:, 1:] * minima)[:, :, None]
    codes = np.clip(np.rint((parts + offsets) / steps), 0, top).astype(np.uint8)
    return factors.view(np.uint8), scales, minima, codes.reshape(-1, 256)


def symmetric(values: np.ndarray, low: int, most: int) -> tuple[np.ndarray, ...]:
    """float16 (blocks, 1), scales (blocks, 16) of either sign, codes: `low` is the largest."""
    parts = values.reshape(-1, 16, 16)
    places = np.abs(parts).argmax(axis=2)[:, :, None]
    step = np.take_along_axis(parts, places, axis=2)[:, :, 0] / low
    factors = (np.abs(step).max(axis=1, keepdims=True) / most).astype(np.float16)
    scales = np.rint(step / factors.astype(np.float32))
    steps = (factors * np.where(scales == 0, 1, scales))[:, :, None].astype(np.float32)
    codes = np.clip(np.rint(parts / steps), low, -low - 1)
    return factors.view(np.uint8), scales.astype(np.int8), (codes - low).reshape(-1, 2, 4, 32)


def encode_q4_or_q5_k(values: np.ndarray, bits: int) -> np.ndarray:
    """Groups of 32 with a minimum; scales and minima of 6 bits."""
    factors, scales, minima, codes = with_minima(values, 32, 2**bits - 1, 63)
    low, high = slice(0, 4), slice(4, 8)
    groups = codes.reshape(-1, 4, 2, 32)
    found = [
        factors,
        scales[:, low] | (scales[:, high] >> 4) << 6,
        minima[:, low] | (minima[:, high] >> 4) << 6,
        scales[:, high] & 15 | (minima[:, high] & 15) << 4,
        *([packed(codes.reshape(-1, 8, 32) >> 4, 1, 1)] if bits == 5 else []),
        packed(groups & 15, 2, 4).reshape(len(codes), -1),
    ]
    return np.concatenate(found, axis=1)


def encode_q2_k(values: np.ndarray) -> np.ndarray:
    """Parts of 16 with a minimum; scales and minima of 4 bits."""
    factors, scales, minima, codes = with_minima(values, 16, 3, 15)
    low = packed(codes.reshape(-1, 2, 4, 32), 2, 2).reshape(len(codes), -1)
    return np.concatenate([scales | minima << 4, low, factors], axis=1)


def encode_q3_k(values: np.ndarray) -> np.ndarray:
    """Parts of 16; scales of 6 bits."""
    factors, scales, codes = symmetric(values, -4, 31)
    stored, count = (scales + 32).astype(np.uint8), len(codes)
    found = [
        packed(codes.reshape(count, 8, 32).astype(np.uint8) >> 2, 1, 1),
        packed(codes.astype(np.uint8) & 3, 2, 2).reshape(count, -1),
        stored[:, :8] & 15 | (stored[:, 8:] & 15) << 4,
        packed(stored.reshape(count, 4, 4) >> 4, 1, 2),
        factors,
    ]
    return np.concatenate(found, axis=1)


def encode_q6_k(values: np.ndarray) -> np.ndarray:
    """Parts of 16; scales of 8 bits."""
    factors, scales, codes = symmetric(values, -32, 127)
    stored, count = codes.astype(np.uint8), len(codes)
    found = [
        packed(stored.reshape(count, 2, 2, 64) & 15, 2, 4).reshape(count, -1),
        packed(stored >> 4, 2, 2).reshape(count, -1),
        scales.view(np.uint8),
        factors,
    ]
    return np.concatenate(found, axis=1)


ENCODERS = {
    "Q2_K": encode_q2_k,
    "Q3_K": encode_q3_k,
    "Q4_K": lambda values: encode_q4_or_q5_k(values, 4),
    "Q5_K": lambda values: encode_q4_or_q5_k(values, 5),
    "Q6_K": encode_q6_k,
}


def encode_blocks(values: np.ndarray, kind: str, seed: int) -> np.ndarray:
    """A matrix (rows, inputs) in blocks of any type; for IQ4 types its own numbers are lost."""
    if kind in ENCODERS:
        return ENCODERS[kind](values).reshape(len(values), -1)
    if kind in SCALES:
        return random_blocks(values.shape, kind, seed)
    contiguous = np.ascontiguousarray(values, np.float32)
    import gguf

    return gguf.quantize(contiguous, gguf.GGMLQuantizationType[kind])
