"""How much room to leave when a request is admitted, tried on a simulated device.

Random requests (lengths log-normal, arrivals Poisson) and caches that are too small for them. For
each headroom it prints tokens a second, preemptions, tokens computed (more than the least means
computing anew), time to first token and time between tokens. No model is needed.

    python benchmarks/scheduler_policy.py
"""

from __future__ import annotations

import random
from dataclasses import replace

from octavo.config import RuntimeOptions
from octavo.trace.log_file import log_of
from octavo.trace.replay import summarize
from octavo.trace.simulation import Arrival, CostModel, Simulation

COSTS = CostModel(fixed=7e-3, per_token=2.5e-4, per_attended=2e-8)
NUM_REQUESTS, REQUESTS_A_SECOND = 300, 8.0
NUM_BLOCKS = (150, 300, 500)
HEADROOMS = (0, 1, 2, 4, 8)


def traffic(seed: int) -> list[Arrival]:
    generator = random.Random(seed)
    arrivals, time = [], 0.0
    for i in range(NUM_REQUESTS):
        time += generator.expovariate(REQUESTS_A_SECOND)
        num_prompt = max(4, min(int(generator.lognormvariate(4.5, 1.0)), 1500))
        num_output = max(2, min(int(generator.lognormvariate(5.0, 0.7)), 600))
        blocks = tuple(1000 * i + k for k in range(num_prompt // 16))
        arrivals.append(Arrival(time, str(i), num_prompt, num_output, blocks=blocks))
    return arrivals


def main() -> None:
    options = RuntimeOptions("f32", "f32", 16, 2200, 64, 512, event_log_capacity=10**7)
    print("blocks headroom tokens/s preempted  computed   first token p50    p99   between p99")
    for num_blocks in NUM_BLOCKS:
        for headroom in HEADROOMS:
            simulation = Simulation(options, num_blocks, COSTS)
            scheduler = simulation.engine.scheduler
            scheduler.limits = replace(scheduler.limits, headroom_blocks=headroom)
            simulation.run(traffic(seed=0))
            log = log_of(simulation.engine.events)
            summary = summarize(log)
            first, between = summary.time_to_first_token, summary.time_per_token
            if first is None or between is None:
                raise RuntimeError("no tokens were drawn")
            print(
                f"{num_blocks:6} {headroom:8} {summary.tokens_per_second:8.0f} "
                f"{summary.num_preemptions:9} {sum(step.num_tokens for step in log.steps):9} "
                f"{first.p50:13.2f} s {first.p99:5.2f} s {between.p99 * 1e3:9.1f} ms"
            )


if __name__ == "__main__":
    main()
