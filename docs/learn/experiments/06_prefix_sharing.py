"""The time to the first token behind a prefix, the first time and when it is in the cache."""

import time

from measured import COLOURS, MODEL, axes, save

from octavo import LLM, SamplingParams

LENGTHS = [64, 128, 256, 512, 1024]
llm = LLM(MODEL, max_model_len=2048, max_num_seqs=4)
text = llm.tokenizer.encode(
    "You are a careful assistant who knows the house rules by heart. " * 120
)
first_token = SamplingParams(temperature=0, max_tokens=1)


def seconds(prompt: list[int]) -> float:
    start = time.perf_counter()
    llm.generate(prompt, first_token, progress=False)
    return time.perf_counter() - start


seconds(text[:100])
cold, warm = [], []
for number, length in enumerate(LENGTHS):
    prefix = [1000 + number, *text[: length - 1]]  # another first token: nothing of it is known
    cold.append(seconds([*prefix, *llm.tokenizer.encode(" What is rule one?")]))
    warm.append(
        min(seconds([*prefix, *llm.tokenizer.encode(f" What is rule {n}?")]) for n in "234")
    )
plot = axes()
plot.plot(
    LENGTHS, [1000 * t for t in cold], color=COLOURS["orange"], marker="o", label="first request"
)
plot.plot(LENGTHS, [1000 * t for t in warm], color=COLOURS["blue"], marker="o", label="later ones")
plot.set(xlabel="tokens of the common prefix", ylabel="time to the first token (ms)")
plot.set(xlim=(0, None), ylim=(0, None))
plot.legend()
table = [["common prefix", "first request", "later ones", "gain"]]
for length, slow, fast in zip(LENGTHS, cold, warm, strict=True):
    table.append(
        [
            f"{length} tokens",
            f"{1000 * slow:.0f} ms",
            f"{1000 * fast:.0f} ms",
            f"{slow / fast:.1f} ×",
        ]
    )
save(plot, {"lengths": LENGTHS, "first": cold, "later": warm}, table)
