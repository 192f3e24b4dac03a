"""Each kernel in the Llama-3.2-1B shape beside its floor, cuBLAS and PyTorch's attention.

    python benchmarks/gpu/kernels.py

Floor: the bytes that have to be read and written over the measured bandwidth, or the operations
over the measured peak, whichever takes longer. What is read takes turns, so that the second cache
(50 MB on an H100) does not hold it. Whether the kernels are right is the tests' matter.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from limits import seconds_of
from results import DEVICE, EMULATE, TORCH_DEVICE, keep, read_peak

from octavo import _native_ops
from octavo.bench.cases import Peak, Work, least_seconds
from octavo.models.spec import WeightFormat

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, UP, VOCAB = 32, 8, 64, 2048, 8192, 128256
ROWS = "1,4,8,9,16,64,128,256,2048"
CONTEXTS, SEQUENCES = (128, 1024, 4096, 16384), (1, 16, 64)
PREFILLS = [(1, length, length) for length in (128, 1024, 8192)] + [(1, 512, 8192), (4, 4, 2048)]
ELEMENT_ROWS, SAMPLE_ROWS = (1, 64, 8192), (1, 64, 256)
BENCH: dict[str, int] = {}
if EMULATE:
    HEADS, KV_HEADS, HEAD_DIM, HIDDEN, UP, VOCAB = 2, 1, 64, 128, 128, 307
    ROWS, CONTEXTS, SEQUENCES, PREFILLS = "1,9", (20,), (1,), [(1, 20, 20), (1, 2, 20)]
    ELEMENT_ROWS, SAMPLE_ROWS = (1,), (1,)
    BENCH = {"launches": 2, "repeats": 1, "cache_bytes": 1 << 16}
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


Rows = Iterator[dict[str, Any]]


def linears(bench: Any, peak: Peak, rows_list: list[int]) -> Rows:
    """Matrix products in every format, beside cuBLAS in bf16."""
    for name, (outputs, inputs) in MATRICES.items():
        peers = _cublas(rows_list, outputs, inputs)
        for kind, (format, weight_bytes) in FORMATS.items():
            times = bench.linear(rows_list, outputs, inputs, format)
            for rows, seconds, peer in zip(rows_list, times, peers, strict=True):
                num_bytes = outputs * inputs * weight_bytes + 2.0 * rows * (inputs + outputs)
                floor = floor_of(peak, num_bytes, 2.0 * rows * outputs * inputs)
                yield _row(f"{name} {kind}, {rows} rows", seconds, floor, peer)


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=TORCH_DEVICE)


def _cublas(rows_list: list[int], outputs: int, inputs: int) -> list[float | None]:
    if torch is None:
        return [None] * len(rows_list)
    copies = max(1, min(16, round(CACHE_BYTES / (2 * outputs * inputs))))
    weights = [_numbers(outputs, inputs) for _ in range(copies)]
    times: list[float | None] = []
    for rows in rows_list:
        x = _numbers(rows, inputs)

        def all_copies(x: torch.Tensor = x) -> None:
            for weight in weights:
                torch.nn.functional.linear(x, weight)

        times.append(seconds_of(all_copies, max(1, 40 // copies)) / copies)
    return times


def attentions(bench: Any, peak: Peak) -> Rows:
    """Decoding and prefill over the paged cache, beside SDPA over contiguous keys and values."""
    cases = [(n, 1, c) for n in SEQUENCES for c in CONTEXTS if n * c <= 2**18]
    for num_seqs, tokens, context in cases + PREFILLS:
        peer = _sdpa(num_seqs, tokens, context)
        kv_numbers = 2.0 * num_seqs * context * KV_HEADS * HEAD_DIM
        seen = num_seqs * sum(range(context - tokens + 1, context + 1))
        operations = 4.0 * HEADS * HEAD_DIM * seen
        for kv_dtype, item in (("bf16", 2.0), ("int8", 1.0)):
            seconds = bench.attention(
                num_seqs, tokens, context, HEADS, KV_HEADS, HEAD_DIM, kv_dtype
            )
            num_bytes = kv_numbers * item + 4.0 * num_seqs * tokens * HEADS * HEAD_DIM
            floor = floor_of(peak, num_bytes, operations)
            name = f"attention {kv_dtype}, {num_seqs} x {tokens} new of {context}"
            yield _row(name, seconds, floor, peer)


def _sdpa(num_seqs: int, tokens: int, context: int) -> float | None:
    """Of as many copies of keys and values as octavo's own take turns."""
    if torch is None:
        return None
    kv_bytes = 4.0 * num_seqs * context * KV_HEADS * HEAD_DIM
    copies = 1 if EMULATE else max(1, min(1024, round(CACHE_BYTES / kv_bytes)))
    q, kv = _numbers(num_seqs, HEADS, tokens, HEAD_DIM), (num_seqs, KV_HEADS, context, HEAD_DIM)
    caches = [(_numbers(*kv), _numbers(*kv)) for _ in range(copies)]
    mask = None
    if 1 < tokens < context:
        mask = torch.ones(tokens, context, dtype=torch.bool, device=TORCH_DEVICE)
        mask = mask.tril(context - tokens)

    def attend() -> None:
        for k, v in caches:
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=tokens == context > 1, enable_gqa=True
            )

    return seconds_of(attend, max(1, 40 // copies)) / copies


def others(bench: Any, peak: Peak) -> Rows:
    """Ops that touch each number once."""
    for rows in ELEMENT_ROWS:
        num_bytes = rows * HIDDEN * (4.0 + 4.0 + 2.0 + 2.0)  # residual twice, x, out
        seconds = bench.add_norm(rows, HIDDEN)
        yield _row(f"add_norm, {rows} rows", seconds, floor_of(peak, num_bytes))
        seconds = bench.gated_activation(rows, UP)
        yield _row(f"silu x up, {rows} rows", seconds, floor_of(peak, rows * UP * 6.0))
    for rows in SAMPLE_ROWS:
        for how, settings in (
            ("greedy", (0.0, 0, 1.0)),
            ("temperature", (1.0, 0, 1.0)),
            ("top-k, top-p", (1.0, 50, 0.9)),
        ):
            seconds = bench.sample(rows, VOCAB, *settings)
            yield _row(f"sample {how}, {rows} rows", seconds, floor_of(peak, 4.0 * rows * VOCAB))


def floor_of(peak: Peak, num_bytes: float, operations: float = 0.0) -> float:
    return least_seconds(Work(num_bytes, operations), peak)[0]


def _row(name: str, seconds: float, floor: float, peer: float | None = None) -> dict[str, Any]:
    row = {"name": name, "seconds": seconds, "floor": floor, "peer": peer}
    beside = "" if peer is None else f"  peer {peer * 1e6:9.1f} us = {peer / seconds:5.2f}x"
    print(
        f"{name:44s} {seconds * 1e6:9.1f} us  {100 * floor / seconds:5.1f} % of floor{beside}",
        flush=True,
    )
    return row


def main() -> None:
    """Time everything; keep it family by family."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=ROWS, help="rows of x, with commas")
    parser.add_argument("--label", default="", help="what variant this is")
    parser.add_argument("--products", action="store_true", help="matrix products alone")
    given = parser.parse_args()
    peak = read_peak()
    if peak is None:
        raise SystemExit("run benchmarks/gpu/limits.py first: floors need the GPU's limits")
    bench = _native_ops.OpBench(DEVICE, "bf16", **BENCH)
    rows: list[dict[str, Any]] = []
    rows_list = [int(part) for part in given.rows.split(",")]
    name = f"kernels-{given.label}" if given.label else "kernels"
    products = linears(bench, peak, rows_list)
    families = [attentions(bench, peak), products, others(bench, peak)]
    for family in [products] if given.products else families:
        rows += family
        keep(name, {"rows": rows})


if __name__ == "__main__":
    main()
