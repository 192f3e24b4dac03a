"""What a step of octavo costs for 1 to 64 sequences, one new token each."""

from measured import COLOURS, axes, load_session, save, seconds_of

SIZES = [1, 2, 4, 8, 16, 32, 64]
STEPS = 8
session = load_session(num_kv_blocks=64 * 8, max_model_len=128)
times = []
for size in SIZES:
    session.restart(size)
    session.step({s: [1 + s, 2, 3, 4] for s in range(size)})

    def steps(size=size):
        session.rewind(4)
        for token in range(STEPS):
            session.step({s: [10 + token] for s in range(size)})

    steps()
    times.append(seconds_of(steps, 5) / STEPS)
speeds = [size / seconds for size, seconds in zip(SIZES, times, strict=True)]
plot = axes()
plot.plot(SIZES, speeds, color=COLOURS["blue"], marker="o", label="measured")
plot.plot(SIZES, [speeds[0] * size for size in SIZES], color=COLOURS["soft"], ls="--", lw=1.5,
          label="if more rows cost nothing")  # fmt: skip
plot.set_xscale("log", base=2)
plot.set_yscale("log", base=2)
plot.set(xlabel="sequences in a step", ylabel="tokens a second")
plot.set_xticks(SIZES, SIZES)
ticks = [2**power for power in range(20) if speeds[0] / 2 < 2**power < 1.5 * max(speeds)]
plot.set_yticks(ticks, ticks)
plot.set_ylim(speeds[0] / 1.5, max(speeds) * 2.5)
plot.legend()
table = [["sequences", "time of a step", "tokens a second", "beside one sequence"]]
for size, seconds, speed in zip(SIZES, times, speeds, strict=True):
    table.append(
        [str(size), f"{1000 * seconds:.1f} ms", f"{speed:.0f}", f"{speed / speeds[0]:.1f} ×"]
    )
save(plot, {"sizes": SIZES, "seconds": times}, table)
