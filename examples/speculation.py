"""A task that quotes its prompt, with and without drafts: the same text, in less time.

python examples/speculation.py [MODEL]
"""

import sys
import time

from octavo import LLM, SamplingParams

TEXT = """def area(width, height):
    return width * height

def perimeter(width, height):
    return 2 * (width + height)
"""
PROMPT = f"Here is a program:\n\n{TEXT}\nHere is the same program once more:\n\n"

model = sys.argv[1] if len(sys.argv) > 1 else None
drafting = {"method": "ngram", "num_speculative_tokens": 6}
params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
texts = []
for config in (None, drafting):
    with LLM(model, max_model_len=512, speculative_config=config) as llm:
        llm.generate(PROMPT, params, progress=False)  # warms up
        start = time.perf_counter()
        texts.append(llm.generate(PROMPT + "\n", params, progress=False)[0].text)
        seconds = time.perf_counter() - start
        print(f"{'drafts' if config else 'plain '}   {64 / seconds:6.1f} tokens/s")
print("the same text" if texts[0] == texts[1] else "DIFFERENT TEXTS")
