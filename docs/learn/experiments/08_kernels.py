"""One matrix product of octavo's native core, from 1 row to 512, beside the machine's two limits.

The limits are measured here: how many bytes a second the machine reads from memory, and how many
operations a second it makes. Copies of the matrix take turns, so that no cache holds it.
"""

from measured import COLOURS, axes, save

from octavo import _native, _native_ops

OUTPUTS, INPUTS = 1536, 576  # the MLP's first matrix in SmolLM2, float32: 3.5 MB
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
bandwidth = _native.measure_bandwidth()
peak = _native.measure_flops()
bench = _native_ops.OpBench("cpu", "f32", launches=50, repeats=5)
seconds = bench.linear(ROWS, OUTPUTS, INPUTS)
reached = [2 * rows * OUTPUTS * INPUTS / time for rows, time in zip(ROWS, seconds, strict=True)]
# A weight is 4 bytes and makes 2 operations for each row: so many a second can memory feed.
limits = [min(bandwidth / 4 * 2 * rows, peak) for rows in ROWS]

plot = axes()
plot.plot(
    ROWS, [limit / 1e9 for limit in limits], color=COLOURS["soft"], ls="--", label="the limit"
)
plot.plot(
    ROWS, [value / 1e9 for value in reached], color=COLOURS["blue"], marker="o", label="octavo"
)
plot.set_xscale("log", base=2)
plot.set_yscale("log")
plot.set_xticks(ROWS, ROWS)
plot.set(
    xlabel="rows that one reading of the matrix serves", ylabel="billions of operations a second"
)
plot.legend()
table = [["rows", "operations a second", "the limit", "limited by", "reached"]]
for rows, value, limit in zip(ROWS, reached, limits, strict=True):
    by = "memory" if limit < peak else "arithmetic"
    table.append([str(rows), f"{value / 1e9:.0f} billion", f"{limit / 1e9:.0f} billion", by,
                  f"{value / limit:.0%}"])  # fmt: skip
save(plot, {"rows": ROWS, "seconds": seconds, "bandwidth": bandwidth, "peak": peak}, table)
