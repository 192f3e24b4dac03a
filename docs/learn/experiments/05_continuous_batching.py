"""The same 24 requests in static batches of 8, and in a batch that changes at any step."""

import time

from measured import COLOURS, MODEL, axes, save

from octavo import LLM, SamplingParams

PLACES, REQUESTS = 8, 24
LENGTHS = [(37 * number) % 90 + 6 for number in range(REQUESTS)]  # 6 to 95 tokens
PROMPTS = [f"Here is the story of the {number}th traveller." for number in range(REQUESTS)]
llm = LLM(MODEL, max_model_len=256, max_num_seqs=PLACES, enable_prefix_caching=False)


def run(groups: list[list[int]]) -> tuple[float, list[int], list[list[int]]]:
    """Requests in groups, one group after the other: seconds, sequences of each step, answers."""
    engine, answers, busy = llm.engine, {}, []
    start = time.perf_counter()
    for group in groups:
        for number in group:
            params = SamplingParams(temperature=0, max_tokens=LENGTHS[number], ignore_eos=True)
            engine.add_request(
                str(number), llm.tokenizer.encode(PROMPTS[number]), params, stream=True
            )
        while engine.has_unfinished_requests:
            chunks = engine.step()
            busy.append(len({chunk.request_id for chunk in chunks}))
            for chunk in chunks:
                answers.setdefault(int(chunk.request_id), []).extend(chunk.token_ids)
    return time.perf_counter() - start, busy, [answers.get(n) for n in range(REQUESTS)]


numbers = list(range(REQUESTS))
static = [numbers[start : start + PLACES] for start in range(0, REQUESTS, PLACES)]
run([numbers[:2]])  # warm
runs = {"static": run(static), "continuous": run([numbers])}
if runs["static"][2] != runs["continuous"][2]:
    raise SystemExit("the two give different answers; expected the same")
plot = axes()
for (name, (_, busy, _)), colour in zip(runs.items(), ("orange", "blue"), strict=True):
    plot.step(range(len(busy)), busy, where="post", color=COLOURS[colour], label=name)
plot.set(
    xlabel="step", ylabel="sequences that got a token", ylim=(0, PLACES * 1.25), xlim=(0, None)
)
plot.legend(ncols=2, loc="upper right")
tokens = sum(LENGTHS)
table = [["batching", "steps", "time", "tokens a second"]]
for name, (seconds, busy, _) in runs.items():
    table.append([name, str(len(busy)), f"{seconds:.2f} s", f"{tokens / seconds:.0f}"])
save(plot, {name: {"seconds": s, "busy": b} for name, (s, b, _) in runs.items()}, table)
