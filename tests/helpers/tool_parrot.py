"""A model that calls a tool as no schema allows, unless it is made to, and requests to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
from parrot import END, say, write_parrot
from server_helpers import events_of

from octavo.llm import LLM

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
TEMPLATE = (
    "{% if tools %}{# <tool_call> #}{{ tools | tojson }}{% endif %}{# <think></think> #}"
    "{{ messages[-1].content }}"
)
HEAD, BAD, GOOD, TAIL = (
    '<tool_call>\n{"name": "add", "arguments": ',
    '{"a": "x"}}\n</tool_call>',
    '{"a": 12',
    "}}\n</tool_call>",
)
# What the model would rather say breaks the schema.
ASK: dict[str, Any] = {
    "ask": HEAD,
    HEAD: {BAD: 20, GOOD: 10},
    BAD: END,
    GOOD: {"nonsense": 20, TAIL: 10},
    TAIL: END,
    "nonsense": END,
}
AGAIN = '\n<tool_call>{"name":"add","arguments":{"a":34}}</tool_call>'
PLAIN = ("Well, ", "a < b: <tool_", " [TOOL_CA", "lls] ", '{"a": 1} </', "think> é.")
VEILED = ("<hidden>", "~Well: ", "[f(a=1)] <tool_ ", "<veil>", "call> <|tool_call")
CHAIN: dict[str, Any] = {
    **ASK,
    **say(*PLAIN, after="plain"),
    **say(*VEILED, after="veiled"),
    **say("<think>", "Hm <tool_call>{", "}</think>", "Yes", after="muse"),
    **say('{"k": "v"', "}", after="tell"),
    **{"often": {"Both: ": 20}, "Both: ": HEAD + GOOD + TAIL, HEAD + GOOD + TAIL: AGAIN},
    **{AGAIN: {" So.": 20}, " So.": END},
    **{"dream": "<think>~", "<think>~": "Hm <tool_call>", "Hm <tool_call>": "</think>\n"},
    **{"</think>\n": HEAD},
}
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 10, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}
ADD = {"name": "add", "parameters": PARAMETERS}
ANSWER = {"type": "object", "properties": {"k": {"type": "string"}}, "required": ["k"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": ANSWER}}


def load(folder: Path) -> LLM:
    """Its answers are those that `CHAIN` has for the last word of the request."""
    written = write_parrot(folder, CHAIN, template=TEMPLATE, special=["<hidden>", "<veil>"])
    return LLM(written, num_threads=1, num_kv_blocks=128, max_model_len=900)


def chat(word: str, *functions: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A body with these tools."""
    tools = [{"type": "function", "function": each} for each in functions]
    messages = [{"role": "user", "content": word}]
    return {"messages": messages, "tools": tools, "temperature": 0, "max_tokens": 60, **more}


async def choice_of(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """The one choice, of which a stream says the same."""
    response = await client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    message = choice["message"]
    streamed = events_of((await client.post(CHAT, json={**body, "stream": True})).text)
    content, calls = "", list[dict[str, str]]()
    for event in streamed:
        delta = event["choices"][0]["delta"]
        content += delta.get("content") or ""
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                calls.append({"name": call["function"]["name"], "arguments": ""})
            calls[-1]["arguments"] += call["function"]["arguments"]
    assert calls == [call["function"] for call in message.get("tool_calls", ())]
    assert content.strip() == (message["content"] or "").strip()
    assert streamed[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    return dict(choice)


def arguments(choice: dict[str, Any]) -> list[Any]:
    """Of its calls."""
    return [json.loads(c["function"]["arguments"]) for c in choice["message"].get("tool_calls", ())]
