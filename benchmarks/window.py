"""What attention costs with a window in a long context, beside a context as short as the window.

    python benchmarks/window.py [--rounds 5]

Both are the op alone, decoding, with the keys and values in memory and not in a cache; they take
turns. A ratio is the median of the rounds' ratios: 1 where a window of 1,024 tokens in a context of
8,192 costs what a context of 1,024 costs. First of all the results of both must be the same bits.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np

from octavo import _native_ops

WINDOW, CONTEXT = 1024, 8192
# Sequences, query heads, KV heads, head_dim: Mistral 7B, Gemma 3 1B.
SHAPES = [(1, 32, 8, 128), (1, 4, 1, 256), (8, 4, 1, 256)]


def check(kv_dtype: str, heads: int, kv_heads: int, head_dim: int) -> None:
    """The last tokens of the long context alone give the bits of the long context."""
    ops = _native_ops.Ops("cpu", 1)
    generator = np.random.default_rng(1)
    k, v = generator.standard_normal((2, CONTEXT, kv_heads, head_dim), np.float32)
    q = generator.standard_normal((1, heads, head_dim), np.float32)
    table = np.arange(CONTEXT // 16, dtype=np.int32)[None]

    def attend(k: np.ndarray, v: np.ndarray, table: np.ndarray, window: int) -> bytes:
        starts, lengths = np.array([0, 1], np.int32), np.array([table.size * 16], np.int32)
        out = ops.attention(q, k, v, starts, lengths, table, 0.1, window, kv_dtype=kv_dtype)
        return np.asarray(out).tobytes()

    # WINDOW and CONTEXT are multiples of what the sums are cut into.
    short = attend(k[-WINDOW:], v[-WINDOW:], table[:, : WINDOW // 16], 0)
    if attend(k, v, table, WINDOW) != short:
        raise SystemExit(f"{kv_dtype}, {heads} heads: the bits differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    bench = _native_ops.OpBench("cpu", "f32", launches=40, repeats=3, cache_bytes=64 << 20)
    for kv_dtype in ("bf16", "int8"):
        for seqs, *heads in SHAPES:
            check(kv_dtype, *heads)
            times = [
                [
                    bench.attention(seqs, 1, context, *heads, kv_dtype, window)
                    for context, window in ((WINDOW, 0), (CONTEXT, WINDOW), (CONTEXT, 0))
                ]
                for _ in range(arguments.rounds)
            ]
            short, windowed, whole = np.median(times, axis=0)
            ratio = statistics.median(window / short for short, window, _ in times)
            print(
                f"{kv_dtype}, {seqs:2} sequences, heads {heads}: {WINDOW} tokens "
                f"{short * 1e6:.0f} us, of {CONTEXT} {windowed * 1e6:.0f} us ({ratio:.2f} times), "
                f"all {whole * 1e6:.0f} us"
            )


if __name__ == "__main__":
    main()
