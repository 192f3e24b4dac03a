"""The GPU's limits, measured: what every other figure is held against.

    python benchmarks/gpu/limits.py

Memory: bytes a second of octavo's own reading kernel, and of a copy by torch (read plus written).
Arithmetic: bf16 products by mma.sync (octavo's kernels' instruction) and by cuBLAS through torch.
"""

from __future__ import annotations

import torch
from results import keep
from timing import seconds_of

from octavo import _native


def main() -> None:
    """Measure both limits both ways."""
    source = torch.randn(1 << 30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy = seconds_of(lambda: target.copy_(source))
    left = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    right = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    product = seconds_of(lambda: left @ right)
    num_bytes = 2 * source.numel() * 2
    keep(
        "limits",
        {
            "read_bytes_per_second": _native.measure_bandwidth(device="cuda"),
            "torch_copy_bytes_per_second": num_bytes / copy,
            "mma_flops": _native.measure_flops(device="cuda"),
            "cublas_flops": 2 * 8192**3 / product,
        },
    )


if __name__ == "__main__":
    main()
