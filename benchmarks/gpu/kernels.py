"""Each kernel in the Llama-3.2-1B shape beside its floor, cuBLAS and PyTorch's attention.

    python benchmarks/gpu/kernels.py

Floor: the bytes that have to be read and written over the measured bandwidth, or the operations
over the measured peak, whichever takes longer. Matrices take turns, so that the second cache
(50 MB on an H100) does not hold them. Whether the kernels are right is the test stage's matter.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from results import keep, read
from timing import seconds_of

from octavo import _native
from octavo.models.spec import WeightFormat

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, UP, VOCAB = 32, 8, 64, 2048, 8192, 128256
MATRICES = {
    "qkv": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate+up": (2 * UP, HIDDEN),
    "down": (HIDDEN, UP),
    "head": (VOCAB, HIDDEN),
}
FORMATS: dict[str, tuple[WeightFormat | None, float]] = {  # with bytes a weight
    "bf16": (None, 2.0),
    "int8": (WeightFormat(dtype="int8"), 1.0),
    "int4": (WeightFormat(dtype="int4", group_size=128), 0.5 + 2 / 128),
}
CACHE_BYTES = 256e6  # more than any GPU's second cache


class Floors:
    """Least seconds for bytes and operations on this GPU."""

    def __init__(self) -> None:
        limits = read().get("limits")
        if limits is None:
            raise SystemExit("run benchmarks/gpu/limits.py first: floors need the GPU's limits")
        self._bandwidth = limits["read_bytes_per_second"]
        self._flops = max(limits["mma_flops"], limits["cublas_flops"])

    def seconds(self, num_bytes: float, operations: float) -> float:
        return max(num_bytes / self._bandwidth, operations / self._flops)


def linears(bench: Any, floors: Floors, rows_list: list[int]) -> Iterator[dict[str, Any]]:
    """Matrix products in every format, beside cuBLAS in bf16."""
    for name, (outputs, inputs) in MATRICES.items():
        for rows in rows_list:
            peer = _cublas(rows, outputs, inputs)
            for kind, (format, weight_bytes) in FORMATS.items():
                num_bytes = outputs * inputs * weight_bytes + 2.0 * rows * (inputs + outputs)
                copies = max(1, min(16, round(CACHE_BYTES / (outputs * inputs * weight_bytes))))
                seconds = bench.linear(rows, outputs, inputs, format, copies)
                floor = floors.seconds(num_bytes, 2.0 * rows * outputs * inputs)
                yield _row(f"{name} {kind}, {rows} rows", seconds, floor, peer)


def _cublas(rows: int, outputs: int, inputs: int) -> float:
    copies = max(1, min(16, round(CACHE_BYTES / (2 * outputs * inputs))))
    weights = [
        torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda") for _ in range(copies)
    ]
    x = torch.randn(rows, inputs, dtype=torch.bfloat16, device="cuda")

    def all_copies() -> None:
        for weight in weights:
            torch.nn.functional.linear(x, weight)

    return seconds_of(all_copies, max(1, 20 // copies)) / copies


def attentions(bench: Any, floors: Floors) -> Iterator[dict[str, Any]]:
    """Decoding and prefill over the paged cache, beside SDPA over contiguous keys and values."""
    cases = [(n, 1, c) for n in (1, 16, 64) for c in (128, 1024, 4096, 16384) if n * c <= 2**18]
    cases += [(1, length, length) for length in (128, 1024, 8192)] + [(1, 512, 8192), (4, 4, 2048)]
    for num_seqs, tokens, context in cases:
        peer = _sdpa(num_seqs, tokens, context)
        kv_numbers = 2.0 * num_seqs * context * KV_HEADS * HEAD_DIM
        seen = num_seqs * sum(range(context - tokens + 1, context + 1))
        operations = 4.0 * HEADS * HEAD_DIM * seen
        for kv_dtype, item in (("bf16", 2.0), ("int8", 1.0)):
            seconds = bench.attention(
                num_seqs, tokens, context, HEADS, KV_HEADS, HEAD_DIM, kv_dtype
            )
            num_bytes = kv_numbers * item + 4.0 * num_seqs * tokens * HEADS * HEAD_DIM
            floor = floors.seconds(num_bytes, operations)
            name = f"attention {kv_dtype}, {num_seqs} x {tokens} new of {context}"
            yield _row(name, seconds, floor, peer)


def _sdpa(num_seqs: int, tokens: int, context: int) -> float:
    def numbers(heads: int, length: int) -> torch.Tensor:
        return torch.randn(num_seqs, heads, length, HEAD_DIM, dtype=torch.bfloat16, device="cuda")

    q, k, v = numbers(HEADS, tokens), numbers(KV_HEADS, context), numbers(KV_HEADS, context)
    mask = None
    if 1 < tokens < context:
        mask = torch.ones(tokens, context, dtype=torch.bool, device="cuda").tril(context - tokens)

    def attend() -> None:
        torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=tokens == context > 1, enable_gqa=True
        )

    return seconds_of(attend)


def others(bench: Any, floors: Floors) -> Iterator[dict[str, Any]]:
    """Ops that touch each number once."""
    for rows in (1, 64, 8192):
        num_bytes = rows * HIDDEN * (4.0 + 4.0 + 2.0 + 2.0)  # residual twice, x, out
        yield _row(
            f"add_norm, {rows} rows", bench.add_norm(rows, HIDDEN), floors.seconds(num_bytes, 0)
        )
        num_bytes = rows * UP * 6.0
        seconds = bench.gated_activation(rows, UP)
        yield _row(f"silu x up, {rows} rows", seconds, floors.seconds(num_bytes, 0))
    for rows in (1, 64, 256):
        for how, settings in (
            ("greedy", (0.0, 0, 1.0)),
            ("temperature", (1.0, 0, 1.0)),
            ("top-k, top-p", (1.0, 50, 0.9)),
        ):
            seconds = bench.sample(rows, VOCAB, *settings)
            yield _row(f"sample {how}, {rows} rows", seconds, floors.seconds(4.0 * rows * VOCAB, 0))


def _row(name: str, seconds: float, floor: float, peer: float | None = None) -> dict[str, Any]:
    row = {"name": name, "seconds": seconds, "floor": floor, "peer": peer}
    beside = "" if peer is None else f"  peer {peer * 1e6:9.1f} us = {peer / seconds:5.2f}x"
    print(
        f"{name:44s} {seconds * 1e6:9.1f} us  {100 * floor / seconds:5.1f} % of floor{beside}",
        flush=True,
    )
    return row


def main() -> None:
    """Time everything and keep it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,4,8,16,64,256,2048", help="rows of x, with commas")
    given = parser.parse_args()
    bench, floors = _native.OpBench("cuda", "bf16"), Floors()
    rows = [*others(bench, floors), *attentions(bench, floors)]
    rows += linears(bench, floors, [int(part) for part in given.rows.split(",")])
    keep("kernels", {"rows": rows})


if __name__ == "__main__":
    main()
