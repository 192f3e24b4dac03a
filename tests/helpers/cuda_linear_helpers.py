"""What the tests of CUDA's matrix products share."""

from __future__ import annotations

from typing import Any

import numpy as np
from cuda_helpers import DEVICE, rounded
from reference_helpers import Float32

from octavo import _native_ops
from octavo.models.spec import WeightFormat
from octavo.reference import quantization as q


def native(dtype: str, **options: Any) -> _native_ops.Ops:
    return _native_ops.Ops(DEVICE, dtype=dtype, **options)


def error(actual: Any, expected: Any) -> float:
    """The largest, of the root mean square."""
    return float(np.abs(actual - expected).max() / np.sqrt(np.mean(np.square(expected))))


UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FORMATS = [
    WeightFormat("int8"),
    WeightFormat("int4", 32),
    WeightFormat("int4", 32, has_zeros=True),
    WeightFormat("int4", 64, has_zeros=True),
    WeightFormat("int4", 64, levels=UNEVEN),
    WeightFormat("int4", 96),
    WeightFormat("int4", 128, scale_dtype="f32"),
    WeightFormat("int4", 128, has_zeros=True),
    WeightFormat("int8", 32, scale_dtype="f16"),
    WeightFormat("int8", 96),
    WeightFormat("int8", 128, scale_dtype="f16"),
    WeightFormat("int4", 256, levels=UNEVEN, has_zeros=True),
]
BYTES_IN_GROUPS = WeightFormat("int8", 32, scale_dtype="f16")
PLAIN_TOLERANCE = 5e-6  # float32 sums
# Of more rows than go by tiles (TileRows in csrc/cuda/backend.h) the library multiplies, and by
# weights that were rounded.
PLAIN_ROWS, QUANTIZED_ROWS = 8, 128
ROUNDED_TOLERANCE = {"f32": 5e-6, "f16": 2e-3, "bf16": 1.5e-2}
# So many tiles that more than half of the processors have one: tiles, and large ones of many rows.
MANY_OUTPUTS = 281 if DEVICE == "cuda_emulated" else 8577
F16_SCALES_TOLERANCE = 2e-3  # what float32 scales become beside 16-bit activations


def quantized(
    outputs: int, inputs: int, format: WeightFormat
) -> tuple[np.ndarray, Float32, Float32 | None]:
    """Codes as the native core takes them, scales, zeros."""
    generator = np.random.default_rng(outputs * 31 + inputs)
    shape = (outputs, format.num_groups(inputs))
    scales = generator.uniform(0.01, 0.1, shape).astype(np.float32)
    if format.scale_dtype != "f32":
        scales = rounded(scales, format.scale_dtype)
    zeros = generator.integers(-8, 9, shape).astype(np.float32) if format.has_zeros else None
    if format.dtype == "int8":
        return generator.integers(-128, 128, (outputs, inputs)).astype(np.int8), scales, zeros
    return q.pack_int4(generator.integers(0, 16, (outputs, inputs))), scales, zeros


def dequantized(
    codes: np.ndarray, scales: Float32, zeros: Float32 | None, format: WeightFormat, inputs: int
) -> Float32:
    if format.dtype == "int4":
        codes = q.unpack_int4(codes)[:, :inputs]
    return q.dequantize(codes, scales, format, zeros)
