"""Every native op against the reference: on every instruction set, with one thread and with two."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ops_helpers import (
    MOE_SHAPES,
    ROUTINGS,
    TOLERANCES,
    Case,
    compute_cases,
    make_sequence,
    moe_inputs,
    native_attention,
    reference_attention,
    rope_frequencies,
)
from reference_helpers import bf16_order, max_error, same_bits, uniform

from octavo import _native, _native_ops
from octavo.diff.ties import rounding_room
from octavo.reference import ops, quantization, sampling

CASES = compute_cases()
ISAS = _native.available_isas()


@pytest.fixture(scope="module")
def everywhere() -> dict[str, _native_ops.Ops]:
    """The ops on each instruction set and thread count."""
    return {
        f"{isa} x {threads}": _native_ops.Ops("cpu", threads, isa)
        for isa in ISAS
        for threads in (1, 2)
    }


def test_every_op_has_a_definition() -> None:
    native = {name for name in dir(_native_ops.Ops) if not name.startswith("_")}
    native.remove("last_kernels")
    assert native == {*ops.OPS, *quantization.OPS, *sampling.OPS}
    assert native == {*TOLERANCES, *quantization.OPS}
    for module in (ops, quantization, sampling):
        for name in module.OPS:
            assert callable(getattr(module, name))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_op_equals_the_reference(case: Case, everywhere: dict[str, _native_ops.Ops]) -> None:
    expected = case.reference(ops)
    firsts: dict[str, list[np.ndarray]] = {}
    for where, native in everywhere.items():
        actual = case.native(native)
        assert len(actual) == len(expected)
        for value, right in zip(actual, expected, strict=True):
            assert value.dtype == np.float32
            assert max_error(value, right) <= TOLERANCES[case.op], where
        is_bf16 = case.op == "linear" or case.label.endswith("-bf16")
        order = bf16_order(where.split()[0]) if is_bf16 else ""
        first = firsts.setdefault(order, actual)
        for value, one in zip(actual, first, strict=True):
            assert same_bits(value, one), f"{where} and the first differ in their last bits"


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 100), (37, 19)])
def test_linear_row_alone_or_among_others(inputs: int, outputs: int, dtype: str) -> None:
    native = _native_ops.Ops("cpu", 2)
    x, weight, bias = uniform(1, 250, inputs), uniform(2, outputs, inputs), uniform(3, outputs)
    whole = native.linear(x, weight, bias, dtype)
    for size in (1, 2, 3, 5, 8, 9, 16, 97):
        pieces = [native.linear(x[i : i + size], weight, bias, dtype) for i in range(0, 250, size)]
        assert same_bits(np.concatenate(pieces), whole), f"pieces of {size} rows"


@pytest.mark.parametrize(
    "op", ["norm", "add_norm", "norm_heads", "scale", "gated_activation", "log_softmax"]
)
def test_row_alone_or_among_others(op: str) -> None:
    native = _native_ops.Ops("cpu", 2)
    x, other, weight = uniform(1, 40, 101), uniform(2, 40, 101), uniform(3, 101)

    def run(rows: slice) -> np.ndarray:
        if op == "norm":
            return native.norm(x[rows], weight, None, 1e-5)
        if op == "add_norm":
            return native.add_norm(x[rows], other[rows], weight, None, 1e-5)[1]
        if op == "norm_heads":
            return native.norm_heads(x[rows, :99], weight[:33], None, 1e-5)
        if op == "scale":
            return native.scale(x[rows], 1.7, 0.9)
        if op == "gated_activation":
            return native.gated_activation(x[rows], other[rows], "silu")
        return native.log_softmax(x[rows])

    alone = np.concatenate([run(slice(i, i + 1)) for i in range(40)])
    assert same_bits(alone, run(slice(0, 40)))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_moe_is_made_of_the_other_ops(routing: str, dtype: str) -> None:
    """Of their bits, on every instruction set: a row's experts see it as `linear` does."""
    for isa in ISAS:
        native = _native_ops.Ops("cpu", 2, isa)
        for shape in MOE_SHAPES:
            x, logits, gate, up, down, count = moe_inputs(shape, routing)

            def expert(
                index: int, some: np.ndarray, native: Any = native, all: Any = (gate, up, down)
            ) -> np.ndarray:
                opened, raised = (native.linear(some, half[index], None, dtype) for half in all[:2])
                activated = native.gated_activation(opened, raised, "silu")
                return native.linear(activated, all[2][index], None, dtype)

            expected = ops.mix_experts(x, logits, count, True, down.shape[1], expert)
            found = native.moe(x, logits, gate, up, down, count, True, "silu", dtype)
            if count == 1:  # of weight 1
                assert same_bits(found, expected), (isa, shape)
            assert max_error(found, expected) <= 1e-6, (isa, shape)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("threads", [1, 3])
