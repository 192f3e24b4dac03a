"""Seconds of work queued on the GPU through torch; on the CPU where the GPU is emulated."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from results import EMULATE


def seconds_of(work: Callable[[], object], calls: int = 20, rounds: int = 5) -> float:
    """Median seconds of one call, of `rounds` graphs of `calls` calls each.

    A CUDA graph leaves out what launching costs, as octavo's own timing does
    (`_native_ops.OpBench`).
    Work that cannot be captured is timed as it is.
    """
    if EMULATE:
        return _host_seconds(work)
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


def _host_seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _captured(work: Callable[[], object], calls: int) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                work()
    except RuntimeError:

        def repeat() -> None:
            for _ in range(calls):
                work()

        return repeat
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay
