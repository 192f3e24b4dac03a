"""Answers of /v1/responses: the events of a stream, and the response that they tell of."""

from __future__ import annotations

import json
from typing import Any

import httpx
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from server_helpers import run, serving

from octavo.llm import LLM

RESPONSES = "/v1/responses"
DELTAS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}
_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def ask_responses(llm: LLM, *bodies: dict[str, Any]) -> list[httpx.Response]:
    """The answers to these bodies, one after another."""
    found = []

    async def session() -> None:
        async with serving(llm) as (client, _):
            for body in bodies:
                found.append(await client.post(RESPONSES, json={"temperature": 0, **body}))

    run(session)
    return found


def response_events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each of which openai's types must take, counted from 0."""
    *parts, rest = text.split("\n\n")
    assert rest == ""
    found = []
    for number, part in enumerate(parts):
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}" and event["sequence_number"] == number
        _EVENT.validate_python(event)
        found.append(event)
    return found


def told(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The response of a stream's last event; the events before it must say the same, in order."""
    created, in_progress, *body, last = events
    assert [created["type"], in_progress["type"]] == ["response.created", "response.in_progress"]
    for event in (created, in_progress):
        assert event["response"]["status"] == "in_progress" and event["response"]["output"] == []
    response: dict[str, Any] = last["response"]
    assert last["type"] == f"response.{response['status']}"
    place = 0
    for index, item in enumerate(response["output"]):
        place = _check_item(body, place, index, item)
    assert place == len(body), body[place:]
    Response.model_validate(response, strict=True)
    return response


def _check_item(body: list[dict[str, Any]], place: int, index: int, item: dict[str, Any]) -> int:
    """Check the events of one item, and return the place behind them."""
    has_part = item["type"] != "function_call"
    text = item["content"][0]["text"] if has_part else item["arguments"]
    where = {"item_id": item["id"], "output_index": index}
    where |= {"content_index": 0} if has_part else {}
    empty = {
        **item,
        "status": "in_progress",
        **({"content": []} if has_part else {"arguments": ""}),
    }
    added = {"type": "response.output_item.added", "output_index": index, "item": empty}
    assert _without_number(body[place]) == added
    place += 1
    if has_part:
        part = {**item["content"][0], "text": ""}
        part |= {"logprobs": []} if "logprobs" in part else {}
        assert _without_number(body[place]) == {
            **{"type": "response.content_part.added", **where},
            "part": part,
        }
        place += 1
    shown, logprobs, name = "", [], DELTAS[item["type"]]
    while body[place]["type"] == f"{name}.delta":
        assert where.items() <= body[place].items()
        shown += body[place]["delta"]
        logprobs += body[place].get("logprobs", [])
        place += 1
    assert shown == text
    done: dict[str, Any] = {"type": f"{name}.done", **where}
    if not has_part:
        done |= {"name": item["name"], "arguments": text}
    else:
        done |= {"text": text}
        if item["type"] == "message":
            assert logprobs == item["content"][0]["logprobs"]
            done |= {"logprobs": logprobs}
    ends = [done]
    if has_part:
        ends.append({"type": "response.content_part.done", **where, "part": item["content"][0]})
    ends.append({"type": "response.output_item.done", "output_index": index, "item": item})
    assert [_without_number(event) for event in body[place : place + len(ends)]] == ends
    return place + len(ends)


def _without_number(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name != "sequence_number"}


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    """What two responses to one request have in common; the second's prompt is in the cache."""
    names = ("id", "call_id", "created_at", "completed_at")
    found = {name: value for name, value in response.items() if name not in names}
    found["output"] = [
        {k: v for k, v in item.items() if k not in names} for item in found["output"]
    ]
    usage = found["usage"]
    return {**found, "usage": {k: v for k, v in usage.items() if k != "input_tokens_details"}}


def shown(response: dict[str, Any]) -> list[tuple[str, str]]:
    """The items of a response: their types and texts, of a call its name and arguments."""
    found = []
    for item in response["output"]:
        if item["type"] == "function_call":
            found.append((f"call {item['name']}", item["arguments"]))
        else:
            found.append((item["type"], "".join(part["text"] for part in item["content"])))
    return found
