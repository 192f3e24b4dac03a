"""Products on tile registers (AMX, and its emulation) against plain C++: every bit the same.

Weights in groups have a definition of their own there, with activations in bf16: they are held to
the reference, and the processor's tiles to the bits of the emulated ones.

The other tests of ops run on these instruction sets too; here are the shapes that matter to tiles:
16 rows and one more, blocks of rows and panels that are not whole, stretches of inputs that end
within a step. A build without OCTAVO_EMULATE_AMX, on a machine without AMX, has nothing to test.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ops_helpers import TOLERANCES

from octavo import _native, _native_ops
from octavo.models.spec import WeightFormat
from octavo.reference import quantization as q
from octavo.reference.ops import round_to_bf16

ISAS = [isa for isa in ("amx_emulated", "amx") if isa in _native.available_isas()]
FORMATS = [
    None,  # bf16
    WeightFormat("int8"),
    WeightFormat("int8", activation_bits=8),
]
GROUPED = [
    WeightFormat("int4", 32),
    WeightFormat("int4", 64, has_zeros=True),
    WeightFormat("int4", 96),
    WeightFormat("int4", 128, has_zeros=True, levels=tuple(range(-127, 33, 10))),
    WeightFormat("int4", 1056, scale_dtype="f32"),
    WeightFormat("int8", 32, scale_dtype="f16"),
    WeightFormat("int8", 96),
    WeightFormat("int8", 1056, scale_dtype="f32"),
]
# 5: as few rows as go on tiles; 256 rows and 16 panels: as many as a call takes at a time
SHAPES = [(5, 16, 32), (16, 33, 98), (17, 100, 576), (48, 17, 1034), (273, 270, 418)]

Array = np.ndarray
needs_tiles = pytest.mark.skipif(
    not ISAS, reason="no tiles: built without OCTAVO_EMULATE_AMX, and no AMX"
)


def product(isa: str, shape: tuple[int, int, int], format: WeightFormat | None) -> Array:
    """x times a matrix of the format, (rows, outputs) float32, from (rows, outputs, inputs)."""
    rows, outputs, inputs = shape
    native = _native_ops.Ops(num_threads=2, isa=isa)
    if format is not None:
        return native.quantized_linear(*arguments(shape, format))
    generator = np.random.default_rng(rows + outputs)
    x = generator.standard_normal((rows, inputs), dtype=np.float32)
    bias = generator.standard_normal(outputs, dtype=np.float32)
    weight = generator.standard_normal((outputs, inputs), dtype=np.float32)
    return native.linear(x, weight, bias, "bf16")


def arguments(shape: tuple[int, int, int], format: WeightFormat) -> tuple[Any, ...]:
    """Those of `quantized_linear`, from (rows, outputs, inputs)."""
    rows, outputs, inputs = shape
    generator = np.random.default_rng(rows + outputs)
    x = generator.standard_normal((rows, inputs), dtype=np.float32)
    bias = generator.standard_normal(outputs, dtype=np.float32)
    groups = (outputs, format.num_groups(inputs))
    scales = generator.uniform(0.001, 0.1, groups).astype(np.float32)
    if format.scale_dtype == "f16":
        scales = scales.astype(np.float16).astype(np.float32)
    else:
        scales = round_to_bf16(scales)
    zeros = generator.integers(-8, 8, groups).astype(np.float32) if format.has_zeros else None
    if format.dtype == "int8":
        codes = generator.integers(-128, 128, (outputs, inputs)).astype(np.int8)
    else:
        codes = q.pack_int4(generator.integers(0, 16, (outputs, inputs)))
    return x, codes, scales, format, zeros, bias


@needs_tiles
@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_give_the_bits_of_plain_loops(
    shape: tuple[int, int, int], format: WeightFormat | None
) -> None:
    expected = product("scalar", shape, format)
    for isa in ISAS:
        assert product(isa, shape, format).tobytes() == expected.tobytes()


@needs_tiles
@pytest.mark.parametrize("format", GROUPED, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 100, 576), (4, 33, 1034)], ids=str)
def test_groups_are_products_of_bf16(shape: tuple[int, int, int], format: WeightFormat) -> None:
    """On tiles, and with the few rows that do without them."""
    x, *rest = arguments(shape, format)
    expected = q.quantized_linear(x.astype(np.float64), *rest, grouped_activations="bf16")
    first = product(ISAS[0], shape, format)
    error = np.abs(first - expected).max() / np.sqrt(np.mean(expected**2))
    assert error < TOLERANCES["linear"]
    for isa in ISAS[1:]:
        assert product(isa, shape, format).tobytes() == first.tobytes()


@needs_tiles
def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    generator = np.random.default_rng(11)
    x = generator.standard_normal((20, 70), dtype=np.float32)
    codes = generator.integers(-128, 128, (40, 70)).astype(np.int8)
    scales = np.full((40, 1), 0.01, np.float32)
    spoiled = x.copy()
    spoiled[7, 3], spoiled[18, 5] = np.nan, np.inf
    healthy = [row for row in range(20) if row not in (7, 18)]
    for isa in ISAS:
        native = _native_ops.Ops(isa=isa)
        y = native.quantized_linear(x, codes, scales, WeightFormat("int8"))
        z = native.quantized_linear(spoiled, codes, scales, WeightFormat("int8"))
        assert (z[healthy] == y[healthy]).all() and np.isnan(z[[7, 18]]).all()
        y = native.linear(x, codes.astype(np.float32), None, "bf16")
        z = native.linear(spoiled, codes.astype(np.float32), None, "bf16")
        assert (z[healthy] == y[healthy]).all() and not np.isfinite(z[[7, 18]]).any()
        packed, format = q.pack_int4((codes & 15).astype(np.uint8)), WeightFormat("int4", 96)
        y = native.quantized_linear(x, packed, scales, format)
        z = native.quantized_linear(spoiled, packed, scales, format)
        assert (z[healthy] == y[healthy]).all() and not np.isfinite(z[[7, 18]]).any()


def test_auto_never_takes_the_emulation() -> None:
    assert _native.build_info()["isa"] != "amx_emulated"
