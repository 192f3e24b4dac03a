"""CUDA: which kernel multiplies, and products as tensor cores round."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_helpers import DEVICE, emulated, needs_cuda
from cuda_linear_helpers import (
    MANY_OUTPUTS,
    PLAIN_TOLERANCE,
    QUANTIZED_ROWS,
    native,
    quantized,
)
from reference_helpers import uniform

from octavo.models.spec import WeightFormat

pytestmark = needs_cuda

AS_TENSOR_CORES_ROUND = """
import hashlib
import numpy as np
from cuda_helpers import rounded
from cuda_linear_helpers import *
from octavo.reference import ops as reference
from reference_helpers import uniform
worst, digest = 0.0, hashlib.sha256()
for format in FORMATS[:5] + FORMATS[-1:]:
    codes, scales, zeros = quantized(70, 408, format)
    x = uniform(70, 70, 408)
    actual = native("f16").quantized_linear(x, codes, scales, format, zeros)
    x = rounded(x, "f16").astype(np.float64)
    expected = reference.linear(x, dequantized(codes, scales, zeros, format, 408))
    worst = max(worst, error(actual, expected))
    digest.update(actual.tobytes())
print(worst, digest.hexdigest())
"""


@pytest.mark.skipif(DEVICE != "cuda_emulated", reason="a GPU has tensor cores of its own")
def test_tolerances_hold_as_tensor_cores_round() -> None:
    """Not only as the emulator rounds, exactly: as an A100 and an H100 do, which cut off."""
    digests = set()
    for capability in (0, 80, 90):
        shown = emulated(AS_TENSOR_CORES_ROUND, "TENSOR_CORES", capability)
        worst, digest = shown.split()
        assert float(worst) < PLAIN_TOLERANCE
        digests.add(digest)
    assert len(digests) == 3


INT4 = WeightFormat("int4", 32)
MANY = MANY_OUTPUTS + 7  # a multiple of 8, which the library wants
LIBRARY = "multiply_any" if DEVICE == "cuda_emulated" else "cublasLtMatmul"  # stands for it there


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "format", "kernels", "deterministic_kernels"),
    [
        (8, MANY, 136, None, "multiply_few", "multiply_few"),
        (9, MANY, 136, None, LIBRARY, "multiply_tile"),
        (16, 40, 136, None, "multiply_few", "multiply_few"),
        (17, 40, 136, None, LIBRARY, "multiply_tile"),
        (8, MANY, 136, INT4, "multiply_few", "multiply_few"),
        (9, MANY, 136, INT4, "multiply_tile", "multiply_tile"),
        (16, 40, 136, INT4, "multiply_few", "multiply_few"),
        (17, 40, 136, INT4, "multiply_tile", "multiply_tile"),
        (QUANTIZED_ROWS, 40, 136, INT4, "multiply_tile", "multiply_tile"),
        (QUANTIZED_ROWS + 1, 40, 136, INT4, f"dequantize, {LIBRARY}", "multiply_tile"),
        (1, 40, 134, None, "multiply_any", "multiply_any"),  # no multiple of 8
        (300, 40, 134, INT4, "multiply_any", "multiply_any"),
    ],
)
def test_which_kernel_multiplies(
    rows: int,
    outputs: int,
    inputs: int,
    format: WeightFormat | None,
    kernels: str,
    deterministic_kernels: str,
) -> None:
    """The table at the top of csrc/cuda/products/linear.cu."""
    x, weight = uniform(rows, rows, inputs), uniform(rows, outputs, inputs)
    for deterministic, row_gap in [(False, 0), (True, 8), (False, 8)]:
        ops = native("bf16", deterministic=deterministic, row_gap=row_gap)
        if format is None:
            ops.linear(x, weight, None, "bf16")
        else:
            codes, scales, zeros = quantized(outputs, inputs, format)
            ops.quantized_linear(x, codes, scales, format, zeros)
        expected = deterministic_kernels if deterministic else kernels
        assert ops.last_kernels().endswith(f", {expected}")


@pytest.mark.parametrize("format", [None, INT4, WeightFormat("int8")], ids=str)
def test_how_many_rows_are_few_can_be_set(
    format: WeightFormat | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 16, with the bits of tiles."""
    x, weight = uniform(16, 16, 136), uniform(3, MANY, 136)

    def product() -> tuple[np.ndarray, str]:
        ops = native("bf16", deterministic=True)
        if format is None:
            return ops.linear(x, weight, None, "bf16"), ops.last_kernels()
        codes, scales, zeros = quantized(MANY, 136, format)
        out = ops.quantized_linear(x, codes, scales, format, zeros)
        return out, ops.last_kernels()

    by_tiles, kernels = product()
    assert kernels.endswith(", multiply_tile")
    monkeypatch.setenv("OCTAVO_FEW_ROWS", "16")
    by_few, kernels = product()
    assert kernels.endswith(", multiply_few") and (by_few == by_tiles).all()
    monkeypatch.setenv("OCTAVO_FEW_ROWS", "17")
    with pytest.raises(ValueError, match="OCTAVO_FEW_ROWS is 17; expected at most 16"):
        native("bf16")
