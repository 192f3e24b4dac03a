"""The GPU's limits, measured: what every other figure is held against; timing through torch.

    python benchmarks/gpu/limits.py

Memory: bytes a second of octavo's own reading kernel, and of a copy by torch (read plus written).
Arithmetic: bf16 products by mma.sync (octavo's kernels' instruction) and by cuBLAS through torch.
All of it on random numbers: memory and multipliers are faster on constants.

And how far below the greatest number tensor cores still add: 1 - 1 + 2^-n is 2^-n up to some n, 0
behind it. The tests pass with an A100's 24 and an H100's 25 bits (docs/emulator.md).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
from results import DEVICE, EMULATE, TORCH_DEVICE, keep

from octavo import _native, _native_ops


def main() -> None:
    """Measure both limits both ways."""
    small = {"seconds": 0.0, "num_bytes": 1 << 16} if EMULATE else {}
    values = {
        "read_bytes_per_second": _native.measure_bandwidth(device=DEVICE, **small),
        "mma_flops": _native.measure_flops(device=DEVICE, seconds=0.0 if EMULATE else 0.5),
    }
    try:
        values |= of_torch()
    except ImportError:
        print("torch is not here: its copy and its products are left out")
    for name, value in values.items():
        print(f"{name} {value / 1e12:.3f} T/s")
    bits = tensor_core_bits()
    print(f"tensor cores keep {bits} bits below the greatest number")
    keep("limits", {**values, "tensor_core_bits": bits})


def tensor_core_bits(most: int = 40) -> int:
    """The greatest n for which 1 - 1 + 2^-n, in one product, is not 0; `most` if all are kept."""
    x = np.zeros((1, 32), np.float32)
    weight = np.zeros((most, 32), np.float32)
    x[0, :3] = 1.0
    for row, bits in enumerate(range(1, most + 1)):
        weight[row, :3] = 1.0, -1.0, 2.0**-bits
    sums = _native_ops.Ops(DEVICE, dtype="bf16").linear(x, weight, None, "bf16")[0]
    return int(np.count_nonzero(sums))


def of_torch() -> dict[str, float]:
    """A copy and a matrix product."""
    import torch

    numbers, side = (1 << 12, 64) if EMULATE else (1 << 30, 8192)
    source = torch.randn(numbers, dtype=torch.bfloat16, device=TORCH_DEVICE)
    target = torch.empty_like(source)
    copy = seconds_of(lambda: target.copy_(source))
    left, right = (
        torch.randn(side, side, dtype=torch.bfloat16, device=TORCH_DEVICE) for _ in range(2)
    )
    product = seconds_of(lambda: left @ right)
    return {
        "torch_copy_bytes_per_second": 4 * numbers / copy,
        "cublas_flops": 2 * side**3 / product,
    }


def seconds_of(work: Callable[[], object], calls: int = 20, rounds: int = 5) -> float:
    """Median seconds of one call, of `rounds` graphs of `calls` calls each.

    A CUDA graph leaves out what launching costs, as octavo's own timing does
    (`_native_ops.OpBench`). Work that cannot be captured is timed as it is. In emulation: one call,
    by the clock.
    """
    import torch

    if EMULATE:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    replay = _captured(work, calls)
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000 / calls)
    return statistics.median(times)


def _captured(work: Callable[[], object], calls: int) -> Callable[[], None]:
    import torch

    def repeat() -> None:
        for _ in range(calls):
            work()

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            repeat()
    except RuntimeError:
        return repeat
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


if __name__ == "__main__":
    main()
