"""A conversation in the terminal; an empty line, Ctrl-D or Ctrl-C ends it.

python examples/chat.py [MODEL]
"""

import sys

from octavo import LLM, SamplingParams

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else None, max_model_len=2048)
params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=300)
messages = []
try:
    while text := input("you: ").strip():
        messages.append({"role": "user", "content": text})
        answer = ""
        for chunk in llm.stream(messages, params):
            print(chunk.text, end="", flush=True)
            answer += chunk.text
        print()
        messages.append({"role": "assistant", "content": answer})
except (EOFError, KeyboardInterrupt):  # Ctrl-D, Ctrl-C
    print()