def test_moe_row_alone_or_among_others(threads: int, dtype: str) -> None:
    for isa in ISAS:
        native = _native_ops.Ops("cpu", threads, isa)
        for shape in MOE_SHAPES[1:5]:
            rows = shape[0]
            x, logits, *experts, count = moe_inputs(shape, "spread")
            whole = native.moe(x, logits, *experts, count, False, "gelu", dtype)
            for size in (1, 2, 17):
                for first in range(0, rows, max(size, 11)):
                    some = slice(first, first + size)
                    part = native.moe(x[some], logits[some], *experts, count, False, "gelu", dtype)
                    assert same_bits(part, whole[some]), (isa, shape, size, first)


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("window", [0, 5, 47, 100, 513, 4000])
@pytest.mark.parametrize(("threads", "softcap"), [(1, 0.0), (2, 2.5)])
def test_attention_alone_in_a_batch_or_in_chunks(
    kv_dtype: str, window: int, threads: int, softcap: float
) -> None:
    native = _native_ops.Ops("cpu", threads)

    def attend(*sequences: Any) -> np.ndarray:
        found = native_attention(
            native, list(sequences), 32**-0.5, window, kv_dtype, softcap=softcap
        )
        return found[0]

    sequences = [
        make_sequence(i, rows, context, (6, 2), 32)
        for i, (rows, context) in enumerate([(60, 700), (1, 1100), (9, 9), (1, 3), (133, 1290)])
    ]
    whole = attend(*sequences)
    alone = [attend(one) for one in sequences]
    assert same_bits(np.concatenate(alone), whole), "alone"

    for size in (1, 7, 64):
        chunks = []
        for one in sequences:
            for start in range(0, len(one.q), size):
                stop = min(start + size, len(one.q))
                seen = len(one.k) - len(one.q) + stop
                chunk = type(one)(one.q[start:stop], one.k[:seen], one.v[:seen])
                chunks.append(attend(chunk))
        assert same_bits(np.concatenate(chunks), whole), f"chunks of {size}"


@pytest.mark.parametrize("window", [0, 29])
def test_capped_scores_over_a_bf16_cache(window: int) -> None:
    """Where a weight lies in the middle of two bf16 numbers, either is right."""
    lengths = [(5, 19), (17, 33), (3, 700), (40, 600), (1, 1025)]
    sequences = [make_sequence(i, *length, (6, 2), 32) for i, length in enumerate(lengths)]
    right = reference_attention(ops, sequences, 0.18, window, "bf16", 3.0)[0]
    kept = [[ops.round_to_bf16(x) for x in (one.q, one.k, one.v)] for one in sequences]
    room = np.concatenate([rounding_room(*one, 0.18, window, 3.0) for one in kept])
    size = np.sqrt(np.mean(right**2))
    assert 0 < room.max() < 0.02 * size
    for isa in ISAS:
        native = _native_ops.Ops("cpu", 2, isa)
        found = native_attention(native, sequences, 0.18, window, "bf16", softcap=3.0)[0]
        assert (np.abs(found - right) - room).max() <= TOLERANCES["attention"] * size, isa
    plain = reference_attention(ops, sequences, 0.18, window, "bf16")[0]
    assert (np.abs(plain - right) - room).max() > 0.1 * size


@pytest.mark.parametrize("gone", [-1, 2**31 - 1])
def test_attention_never_looks_before_the_window(gone: int) -> None:
    """Not even at the block table, whose entries there are no blocks."""
    sequences = [make_sequence(i, 70, 400 + i, (4, 2), 32) for i in range(2)]
    for isa in ISAS:
        native = _native_ops.Ops("cpu", 2, isa)
        for kv_dtype in ("f32", "bf16", "int8"):
            known = native_attention(native, sequences, 0.2, 31, kv_dtype)[0]
            other = native_attention(native, sequences, 0.2, 31, kv_dtype, gone=gone)[0]
            assert np.isfinite(known).all() and same_bits(known, other), (isa, kv_dtype)


def test_a_window_gives_no_negative_zero() -> None:
    """A sum of -0 is 0, as in a batch with rows that see more tokens."""
    one = make_sequence(5, 3, 600, (1, 1), 16)
    zeros = type(one)(one.q, one.k, np.full_like(one.v, -0.0))
    for isa in ISAS:
        out = native_attention(_native_ops.Ops("cpu", 1, isa), [zeros], 0.1, 88, "f32")[0]
        assert not out.any() and not np.signbit(out).any(), isa


