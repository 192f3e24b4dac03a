"""A LoRA adapter beside the plain model: requests of both share the steps of one batch.

python examples/adapter.py MODEL NAME=FOLDER [NAME=FOLDER ...]
"""

import sys

from octavo import LLM, SamplingParams

if len(sys.argv) < 3:
    sys.exit(__doc__)
adapters = dict(word.split("=", 1) for word in sys.argv[2:])
llm = LLM(sys.argv[1], adapters=adapters, max_model_len=512)
params = SamplingParams(temperature=0, max_tokens=24)
items = [
    ((prompt, name), prompt, params, name)
    for prompt in ["Once upon a time", "2 + 2 ="]
    for name in [None, *adapters]
]
for (prompt, name), output in llm.generate_as_completed(items):
    print(f"{name or 'no adapter'}: {prompt!r} -> {output.text!r}")
