"""Anthropic's Messages API in tests: requests, events, and what a client makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
from parrot import GO, write_parrot
from server_helpers import run, serving

from octavo.llm import LLM

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
USER = [{"role": "user", "content": "x"}]
ADD = {
    "name": "add",
    "description": "Add two numbers.",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 10, "maximum": 99}},
        "required": ["a"],
        "additionalProperties": False,
    },
}
# What the template has of a message stands in the prompt as JSON, one a line.
TEMPLATE = (
    "{% if tools %}<tool_call>{{ tools | tojson }}{{ '\n' }}{% endif %}"
    "{% for m in messages %}{{ m | tojson }}{{ '\n' }}{% endfor %}{# tool_calls #}" + GO
)
THINKING = (
    "{# </think> #}{% if enable_thinking is defined %}[{{ enable_thinking }}]{% endif %}"
    "{{ reasoning_effort }}" + TEMPLATE
)


def load(folder: Path, chain: Any, template: str = TEMPLATE, **options: Any) -> LLM:
    """A parrot that is small, and has room for long prompts."""
    written = write_parrot(folder, chain, template=template, **options)
    return LLM(written, num_threads=1, num_kv_blocks=128, max_model_len=1500)


def ask(llm: LLM, *bodies: Any, path: str = MESSAGES, **options: Any) -> list[httpx.Response]:
    """The answers to these bodies, one after another."""
    found = []

    async def session() -> None:
        async with serving(llm, **options) as (client, _):
            for body in bodies:
                base = {"messages": USER, "max_tokens": 100, "temperature": 0}
                found.append(await client.post(path, json={**base, **body}))

    run(session)
    return found


def message_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return dict(response.json())


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each of which is named twice."""
    parts = text.split("\n\n")
    assert parts.pop() == ""
    events = []
    for part in parts:
        name, data = part.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}" and data.startswith("data: ")
    return events


def put_together(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The message of a stream, whose order is checked."""
    first, *others = events
    assert first["type"] == "message_start"
    message: dict[str, Any] = first["message"]
    assert message["content"] == [] and message["stop_reason"] is None
    *others, delta, stop = others
    kind, text = "", ""
    for event in others:
        index = len(message["content"]) - 1
        if event["type"] == "content_block_start":
            assert not kind and event["index"] == index + 1
            message["content"].append(dict(event["content_block"]))
            kind, text = event["content_block"]["type"], ""
            continue
        assert kind and event["index"] == index
        block = message["content"][-1]
        if event["type"] == "content_block_stop":
            if kind == "tool_use":
                assert block["input"] == {}
                block["input"] = json.loads(text)
            kind = ""
            continue
        assert event["type"] == "content_block_delta"
        change = dict(event["delta"])
        change_kind = change.pop("type")
        expected = {"text": ["text_delta"], "tool_use": ["input_json_delta"]}
        assert change_kind in expected.get(kind, ["thinking_delta", "signature_delta"])
        ((name, value),) = change.items()
        assert value or name == "signature"
        text += value
        if kind != "tool_use":
            block[name] += value
    assert not kind
    assert delta["type"] == "message_delta" and stop == {"type": "message_stop"}
    return {**message, **delta["delta"], "usage": delta["usage"]}


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message without what differs from answer to answer."""
    content = [{n: v for n, v in block.items() if n != "id"} for block in message["content"]]
    return {**message, "id": "", "usage": message["usage"]["output_tokens"], "content": content}


def ask_both(llm: LLM, **body: Any) -> dict[str, Any]:
    """The message, which is the same whole and streamed."""
    whole, stream = ask(llm, body, {**body, "stream": True})
    assert stream.status_code == 200, stream.text
    message = message_of(whole)
    assert plain(put_together(events_of(stream.text))) == plain(message)
    return message


def error_of(response: httpx.Response, status: int, kind: str) -> str:
    """The message of an error in Anthropic's form."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
    assert set(body["error"]) == {"type", "message"} and body["error"]["type"] == kind
    assert body["request_id"] == response.headers["request-id"]
    return str(body["error"]["message"])
