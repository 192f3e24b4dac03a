"""A few launches of the kernels that decoding and prompts live on, for a profiler to look at.

ncu --section SpeedOfLight python benchmarks/gpu/profiled.py
"""

from __future__ import annotations

from results import DEVICE, EMULATE

from octavo import _native_ops
from octavo.models.spec import WeightFormat


def main() -> None:
    """Attention, gate and up by tiles and of one row, in three formats; each a few times."""
    # One copy: the profiler empties the caches itself.
    bench = _native_ops.OpBench(DEVICE, "bf16", launches=1, repeats=1, cache_bytes=1)
    outputs, inputs, context = (160, 128, 20) if EMULATE else (16384, 2048, 2048)
    int8, int4 = WeightFormat("int8"), WeightFormat("int4", group_size=128)
    for sequences, new_tokens in [(1, 1), (64, 1), (1, context)]:
        bench.attention(sequences, new_tokens, context, 32, 8, 64, "bf16")
    for format in (int8, int4):
        bench.linear([16, 64], outputs, inputs, format)
    for format in (None, int8, int4):
        bench.linear([1], outputs, inputs, format)


if __name__ == "__main__":
    main()
