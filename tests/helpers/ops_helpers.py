"""Inputs for every compute op, and how to run them on the reference and on the native core.

A `Case` runs on anything that has the reference's functions, so the reference itself can be
replaced by a version with a planted error (test_ops_planted.py) to see that it is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from reference_helpers import Float32, cache_from_sequence, uniform

from octavo import _native, _native_ops
from octavo.models.rope import default_rope, linear_rope, llama3_rope, yarn_rope
from octavo.models.spec import RopeSpec

Arrays = list[npt.NDArray[Any]]

# The largest error allowed, relative to the root mean square of the expected values, which the
# reference computes in float64. A few float32 roundings (6e-8 each) of a value a few times larger
# than the mean; 0 asks for equality.
TOLERANCES = {
    "embed": 0.0,
    "norm": 2e-6,
    "add_norm": 2e-6,
    "norm_heads": 2e-6,
    "scale": 2e-6,
    "linear": 3e-6,
    "rope_and_store": 1e-6,
    "attention": 1e-5,  # of scores up to 30, whose rounding the exponential passes on
    "gated_activation": 2e-6,
    "moe": 5e-6,  # two products, one after the other
    "take_rows": 0.0,
    "adjust_logits": 0.0,
    "sample": 0.0,
    "log_softmax": 3e-7,
    "gumbel": 0.0,
}


def grouped_activations(isa: str) -> str:
    """How an instruction set has to round what meets weights in groups, as the reference names it.

    Written down here so that the tests do not take the native core's word for it.
    """
    return "bf16" if isa.startswith("amx") else "whole"


def one_isa_of_each() -> list[str]:
    """The fastest instruction set here of those that round alike what meets weights in groups."""
    return sorted({grouped_activations(isa): isa for isa in _native.available_isas()}.values())


@dataclass(frozen=True)
class Case:
    """One input of one op. `native` and `reference` return the op's results, one or several."""

    op: str
    label: str
    native: Callable[[_native_ops.Ops], Arrays]
    reference: Callable[[Any], Arrays]  # takes octavo.reference.ops, or what replaces it

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"


def double(x: npt.NDArray[Any] | None) -> Any:
    """As float64, so that the reference computes in that."""
    return None if x is None else x.astype(np.float64)


def embed_cases() -> Iterator[Case]:
    for vocab, width, rows in [(1, 1, 1), (17, 7, 5), (50, 64, 33), (101, 576, 3)]:
        table = uniform(vocab, vocab, width)
        position_table = uniform(vocab + 1, 40, width)
        ids = np.array([(3 * i + vocab - 1) % vocab for i in range(rows)], dtype=np.int32)
        positions = np.array([(7 * i + 39) % 40 for i in range(rows)], dtype=np.int32)
        for dtype in ("f32", "bf16"):
            for learned in (False, True):
                more = (position_table, positions) if learned else (None, None)
                arguments = (table, ids, *more, dtype)
                yield Case(
                    "embed",
                    f"{vocab}x{width}-{rows}-{dtype}{'-positions' * learned}",
                    lambda native, arguments=arguments: [native.embed(*arguments)],
                    lambda ops, arguments=arguments: [ops.embed(*arguments)],
                )


def norm_cases() -> Iterator[Case]:
    shapes = [(1, 2), (3, 7), (2, 64), (5, 101), (17, 576), (1, 2049), (40, 48)]
    for seed, (rows, width) in enumerate(shapes):
        # Small numbers, so that eps is no smaller than their squares and its place matters.
        x = uniform(seed, rows, width) * np.float32(0.02) + np.float32(0.003)
        residual = uniform(seed + 50, rows, width) * np.float32(0.02)
        weight = 1 + uniform(seed + 100, width) * np.float32(0.5)
        for kind, bias in (("rms", None), ("rms", 0), ("layer", None), ("layer", 1)):
            shift = None if bias is None else uniform(seed + 200 + bias, width)
            arguments = (weight, shift, 1e-5, kind)
            label = f"{rows}x{width}-{kind}{'-bias' * (bias is not None)}"
            yield Case(
                "norm",
                label,
                lambda native, x=x, arguments=arguments: [native.norm(x, *arguments)],
                lambda ops, x=x, arguments=arguments: [ops.norm(double(x), *arguments)],
            )
            yield Case(
                "add_norm",
                label,
                lambda native, r=residual, x=x, a=arguments: list(native.add_norm(r, x, *a)),
                lambda ops, r=residual, x=x, a=arguments: list(
                    ops.add_norm(double(r), double(x), *a)
                ),
            )


