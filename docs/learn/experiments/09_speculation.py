"""Drafts that are copied from the text so far: what they save on a repetition and on a story."""

import time

from measured import COLOURS, MODEL, axes, save

from octavo import LLM, SamplingParams

DRAFTS = [0, 1, 2, 4, 7]
POEM = (
    "The river ran past seven mills, the miller had but one; he ground the corn of seven hills "
    "from dawn to setting sun. "
)
PROMPTS = {"repeats a text": POEM * 3, "tells a story": "Once upon a time, in a small village by"}
params = SamplingParams(temperature=0, max_tokens=96, ignore_eos=True)
results, expected = {name: [] for name in PROMPTS}, {}
for count in DRAFTS:
    options = {"method": "ngram", "num_speculative_tokens": count, "adaptive": False}
    llm = LLM(MODEL, max_model_len=512, speculative_config=options if count else None)
    for name, prompt in PROMPTS.items():
        llm.generate(prompt, params, progress=False)
        before, start = llm.engine.stats(), time.perf_counter()
        (output,) = llm.generate(prompt, params, progress=False)
        seconds, after = time.perf_counter() - start, llm.engine.stats()
        tokens = output.outputs[0].token_ids
        if tokens != expected.setdefault(name, tokens):
            raise SystemExit("drafts changed the answer; expected the same tokens")
        accepted = after.num_accepted_tokens - before.num_accepted_tokens
        results[name].append({"accepted": accepted, "seconds": seconds, "tokens": len(tokens)})

plot = axes()
table = [
    [
        "drafts in a step",
        *(f"{name}: tokens a step" for name in PROMPTS),
        *(f"{name}: speed" for name in PROMPTS),
    ]
]
steps = {}
for (name, rows), colour in zip(results.items(), ("blue", "orange"), strict=True):
    steps[name] = [row["tokens"] / (row["tokens"] - row["accepted"]) for row in rows]
    plot.plot(DRAFTS, steps[name], color=COLOURS[colour], marker="o", label=name)
plot.plot(
    DRAFTS,
    [1 + count for count in DRAFTS],
    color=COLOURS["soft"],
    ls="--",
    label="if all were right",
)
plot.set(xlabel="drafts in a step", ylabel="tokens a step", ylim=(0, None))
plot.set_xticks(DRAFTS, DRAFTS)
plot.legend()
for place, count in enumerate(DRAFTS):
    speeds = [rows[0]["seconds"] / rows[place]["seconds"] for rows in results.values()]
    table.append([str(count), *(f"{values[place]:.1f}" for values in steps.values()),
                  *(f"{speed:.2f} ×" for speed in speeds)])  # fmt: skip
save(plot, {"drafts": DRAFTS, "results": results}, table)
