"""Attention on the CUDA backend: against the reference in float64, and bit for bit against itself.

Two kernels with matrix products take bf16 and f16 with head_dim 64 or 128, one for sequences that
bring few tokens and one for those that bring many; a simple one takes everything else.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cuda_attention_helpers import (
    BEYOND_ROUNDING,
    FORMATS,
    SIMPLE_FORMATS,
    attend,
    beyond_rounding,
    expect,
    make_sequences,
    native,
    tokens_of,
)
from cuda_helpers import needs_cuda, rounded
from ops_helpers import (
    TOLERANCES,
    Case,
    Sequence,
    attention_cases,
    native_attention,
    reference_attention,
)
from reference_helpers import max_error, same_bits

from octavo.reference import ops

pytestmark = needs_cuda


@pytest.mark.parametrize("case", list(attention_cases()), ids=str)
def test_float32_equals_the_reference(case: Case) -> None:
    for value, right in zip(case.native(native("f32")), case.reference(ops), strict=True):
        assert max_error(value, right) <= TOLERANCES[case.op]


@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS)
def test_capped_scores(dtype: str, kv_dtype: str) -> None:
    """Where the kernels with matrix products would be at home, but for the cap."""
    sequences = make_sequences([(1, 70), (5, 33)], (4, 2), 64, dtype)
    actual = native_attention(native(dtype), sequences, 0.125, 0, kv_dtype, softcap=2.0)[0]
    right = reference_attention(ops, sequences, 0.125, 0, kv_dtype, 2.0)[0]
    tolerance = FORMATS[dtype, kv_dtype]
    assert max_error(actual, right) <= tolerance
    assert max_error(expect(kv_dtype, sequences), right) > 5 * tolerance


# (New tokens, context) of each sequence; heads and KV heads; window.
BATCHES: list[tuple[list[tuple[int, int]], tuple[int, int], int]] = [
    ([(1, 1)], (1, 1), 0),
    ([(1, n) for n in (15, 16, 17, 255, 256, 257, 1000)], (4, 1), 0),
    ([(2, 64), (2, 65), (2, 2)], (9, 3), 0),
    ([(4, 130), (4, 4), (4, 300)], (8, 1), 0),
    ([(7, 63), (1, 129), (3, 20)], (24, 8), 0),
    ([(1, 200), (1, 64), (1, 320)], (8, 8), 65),
    ([(7, 600), (1, 700)], (4, 1), 0),  # could be four tokens each, for all the host knows
    ([(33, 33)], (3, 3), 0),
    ([(100, 260), (1, 90), (8, 70), (9, 9)], (4, 1), 0),
    ([(70, 300), (40, 41)], (6, 2), 50),
    ([(1, 900), (2, 700), (1, 20)], (4, 1), 257),
    ([(1, 333), (5, 200)], (2, 1), 5),  # less than a block
    ([(90, 700), (1, 33)], (4, 2), 47),
    ([(31, 31), (1, 60)], (3, 1), 4000),  # more than there are tokens
]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_it_equals_the_reference(formats: tuple[str, str], head_dim: int) -> None:
    dtype, kv_dtype = formats
    for index, (lengths, heads, window) in enumerate(BATCHES):
        sequences = make_sequences(lengths, heads, head_dim, dtype)
        block_size = (16, 32, 48)[index % 3]
        actual = attend(dtype, kv_dtype, sequences, window, block_size)
        right = expect(kv_dtype, sequences, window)
        about = f"{lengths}, {heads}, window {window}"
        assert max_error(actual, right) <= FORMATS[formats], about
        if kv_dtype == "bf16":
            error = beyond_rounding(dtype, actual, right, sequences, window)
            assert error <= BEYOND_ROUNDING, about


@pytest.mark.parametrize("head_dim", [16, 64, 80])
@pytest.mark.parametrize("formats", SIMPLE_FORMATS, ids="-".join)
def test_the_simple_kernel_equals_the_reference(formats: tuple[str, str], head_dim: int) -> None:
    dtype, kv_dtype = formats
    for lengths, heads, window in BATCHES[1:7:2]:
        sequences = make_sequences(lengths, heads, head_dim, dtype)
        error = max_error(
            attend(dtype, kv_dtype, sequences, window), expect(kv_dtype, sequences, window)
        )
        assert error <= SIMPLE_FORMATS[formats], f"{lengths}, {heads}, window {window}"


# What the simple kernel takes over a bf16 cache: head_dim 64 in bf16 is the others'.
SIMPLE_OVER_BF16 = [
    (dtype, head_dim)
    for dtype in ("f32", "f16", "bf16")
    for head_dim in (16, 64, 80)
    if (dtype, head_dim) != ("bf16", 64)
]


@pytest.mark.parametrize(("dtype", "head_dim"), SIMPLE_OVER_BF16)
def test_the_simple_kernel_rounds_as_the_reference_does(dtype: str, head_dim: int) -> None:
    for lengths, heads, window in BATCHES[1:7:2]:
        sequences = make_sequences(lengths, heads, head_dim, dtype)
        actual = attend(dtype, "bf16", sequences, window)
        right = expect("bf16", sequences, window)
        error = beyond_rounding(dtype, actual, right, sequences, window)
        assert error <= BEYOND_ROUNDING, f"{lengths}, {heads}, window {window}"


def test_seventy_sequences() -> None:
    """So many that a block takes all splits of its rows; each as if it were alone."""
    contexts = [1, 15, 16, 17, 255, 256, 257, 1000, 64, 65]
    lengths = [(1, contexts[i * i % 10] if i % 7 else 3 + i) for i in range(70)]
    sequences = make_sequences(lengths, (3, 1), 64, "bf16")
    whole = attend("bf16", "bf16", sequences)
    assert max_error(whole, expect("bf16", sequences)) <= FORMATS["bf16", "bf16"]
    for index in (0, 17, 49, 69, *(i for i in range(70) if lengths[i][1] == 1000)):
        assert same_bits(whole[[index]], attend("bf16", "bf16", [sequences[index]]))


INVARIANT = [
    ("bf16", "bf16", (4, 1), 64, 0),
    ("bf16", "int8", (6, 2), 64, 0),
    ("f16", "f16", (3, 1), 128, 77),
    ("f16", "int8", (3, 1), 128, 0),
    ("f16", "int8", (2, 2), 64, 300),
    ("bf16", "bf16", (4, 1), 64, 47),
    ("bf16", "bf16", (1, 1), 80, 60),  # the simple kernel
    ("f32", "bf16", (2, 2), 16, 0),
]


@pytest.mark.parametrize(("dtype", "kv_dtype", "heads", "head_dim", "window"), INVARIANT)
def test_a_token_gets_the_same_bits_however_it_comes(
    dtype: str, kv_dtype: str, heads: tuple[int, int], head_dim: int, window: int
) -> None:
    """Whole prompts, chunks, single tokens, 4 and 8 at a time, alone and among others."""
    length = 330
    one, other = make_sequences([(length, length), (90, 90)], heads, head_dim, dtype)
    whole = attend(dtype, kv_dtype, [one], window)
    assert max_error(whole, expect(kv_dtype, [one], window)) < 5e-2

    for size in (7, 64, 101):
        cuts = [(start, min(start + size, length)) for start in range(0, length, size)]
        chunks = [attend(dtype, kv_dtype, [tokens_of(one, *cut)], window) for cut in cuts]
        assert same_bits(np.concatenate(chunks), whole), f"chunks of {size}"

    for block_size in (32, 48, 64, 80, 112, 128, 144, 512):
        assert same_bits(attend(dtype, kv_dtype, [one], window, block_size), whole), block_size

    ends = [0, 1, 14, 15, 16, 62, 63, 64, 65, 200, 254, 255, 256, 257, 319, 320, 329]
    alone = [attend(dtype, kv_dtype, [tokens_of(one, p, p + 1)], window) for p in ends]
    assert same_bits(np.concatenate(alone), whole[ends]), "decoded"
    together = attend(dtype, kv_dtype, [tokens_of(one, p, p + 1) for p in ends], window, 32)
    assert same_bits(together, whole[ends]), "decoded in a batch"
    for size in (4, 8):
        starts = [0, 60, 250, 253, length - size]
        verified = attend(
            dtype, kv_dtype, [tokens_of(one, p, p + size) for p in starts], window
        ).reshape(len(starts), size, *whole.shape[1:])
        for got, start in zip(verified, starts, strict=True):
            assert same_bits(got, whole[start : start + size]), f"{size} at a time"

    mixed = [tokens_of(one, 250, 300), other, tokens_of(one, 3, 4), tokens_of(one, 97, 104)]
    got = attend(dtype, kv_dtype, mixed, window)
    assert same_bits(got[:50], whole[250:300]) and same_bits(got[140:141], whole[3:4])
    assert same_bits(got[141:], whole[97:104])
    assert same_bits(got[50:140], attend(dtype, kv_dtype, [other], window))


# Of tiles of 64 keys: how many octaves their greatest scores are above or below those of the first.
LEVELS = [
    (0, -20, -38, -20, -60, 90, 50, 12),  # within a split: counts, drops below, comes back
    (0, -30, -60, -90, -120, -150, 200, 0),  # each counts beside the one before
    (-200, 0, -39, -41, 40, 38, 170, -10),
    (0, -300, 60, -300, 130, 200, 60, 200),  # weights of 0
]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_tiles_whose_scores_are_far_apart(formats: tuple[str, str], head_dim: int) -> None:
    """The same bits decoded and in chunks where a tile's weights vanish beside another's."""
    dtype, kv_dtype = formats
    length = 64 * 8 - 9
    for levels in LEVELS:
        [one] = make_sequences([(length, length)], (2, 1), head_dim, dtype)
        octave = float(np.log(2.0)) * head_dim**0.5 / 8
        one.q[..., 0] = 8
        one.k[..., 0] = rounded(np.repeat(levels, 64)[:length, None] * np.float32(octave), dtype)
        one.v[:64, :, 1] = 0
        whole = attend(dtype, kv_dtype, [one])
        right = expect(kv_dtype, [one])
        if kv_dtype == "bf16":
            # A score of 300 octaves may be off by 2^-24 of itself, a weight by 1.2e-5.
            assert beyond_rounding(dtype, whole, right, [one], 0) <= 3 * BEYOND_ROUNDING, levels
        else:
            assert max_error(whole, right) <= FORMATS[formats], levels
        cut = [attend(dtype, kv_dtype, [tokens_of(one, *c)]) for c in ((0, 150), (150, length))]
        assert same_bits(np.concatenate(cut), whole), levels
        ends = [63, 64, 127, 130, 192, 255, 256, 319, 330, 400, 470, length - 1]
        alone = attend(dtype, kv_dtype, [tokens_of(one, p, p + 1) for p in ends])
        assert same_bits(alone, whole[ends]), levels


def test_a_long_context() -> None:
    """Past 8192 keys splits are longer. One token decoded, and the last of a chunk, the same."""
    sequence, other = make_sequences([(40, 9100), (1, 5)], (2, 1), 64, "bf16")
    last = replace(sequence, q=sequence.q[-1:])
    # A chunk that comes alone would be the decode kernel's.
    chunk, decoded = (attend("bf16", "int8", s, 0, 64) for s in ([sequence, other], [last]))
    assert max_error(decoded, expect("int8", [last])) <= 5e-2  # an average over many: small
    assert same_bits(decoded, chunk[39:40])


@pytest.mark.parametrize("gone", [-1, 2**30])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_it_never_looks_before_the_window(head_dim: int, gone: int) -> None:
    """Not even at blocks that the table names there, which there are not."""
    for lengths in ([(1, 333), (6, 420)], [(70, 400)]):
        sequences = make_sequences(lengths, (4, 2), head_dim, "bf16")
        for kv_dtype in ("bf16", "int8"):
            known, other = (
                native_attention(
                    native("bf16"), sequences, 0.2, 37, kv_dtype, 16, float("nan"), gone
                )[0]
                for gone in (None, gone)
            )
            assert np.isfinite(known).all() and same_bits(known, other)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("formats", FORMATS, ids="-".join)
def test_what_no_token_owns_is_not_seen(formats: tuple[str, str], head_dim: int) -> None:
    """A block's unused slots hold another sequence's numbers, maybe infinite ones."""
    dtype, kv_dtype = formats
    for lengths in ([(3, 5), (2, 49), (1, 70)], [(40, 50)]):
        sequences = make_sequences(lengths, (4, 2), head_dim, dtype)
        results = [
            native_attention(native(dtype), sequences, 0.2, 0, kv_dtype, 32, empty)[0]
            for empty in (0.0, np.nan, np.inf, 1e4)
        ]
        assert np.isfinite(results[0]).all()
        for result in results[1:]:
            assert same_bits(result, results[0])


@pytest.mark.parametrize(
    ("dtype", "head_dim", "size"),
    # The kernels with matrix products subtract the maximum from a product that is not rounded, so
    # that 2^-24 of a score may be left over: they go up to scores of 1e9.
    [("bf16", 64, 1e3), ("bf16", 128, 1e3), ("f32", 16, 1e15), ("bf16", 80, 1e15)],
)
def test_large_and_equal_scores_over_a_bf16_cache(dtype: str, head_dim: int, size: float) -> None:
    """Large scores, equal ones, and large equal ones: no infinity, no NaN."""
    [s] = make_sequences([(30, 90)], (4, 2), head_dim, "bf16")
    average = expect("f32", [Sequence(s.q * np.float32(0), s.k, s.v)])
    for factor, keys, equal in (
        (size, s.k, False),
        (0.0, s.k, True),
        (size, np.ones_like(s.k), True),
    ):
        q, k = (rounded(x * np.float32(factor), dtype) for x in (s.q, keys))
        actual = attend(dtype, "bf16", [Sequence(q, k, s.v)])
        assert np.isfinite(actual).all()
        # Equal weights are all rounded alike, by 2^-8 at most, and the result once more.
        bound = 2.0**-7 * np.abs(average) + 1e-5 * np.sqrt(np.mean(np.square(average)))
        assert not equal or (np.abs(actual - average) <= bound).all()
