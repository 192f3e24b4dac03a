"""A logits processor of one's own: the answer may have no letter e.

python examples/logits_processor.py [MODEL]
"""

import sys

import numpy as np

from octavo import LLM, SamplingParams

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else None, max_model_len=512)
tokenizer = llm.get_tokenizer()
has_e = np.array(["e" in tokenizer.decode([token]) for token in range(tokenizer.vocab_size)])


def without_e(prompt_token_ids, generated_token_ids, logits):
    """Called before each token. -inf forbids one; all others keep the model's own logits."""
    logits[: len(has_e)][has_e] = -np.inf
    return logits


question = [{"role": "user", "content": "What is the capital of France?"}]
for processors in ([], [without_e]):
    params = SamplingParams(temperature=0, max_tokens=24, logits_processors=processors)
    print(llm.chat(question, params, progress=False)[0].text)