@pytest.mark.parametrize("block_size", [32, 48, 64])
@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "int8"])
def test_attention_does_not_depend_on_the_blocks(kv_dtype: str, block_size: int) -> None:
    sequences = [make_sequence(i, 5, 130 + i, (4, 2), 32) for i in range(3)]
    for isa in ISAS:
        native = _native_ops.Ops("cpu", 2, isa)
        one = native_attention(native, sequences, 0.2, 0, kv_dtype)
        other = native_attention(native, sequences, 0.2, 0, kv_dtype, block_size)
        assert same_bits(one[0], other[0]), isa


@pytest.mark.parametrize("window", [0, 33])
@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "int8"])
def test_attention_ignores_what_no_token_owns(kv_dtype: str, window: int) -> None:
    """A block's unused slots hold another sequence's numbers, maybe infinite ones."""
    contexts = (5, 49, 550)
    sequences = [make_sequence(i, 3, context, (4, 2), 32) for i, context in enumerate(contexts)]
    for isa in ISAS:
        native = _native_ops.Ops("cpu", 2, isa)
        zeros = native_attention(native, sequences, 0.2, window, kv_dtype, empty=0.0)[0]
        assert np.isfinite(zeros).all()
        for empty in (np.nan, np.inf, 1e30):
            other = native_attention(native, sequences, 0.2, window, kv_dtype, empty=empty)[0]
            assert same_bits(other, zeros), isa


@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "int8"])
def test_attention_over_scores_of_any_size(kv_dtype: str) -> None:
    """Scores up to 1e33 leave one token with all the weight; equal ones share it."""
    one = make_sequence(3, 6, 70, (2, 1), 32)
    huge = type(one)(one.q * np.float32(1e32), one.k, one.v)
    equal = type(one)(np.zeros_like(one.q), one.k, one.v)
    for isa in ISAS:
        native = _native_ops.Ops("cpu", 1, isa)
        out = native_attention(native, [huge], 1.0, 0, kv_dtype)[0]
        seen = ops.to_cache(one.v, kv_dtype)[:, 0]
        for row, head in np.ndindex(6, 2):
            assert np.abs(seen - out[row, head]).max(-1).min() == 0, isa
        mean = native_attention(native, [equal], 1.0, 0, kv_dtype)[0]
        assert max_error(mean[-1, 0], seen.mean(0)) < 1e-5, isa


def test_bf16_cache_is_the_f32_cache_rounded() -> None:
    native = _native_ops.Ops("cpu", 1)
    q, k, v = uniform(1, 9, 4, 64), uniform(2, 9, 2, 64), uniform(3, 9, 2, 64)
    positions, slots = np.arange(9, dtype=np.int32) * 31, np.arange(9, dtype=np.int32)
    frequencies = rope_frequencies("smollm", 64)
    arguments = (q, k, v, positions, slots, frequencies, 16, 16)
    _, keys, values = native.rope_and_store(*arguments, "f32")
    _, rounded_keys, rounded_values = native.rope_and_store(*arguments, "bf16")
    assert same_bits(rounded_keys, ops.round_to_bf16(keys))
    assert same_bits(rounded_values, ops.round_to_bf16(values))


@pytest.mark.parametrize("isa", ISAS)
def test_a_nan_in_an_int8_cache_stays_one(isa: str) -> None:
    """Tokens that see it must not get numbers, which would look right."""
    q, k, v = uniform(1, 3, 4, 10), uniform(2, 3, 2, 10), uniform(3, 3, 2, 10)
    k[0, 1, 3], k[2, 0, 9], v[1, 0] = np.nan, -np.float32(np.nan), np.nan
    places = np.arange(3, dtype=np.int32)
    arguments = (q, k, v, places, places, None, 16, 16, "int8")
    native = _native_ops.Ops("cpu", 1, isa).rope_and_store(*arguments)
    reference = ops.rope_and_store(*arguments[:7], "int8")
    for cache, right, bad in zip(native[1:], reference[1:], ([0, 2], [1]), strict=True):
        np.testing.assert_array_equal(cache, right)
        assert np.flatnonzero(np.isnan(cache).any((1, 2))).tolist() == bad


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_linear_rounds_ties_to_even_and_keeps_specials(dtype: str) -> None:
    # Exactly between two bfloat16, both ways; largest finite; NaN and infinities go through.
    x = np.array([[1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3e38, 2**-126, 1.0]], dtype=np.float32).T
    weight = np.array([[1.0]], dtype=np.float32)
    for native in (_native_ops.Ops("cpu", 1, isa) for isa in ISAS):
        np.testing.assert_array_equal(
            native.linear(x, weight, None, dtype), ops.linear(x, weight, None, dtype)
        )
        bad = np.array([[np.nan], [np.inf], [-np.inf]], dtype=np.float32)
        result = native.linear(bad, weight, None, dtype)
        np.testing.assert_array_equal(result, bad)
