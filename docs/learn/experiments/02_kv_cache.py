"""Milliseconds for one more token of SmolLM2 in NumPy, with the KV cache and without."""

from measured import COLOURS, axes, load_reference, save, seconds_of

from octavo.reference.llama import KVCache

model, tokenizer = load_reference()
text = "The sea was calm that night and the old ferry crossed it slowly. " * 40
LENGTHS = [8, 32, 64, 128, 256]
tokens = tokenizer.encode(text)[: max(LENGTHS)]
without, with_cache = [], []
model.forward(tokens)  # warm
for length in LENGTHS:
    known = tokens[:length]
    without.append(
        seconds_of(lambda known=known: model.forward(known, logit_rows=[len(known) - 1]), 2)
    )
    cache = KVCache()
    model.forward(known[:-1], cache, logit_rows=[0])
    keys, values, held = list(cache.keys), list(cache.values), cache.length

    def one_more(known=known, keys=keys, values=values, held=held):
        model.forward(known[-1:], KVCache(list(keys), list(values), held))

    with_cache.append(seconds_of(one_more))

plot = axes()
plot.plot(
    LENGTHS,
    [1000 * t for t in without],
    color=COLOURS["orange"],
    marker="o",
    label="without a cache",
)
plot.plot(
    LENGTHS, [1000 * t for t in with_cache], color=COLOURS["blue"], marker="o", label="with a cache"
)
plot.set(
    xlabel="tokens so far", ylabel="time of the next token (ms)", ylim=(0, None), xlim=(0, None)
)
plot.legend()
table = [["tokens so far", "without a cache", "with a cache", "gain"]]
for length, slow, fast in zip(LENGTHS, without, with_cache, strict=True):
    table.append(
        [str(length), f"{1000 * slow:.0f} ms", f"{1000 * fast:.0f} ms", f"{slow / fast:.1f} ×"]
    )
save(plot, {"lengths": LENGTHS, "without": without, "with": with_cache}, table)