def norm_heads_cases() -> Iterator[Case]:
    shapes = [(1, 1, 2), (3, 5, 7), (5, 3, 64), (33, 9, 80), (7, 1, 129), (2, 2, 1024)]
    for seed, (rows, heads, width) in enumerate(shapes):
        sizes = np.float32([0.01 * (1 + 7 * head) for head in range(heads)])
        x = uniform(seed, rows, heads, width) * sizes[:, None] + np.float32(0.003)
        weight = 1 + uniform(seed + 100, width) * np.float32(0.5)
        arguments = (x.reshape(rows, -1), weight, None, 1e-5)
        yield Case(
            "norm_heads",
            f"{rows}x{heads}x{width}",
            lambda native, a=arguments: [native.norm_heads(*a)],
            lambda ops, a=arguments: [ops.norm_heads(double(a[0]), *a[1:])],
        )


def scale_cases() -> Iterator[Case]:
    for seed, (rows, width) in enumerate([(1, 1), (3, 7), (40, 101), (5, 1536)]):
        x = uniform(seed, rows, width) * np.float32([0.03, 1, 40, 3e5][seed])
        # Far below the cap, around it, where tanh passes from one formula to another, far above.
        for factor, cap in [(1.0, 0.0), (0.37, 0.0), (1.0, 30.0), (3.3, 2.0), (0.8, 1e4)]:
            yield Case(
                "scale",
                f"{rows}x{width}-{factor}-{cap}",
                lambda native, x=x, a=(factor, cap): [native.scale(x, *a)],
                lambda ops, x=x, a=(factor, cap): [ops.scale(double(x), *a)],
            )


def linear_cases() -> Iterator[Case]:
    # Rows on both sides of every limit between ways to cut the work; odd and even widths.
    shapes = [
        *[(1, 1, 1), (1, 7, 3), (2, 33, 17), (3, 64, 101), (8, 576, 49), (9, 31, 129)],
        *[(1, 576, 1536), (13, 96, 16), (40, 211, 35), (97, 65, 15), (200, 128, 64)],
    ]
    for seed, (rows, inputs, outputs) in enumerate(shapes):
        x = uniform(seed, rows, inputs)
        weight = uniform(seed + 100, outputs, inputs)
        for dtype in ("f32", "bf16"):
            for bias in (None, uniform(seed + 200, outputs)):
                arguments = (weight, bias, dtype)
                yield Case(
                    "linear",
                    f"{rows}x{inputs}x{outputs}-{dtype}{'-bias' * (bias is not None)}",
                    lambda native, x=x, arguments=arguments: [native.linear(x, *arguments)],
                    lambda ops, x=x, arguments=arguments: [ops.linear(double(x), *arguments)],
                )


