"""A multiple-choice evaluation: the choice that the model finds most probable, token for token.

python examples/score_choices.py [MODEL]
"""

import sys

from octavo import LLM, SamplingParams

QUESTIONS = [
    ("The capital of France is", [" Paris", " Berlin", " Madrid"], 0),
    ("Water freezes at a temperature of", [" 100 degrees", " 0 degrees Celsius", " 50 degrees"], 1),
    ("The opposite of hot is", [" warm", " big", " cold"], 2),
]

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else None, max_model_len=512)
# Nothing is sampled: the log-probabilities of the prompt's own tokens are all that is computed.
score = SamplingParams(max_tokens=0, prompt_logprobs=0)
tokenizer = llm.get_tokenizer()
right = 0
for question, choices, answer in QUESTIONS:
    outputs = llm.generate([question + choice for choice in choices], score, progress=False)
    start = len(tokenizer.encode(question))
    sums = [sum(entry.logprob for entry in output.prompt_logprobs[start:]) for output in outputs]
    best = max(range(len(choices)), key=sums.__getitem__)
    right += best == answer
    print(f"{question}{choices[best]}   {[round(value, 2) for value in sums]}")
print(f"{right} of {len(QUESTIONS)} right")
