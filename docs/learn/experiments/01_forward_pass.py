"""What SmolLM2 would say after each of its layers: when does it know "Paris"?

The rows between two layers have the width of the last one's, so the final norm and the head can
read any of them ("logit lens", nostalgebraist 2020).
"""

import numpy as np
from measured import COLOURS, axes, load_reference, save

PROMPT, ANSWER = "The capital of France is", " Paris"
model, tokenizer = load_reference()
tokens = tokenizer.encode(PROMPT)
(answer,) = tokenizer.encode(ANSWER)
taps = {}
model.forward(tokens, taps=taps)
norm, head = model.weights["final_norm.weight"], model.weights["embed.weight"]

rows = [taps["embed"][-1], *(taps[f"layers.{i}.out"][-1] for i in range(len(model.spec.layers)))]
shares, firsts = [], []
for row in rows:
    normed = row / np.sqrt(np.mean(row * row) + model.spec.final_norm.eps) * norm
    scores = head @ normed
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    shares.append(float(probabilities[answer]))
    firsts.append(tokenizer.decode([int(scores.argmax())]))

plot = axes()
plot.plot(
    range(len(rows)), [100 * share for share in shares], color=COLOURS["blue"], marker="o", ms=4
)
plot.set(xlabel="layers passed", ylabel=f"probability of “{ANSWER.strip()}” (%)", ylim=(0, None))
last = ""
table = [["layers passed", "its first choice", f"probability of “{ANSWER.strip()}”"]]
for passed, (first, share) in enumerate(zip(firsts, shares, strict=True)):
    if passed % 5 == 0 or passed >= len(rows) - 4:
        table.append([str(passed), f"“{first.strip()}”", f"{100 * share:.1f} %"])
save(plot, {"tokens": tokens, "first_choices": firsts, "probabilities": shares}, table)
