"""Facts from texts, as JSON that follows a schema: every answer can be parsed.

python examples/batch_with_schema.py [MODEL]
"""

import json
import sys

from octavo import LLM, SamplingParams

TEXTS = [
    "Ada Lovelace, born in London in 1815, wrote the first program.",
    "Grace Hopper was born in New York City in 1906.",
    "Konrad Zuse, who built the Z3, was born in Berlin in 1910.",
]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "city": {"type": "string", "maxLength": 40},
        "born": {"type": "integer", "minimum": 1000, "maximum": 2100},
    },
    "required": ["name", "city", "born"],
    "additionalProperties": False,
}

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else None, max_model_len=1024)
params = SamplingParams(temperature=0, max_tokens=120, structured_outputs={"json": SCHEMA})
conversations = [
    [
        {
            "role": "user",
            "content": f"Who is this about? Answer in JSON with name, city, born.\n{text}",
        }
    ]
    for text in TEXTS
]
for text, output in zip(TEXTS, llm.chat(conversations, params, progress=False), strict=True):
    print(text, "->", json.loads(output.text))
