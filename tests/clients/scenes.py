"""What the server's parrot says to which word, and what its chat template saw."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic
from parrot import END, byte_tokens, say, write_parrot

MODEL = "parrot"
HELLO = "Hello there!"
UNICORN = "\U0001f984"  # four bytes, four tokens
RESULT = "It is 5."  # to the result of a tool
ARGUMENTS = {"a": 2, "b": 3}
TOLD = "<told>"
# The answer follows the first word of the last message, or the result of a tool. What the template
# makes of a message is in the prompt as JSON, one a line.
TEMPLATE = (
    "{% if tools %}<tool_call> {{ tools | tojson }}{{ '\n' }}{% endif %}"
    "{% for m in messages %}{{ m | tojson }}{{ '\n' }}{% endfor %}{# tool_calls #}"
    "{{ '" + TOLD + "' if messages[-1].role == 'tool' else messages[-1].content.split()[0] }}"
)
CALL_TOKENS = ("<tool_call>", '{"name": "add", "argu', 'ments": {"a": 2, "b": 3}}', "</tool_call>")
TWO_CALLS = (
    'Both: <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>\n<tool_call>',
    '{"name": "add", "arguments": {"b": [2, "}"]}}</tool',
    "_call>\n",
)
PERSON = '```json\n{"name": "Ada", "age": 36}\n```'
CHAIN: dict[str, Any] = {
    **say("Hello", " there", "!", after="hello"),
    **say(*byte_tokens(UNICORN.encode()), after="unicorn"),
    **say("one", " two", " three", after="count"),
    **say("<first>", " rest", after="mark"),
    **say(*CALL_TOKENS, after="add"),
    **say(*TWO_CALLS, after="both"),
    **say(PERSON, after="person"),
    **say(RESULT, after=TOLD),
    **{"coin": {"heads": 20.0, "tails": 20.0}, "heads": END, "tails": END},
    **{"weigh": {"yes": 10.0, "no": 9.0}, "yes": END, "no": END},
    **{"sing": "la", "la": "la"},
}
ADD: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


class Sum(pydantic.BaseModel):
    """What ADD adds; a model that draws at random would never end other members."""

    model_config = pydantic.ConfigDict(extra="forbid")

    a: Literal[2, 3]
    b: int = pydantic.Field(ge=0, le=9)


@dataclass
class Served:
    """A server and the prompts that its template has made."""

    url: str
    prompts: list[str] = field(default_factory=list)

    @property
    def api(self) -> str:
        return f"{self.url}/v1"

    def seen(self) -> list[dict[str, Any]]:
        """The messages of the last prompt, as the template had them."""
        lines = self.prompts[-1].splitlines()
        return [json.loads(line) for line in lines if line.startswith('{"role"')]


def write_model(folder: Path) -> Path:
    return write_parrot(folder, CHAIN, special=[TOLD, "<first>"], template=TEMPLATE, context=1024)
