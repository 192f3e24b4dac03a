"""Ops refuse indices outside their tables and arrays of other sizes, and read nothing there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from reference_helpers import uniform

from octavo import _native_ops
from octavo.models.spec import WeightFormat
from octavo.reference.sampling import sampling_rows


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


@pytest.fixture(scope="module")
def native() -> _native_ops.Ops:
    return _native_ops.Ops("cpu", 1)


def embed(native: _native_ops.Ops, **changed: Any) -> np.ndarray:
    arguments: dict[str, Any] = {
        "table": uniform(1, 11, 6),
        "token_ids": ints(10, 0, 3),
        "position_table": uniform(2, 5, 6),
        "positions": ints(4, 0, 1),
    }
    return native.embed(**{**arguments, **changed})


def rope_and_store(native: _native_ops.Ops, **changed: Any) -> tuple[np.ndarray, ...]:
    arguments: dict[str, Any] = {
        "q": uniform(1, 3, 4, 8),
        "k": uniform(2, 3, 2, 8),
        "v": uniform(3, 3, 2, 8),
        "positions": ints(7, 0, 2),
        "slots": ints(19, -1, 0),
        "frequencies": uniform(4, 4),
        "num_slots": 20,
    }
    return native.rope_and_store(**{**arguments, **changed})


def attention(native: _native_ops.Ops, **changed: Any) -> np.ndarray:
    arguments: dict[str, Any] = {
        "q": uniform(1, 4, 4, 8),
        "k": uniform(2, 40, 2, 8),
        "v": uniform(3, 40, 2, 8),
        "row_starts": ints(0, 1, 4),
        "context_lens": ints(17, 30),
        "block_tables": np.array([[2, 0], [1, 2]], dtype=np.int32),
        "scale": 0.3,
    }
    return native.attention(**{**arguments, **changed})


def quantized_linear(native: _native_ops.Ops, **changed: Any) -> np.ndarray:
    arguments: dict[str, Any] = {
        "x": uniform(1, 3, 40),
        "codes": np.zeros((5, 20), dtype=np.uint8),
        "scales": uniform(2, 5, 2),
        "format": WeightFormat("int4", group_size=32, has_zeros=True),
        "zeros": np.zeros((5, 2), dtype=np.float32),
        "bias": uniform(3, 5),
    }
    return native.quantized_linear(**{**arguments, **changed})


def sample(native: _native_ops.Ops, **changed: Any) -> np.ndarray:
    arguments: dict[str, Any] = {
        "logits": uniform(1, 2, 70),
        "rows": sampling_rows(2, temperature=1, top_k=[0, 5], seed=[0, 1], position=[3, 4]),
        "masks": np.full((2, 3), -1, dtype=np.int32),
    }
    return native.sample(**{**arguments, **changed})[0]


OPS = [embed, rope_and_store, attention, quantized_linear, sample]

WRONG: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (embed, {"token_ids": ints(3, 11, 0)}, r"token_ids\[1\] is 11; expected 0 to 10"),
    (embed, {"token_ids": ints(-1, 1, 0)}, r"token_ids\[0\] is -1; expected 0 to 10"),
    (embed, {"positions": ints(0, 1, 5)}, r"positions\[2\] is 5; expected 0 to 4"),
    (embed, {"positions": ints(0, 1)}, "positions has 2 entries; expected 3"),
    (embed, {"positions": None}, "position_table needs positions"),
    (embed, {"position_table": uniform(2, 5, 7)}, "position_table has 7 columns; table has 6"),
    (rope_and_store, {"slots": ints(1, 20, 0)}, r"slots\[1\] is 20; expected -1 to 19"),
    (rope_and_store, {"slots": ints(1, 2, -2)}, r"slots\[2\] is -2; expected -1 to 19"),
    (rope_and_store, {"slots": ints(1, 2)}, "slots has 2 entries; expected 3"),
    (rope_and_store, {"positions": ints(1, 2, -1)}, r"positions\[2\] is -1"),
    (rope_and_store, {"positions": ints(1, 2, 2**31 - 1)}, r"positions\[2\] is 2147483647"),
    (rope_and_store, {"positions": ints(1, 2, 3, 4)}, "positions has 4 entries; expected 3"),
    (
        rope_and_store,
        {"frequencies": uniform(4, 5)},
        "5 frequencies; expected at most half of head_dim, 8",
    ),
    (rope_and_store, {"v": uniform(3, 2, 2, 8)}, "v has 2 entries along axis 0; k has 3"),
    (rope_and_store, {"q": uniform(1, 2, 4, 8)}, "q has 2 tokens; k has 3"),
    (rope_and_store, {"q": uniform(1, 3, 4, 6)}, "q has head_dim 6; k has 8"),
    (rope_and_store, {"num_slots": -1}, "num_slots is -1"),
    (rope_and_store, {"kv_dtype": "int4"}, "kv_dtype"),
    (attention, {"row_starts": ints(0, 4)}, "row_starts has 2 entries; expected 3"),
    (attention, {"row_starts": ints(0, 1, 5)}, "expected 0 to the number of tokens, 4"),
    (attention, {"row_starts": ints(0, 5, 4)}, r"row_starts\[2\] is 4; expected 5 or more"),
    (attention, {"context_lens": ints(17, 33)}, r"context_lens\[1\] is 33; expected 3"),
    (attention, {"context_lens": ints(0, 30)}, r"context_lens\[0\] is 0; expected 1"),
    (
        attention,
        {"block_tables": np.array([[2, 3], [1, 2]], dtype=np.int32)},
        r"block_tables\[0, 1\] is 3; expected 0 to 2",
    ),
    (
        attention,
        {"block_tables": np.array([[2, 0], [-1, 2]], dtype=np.int32)},
        r"block_tables\[1, 0\] is -1; expected 0 to 2",
    ),
    (attention, {"block_tables": np.zeros((1, 2), dtype=np.int32)}, "block_tables has 1 entries"),
    (attention, {"v": uniform(3, 39, 2, 8)}, "v has 39 entries along axis 0; k has 40"),
    (quantized_linear, {"bias": uniform(3, 4)}, "bias has 4 entries; expected 5"),
    (quantized_linear, {"scales": uniform(2, 5, 1)}, "scales has 5 entries"),
    (quantized_linear, {"codes": np.zeros((5, 19), dtype=np.uint8)}, "codes has 19 columns"),
    (quantized_linear, {"format": WeightFormat("f32"), "zeros": None}, "format is f32"),
    (sample, {"masks": np.zeros((1, 3), dtype=np.int32)}, "masks has 1 entries; expected 2"),
    (sample, {"masks": np.zeros((2, 2), dtype=np.int32)}, "a row of masks has 2 .* expected 3"),
    (sample, {"rows": sampling_rows(1)}, "sampling has 1 entries; expected 2"),
    (
        sample,
        {"rows": sampling_rows(2, state_row=[1, 2])},
        r"\[1\].state_row is 2; .* -1 to 1",
    ),
]


@pytest.mark.parametrize("op", OPS)
def test_what_the_ops_take(op: Callable[..., Any], native: _native_ops.Ops) -> None:
    """The arguments that the cases below change are right before they are changed."""
    op(native)


@pytest.mark.parametrize(("op", "changed", "message"), WRONG)
def test_wrong_arguments(
    op: Callable[..., Any], changed: dict[str, Any], message: str, native: _native_ops.Ops
) -> None:
    with pytest.raises(ValueError, match=message):
        op(native, **changed)


def test_wrong_shapes_of_simple_ops(native: _native_ops.Ops) -> None:
    x, other, weight = uniform(1, 3, 8), uniform(2, 2, 8), uniform(3, 8)
    with pytest.raises(ValueError, match=r"rows\[1\] is 3; expected 0 to 2"):
        native.take_rows(x, ints(0, 3))
    with pytest.raises(ValueError, match=r"rows\[0\] is -1; expected 0 to 2"):
        native.take_rows(x, ints(-1))
    with pytest.raises(ValueError, match="x has 2 entries along axis 0; residual has 3"):
        native.add_norm(x, other, weight, None, 1e-5)
    with pytest.raises(ValueError, match="gate has 2 entries along axis 0; up has 3"):
        native.gated_activation(other, x, "silu")
    with pytest.raises(ValueError, match="vocab_size is -4"):
        native.gumbel(1, 0, 0, -4)