# By name, of so many elements of a head.
ROPES: dict[str, Callable[[int], RopeSpec]] = {
    "default": lambda dim: default_rope(10000.0, dim),
    "smollm": lambda dim: default_rope(100000.0, dim),
    "linear": lambda dim: linear_rope(10000.0, dim, 2.5),
    "llama3": lambda dim: llama3_rope(500000.0, dim, 32.0, 1.0, 4.0, 8192),
    "yarn": lambda dim: yarn_rope(10000.0, dim, 4.0, 256),
    "partial": lambda dim: default_rope(10000.0, (dim + 2) // 4 * 2),
}


def rope_frequencies(name: str, dim: int) -> np.ndarray:
    """float32 (dim / 2,), of an entry of ROPES."""
    return np.array(ROPES[name](dim).frequencies, np.float32)


def rope_and_store_cases() -> Iterator[Case]:
    shapes = [(1, 1, 1, 2), (5, 4, 4, 32), (7, 9, 3, 64), (3, 5, 1, 80), (33, 6, 2, 128)]
    for seed, (rows, heads, kv_heads, head_dim) in enumerate(shapes):
        q = uniform(seed, rows, heads, head_dim)
        k = uniform(seed + 100, rows, kv_heads, head_dim)
        v = uniform(seed + 200, rows, kv_heads, head_dim)
        positions = np.array([(i * 977 + 5) % 4096 for i in range(rows)], dtype=np.int32)
        slots = np.random.default_rng(seed).permutation(64)[:rows].astype(np.int32)
        slots[rows // 2] = -1 if rows > 1 else slots[0]
        for name in (None, *ROPES):
            frequencies = name and rope_frequencies(name, head_dim)
            factor = ROPES[name](head_dim).attention_factor if name else 1.0
            for kv_dtype in ("f32", "bf16", "int8"):
                arguments = (q, k, v, positions, slots, frequencies, 64)
                yield Case(
                    "rope_and_store",
                    f"{rows}-{heads}_{kv_heads}x{head_dim}-{name}-{kv_dtype}",
                    lambda native, a=arguments, d=kv_dtype, f=factor: list(
                        native.rope_and_store(*a, block_size=16, kv_dtype=d, attention_factor=f)
                    ),
                    # In float32: one rounding the other way before bf16 would be a bf16 step.
                    lambda ops, a=arguments, d=kv_dtype, f=factor: list(
                        ops.rope_and_store(*a, d, f)
                    ),
                )


@dataclass(frozen=True)
class Sequence:
    """One sequence of an attention batch: queries of its last tokens, keys and values of all."""

    q: Float32  # (rows, num_heads, head_dim)
    k: Float32  # (context, num_kv_heads, head_dim)
    v: Float32


def make_sequence(
    seed: int, rows: int, context: int, heads: tuple[int, int], head_dim: int
) -> Sequence:
    """Scores spread over several units, so that attention picks and chooses."""
    num_heads, num_kv_heads = heads
    q = uniform(seed, rows, num_heads, head_dim) * np.float32(3)
    k = uniform(seed + 1000, context, num_kv_heads, head_dim) * np.float32(3)
    return Sequence(q, k, uniform(seed + 2000, context, num_kv_heads, head_dim))


def native_attention(
    native: _native_ops.Ops,
    sequences: list[Sequence],
    scale: float,
    window: int,
    kv_dtype: str,
    block_size: int = 16,
    empty: float = float("nan"),
    gone: int | None = None,
    softcap: float = 0.0,
) -> Arrays:
    """All sequences in one ragged batch, their blocks shuffled; what no token owns is `empty`.

    With a window nothing owns the blocks before it either. gone: what the tables name in their
    place; None: in turn a block that was emptied and one that was always empty.
    """
    lengths = [len(sequence.k) for sequence in sequences]
    counts = [-(-length // block_size) for length in lengths]
    order = np.random.default_rng(len(lengths)).permutation(sum(counts) + 2).astype(np.int32)
    tables = np.full((len(sequences), max(counts)), -1, dtype=np.int32)
    caches = []
    num_slots = (sum(counts) + 2) * block_size
    for part in ("k", "v"):
        first, cache = 0, None
        for index, sequence in enumerate(sequences):
            tables[index, : counts[index]] = order[first : first + counts[index]]
            first += counts[index]
            laid = cache_from_sequence(
                getattr(sequence, part), tables[index], num_slots, block_size
            )
            cache = laid if cache is None else np.where(np.isnan(laid), cache, laid)
        assert cache is not None
        for sequence, table in zip(sequences, tables, strict=True):
            for block in table[: num_gone(sequence, window, block_size)]:
                cache[block * block_size : (block + 1) * block_size] = np.nan
        caches.append(np.where(np.isnan(cache), np.float32(empty), cache))
    for sequence, table in zip(sequences, tables, strict=True):
        passed = table[: num_gone(sequence, window, block_size)]
        if gone is None:
            passed[::2] = order[-1]
        else:
            passed[:] = gone
    out = native.attention(
        np.concatenate([sequence.q for sequence in sequences]),
        *caches,
        np.cumsum([0, *(len(sequence.q) for sequence in sequences)], dtype=np.int32),
        np.array(lengths, dtype=np.int32),
        tables,
        scale,
        window,
        block_size,
        kv_dtype,
        softcap,
    )
    return [np.asarray(out)]


def num_gone(sequence: Sequence, window: int, block_size: int) -> int:
    """How many blocks lie wholly before the window of the first of the sequence's queries."""
    first_seen = len(sequence.k) - len(sequence.q) - window + 1
    return max(first_seen, 0) // block_size if window else 0


def reference_attention(
    ops: Any,
    sequences: list[Sequence],
    scale: float,
    window: int,
    kv_dtype: str,
    softcap: float = 0.0,
) -> Arrays:
    """Each sequence by itself, in float64."""
    from octavo.reference import ops as definition

    outs = []
    for sequence in sequences:
        k, v = (double(definition.to_cache(x, kv_dtype)) for x in (sequence.k, sequence.v))
        rounds = definition.attention_dtype(kv_dtype)
        outs.append(ops.attention(double(sequence.q), k, v, scale, window, rounds, softcap))
    return [np.concatenate(outs)]


def attention_cases() -> Iterator[Case]:
    # (rows, context) of each sequence; heads and KV heads; head_dim; window.
    batches: list[tuple[list[tuple[int, int]], tuple[int, int], int, int]] = [
        ([(1, 1)], (1, 1), 2, 0),
        ([(1, 37)], (9, 3), 64, 0),
        ([(23, 23)], (4, 4), 32, 0),
        ([(5, 19), (1, 1), (1, 64), (17, 33)], (5, 1), 80, 0),
        ([(3, 700), (1, 513), (40, 600)], (6, 2), 32, 0),
        ([(1, 1025), (2, 15)], (8, 1), 128, 0),
        ([(30, 30), (1, 90), (4, 41)], (4, 2), 64, 16),
        ([(7, 300), (1, 600)], (2, 1), 32, 257),
        ([(9, 12)], (3, 3), 6, 1),
        ([(1, 1400), (3, 1030), (12, 12)], (4, 1), 32, 513),
        ([(40, 700), (1, 33)], (2, 2), 16, 5),  # less than a block
        ([(20, 90), (1, 99)], (3, 1), 32, 47),
        ([(31, 31), (1, 60)], (2, 1), 48, 4000),  # more than there are tokens
    ]
    for index, (lengths, heads, head_dim, window) in enumerate(batches):
        sequences = [
            make_sequence(100 * index + i, rows, context, heads, head_dim)
            for i, (rows, context) in enumerate(lengths)
        ]
        for kv_dtype in ("f32", "bf16", "int8"):
            # Over a bf16 cache capped scores are so much alike that a weight which rounds the other
            # way shows: test_capped_scores_over_a_bf16_cache allows for those.
            for cap in (0.0, 3.0) if index % 3 and kv_dtype != "bf16" else (0.0,):
                arguments = (sequences, head_dim**-0.5, window, kv_dtype)
                yield Case(
                    "attention",
                    f"{index}-{heads[0]}_{heads[1]}x{head_dim}-window{window}"
                    f"{'-capped' * bool(cap)}-{kv_dtype}",
                    lambda native, a=arguments, cap=cap: native_attention(native, *a, softcap=cap),
                    lambda ops, a=arguments, cap=cap: reference_attention(ops, *a, cap),
                )


def gated_activation_cases() -> Iterator[Case]:
    for seed, (rows, width) in enumerate([(1, 1), (3, 7), (2, 64), (5, 101), (33, 1536)]):
        # Far enough out that exp overflows somewhere in a careless sigmoid.
        gate = uniform(seed, rows, width) * np.float32([0.5, 4, 100][seed % 3])
        up = uniform(seed + 100, rows, width) * np.float32(5)
        for activation in ("silu", "gelu", "gelu_tanh", "relu"):
            for first in (gate, None):
                arguments = (first, up, activation)
                yield Case(
                    "gated_activation",
                    f"{rows}x{width}-{activation}{'-gated' * (first is not None)}",
                    lambda native, a=arguments: [native.gated_activation(*a)],
                    lambda ops, a=arguments: [
                        ops.gated_activation(double(a[0]), double(a[1]), a[2])
                    ],
                )


# (rows, inputs, width, outputs, experts, experts of a row)
MOE_SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (3, 7, 5, 9, 4, 2),
    (33, 64, 32, 40, 8, 2),
    (5, 37, 101, 19, 3, 3),
    (70, 48, 64, 31, 5, 1),
    (600, 20, 33, 17, 6, 3),
    (2, 576, 96, 33, 8, 4),
]
ROUTINGS = ("spread", "ties", "crowded")


def moe_inputs(
    shape: tuple[int, int, int, int, int, int], routing: str
) -> tuple[Float32, Float32, Float32, Float32, Float32, int]:
    """x, router_logits, gate, up, down, experts of a row.

    routing: "spread"; "ties": among logits of two values; "crowded": all rows choose the same
    experts, so that the others have none.
    """
    rows, inputs, width, outputs, experts, chosen = shape
    seed = rows * inputs + experts
    logits = uniform(seed, rows, experts) * np.float32(3)
    if routing == "ties":
        logits = np.where(logits > 1, np.float32(0.75), np.float32(-0.25))
    if routing == "crowded":
        logits = np.sort(logits, axis=1)
    x = uniform(seed + 1, rows, inputs)
    gate, up = (uniform(seed + 2 + i, experts, width, inputs) for i in range(2))
    return x, logits, gate, up, uniform(seed + 4, experts, outputs, width), chosen


def moe_cases() -> Iterator[Case]:
    for index, shape in enumerate(MOE_SHAPES):
        for routing in ROUTINGS:
            activation = ("silu", "gelu", "gelu_tanh", "relu")[index % 4]
            arguments = (*moe_inputs(shape, routing), routing != "crowded", activation)
            yield Case(
                "moe",
                f"{'_'.join(map(str, shape))}-{routing}-{activation}",
                lambda native, a=arguments: [native.moe(*a)],
                lambda ops, a=arguments: [ops.moe(*map(double, a[:5]), *a[5:])],
            )


def take_rows_cases() -> Iterator[Case]:
    for rows, width in [(1, 1), (7, 5), (40, 576)]:
        x = uniform(rows, rows, width)
        chosen = np.array([(5 * i + rows - 1) % rows for i in range(rows + 2)], dtype=np.int32)
        yield Case(
            "take_rows",
            f"{rows}x{width}",
            lambda native, x=x, chosen=chosen: [native.take_rows(x, chosen)],
            lambda ops, x=x, chosen=chosen: [ops.take_rows(x, chosen)],
        )


def compute_cases() -> list[Case]:
    """All of them (the sampler's are in test_ops_sampling.py)."""
    return [
        *embed_cases(),
        *norm_cases(),
        *norm_heads_cases(),
        *scale_cases(),
        *linear_cases(),
        *rope_and_store_cases(),
        *attention_cases(),
        *gated_activation_cases(),
        *moe_cases(),
        *take_rows_cases(),
    ]
