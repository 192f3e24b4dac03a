"""Tools beside a response format: the answer is calls, or it follows the format."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from server_helpers import error_of, events_of, run, serving
from tool_parrot import (
    ADD,
    ANSWER,
    CHAT,
    FORMAT,
    MESSAGES,
    PARAMETERS,
    RESPONSES,
    arguments,
    chat,
    choice_of,
    load,
)

from octavo.llm import LLM
from octavo.server.protocol import ChatBody
from octavo.server.tool_choice import call_mode

pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return load(tmp_path_factory.mktemp("model"))


async def answers_beside(
    client: httpx.AsyncClient, word: str, response_format: Any, **more: Any
) -> list[Any]:
    """The text and the arguments of the calls that each API gives beside a response format."""
    body = chat(word, ADD, response_format=response_format, **more)
    choice = await choice_of(client, body)
    found = [(choice["message"]["content"], arguments(choice))]
    wanted = dict(response_format)
    if "json_schema" in wanted:
        wanted |= wanted.pop("json_schema")
    tool = {"type": "function", **ADD}
    sent = {"input": word, "max_output_tokens": 60, "temperature": 0, "tools": [tool], **more}
    sent["text"] = {"format": wanted}
    items = (await client.post(RESPONSES, json=sent)).json()["output"]
    messages = [item for item in items if item["type"] == "message"]
    texts = [part["text"] for item in messages for part in item["content"]]
    calls = [json.loads(item["arguments"]) for item in items if "arguments" in item]
    found.append(("".join(texts) or None, calls))
    if "schema" in wanted:
        output = {"format": {"type": "json_schema", "schema": wanted["schema"]}}
        tool = {"name": "add", "input_schema": PARAMETERS}
        sent = {"messages": body["messages"], "max_tokens": 60, "temperature": 0, **more}
        sent |= {"tools": [tool], "output_config": output}
        blocks = (await client.post(MESSAGES, json=sent)).json()["content"]
        texts = [block["text"] for block in blocks if "text" in block]
        calls = [block["input"] for block in blocks if "input" in block]
        found.append(("".join(texts) or None, calls))
    return found


@pytest.mark.parametrize(
    "response_format", [FORMAT, {"type": "json_object"}], ids=["schema", "json"]
)
def test_a_call_or_an_answer_of_the_response_format(llm: LLM, response_format: Any) -> None:
    async def test() -> None:
        async with serving(llm) as (client, service):
            for word, expected in (
                ("ask", (None, [{"a": 12}])),
                ("tell", ('{"k": "v"}', [])),
                ("dream", (None, [{"a": 12}])),
            ):
                for found in await answers_beside(client, word, response_format):
                    assert found == expected, word
            # Where nothing tells calls from JSON, a schema's JSON is the answer.
            service.markup = replace(service.markup, tools="llama3_json")
            for found in await answers_beside(client, "tell", response_format):
                assert found == ('{"k": "v"}', [])
            if "json_schema" in response_format:
                choice = await choice_of(client, chat("ask", ADD, response_format=FORMAT))
                assert not arguments(choice)
            # So it is where thoughts stay before it, and with vLLM's own fields.
            service.markup = replace(service.markup, tools="hermes")
            for fields in (
                {"response_format": response_format, "separate_reasoning": False},
                {"guided_json": ANSWER, "max_tokens": 20},
            ):
                choice = await choice_of(client, chat("ask", ADD, **fields))
                assert not arguments(choice)

    run(test)


def test_calls_beside_a_response_format_come_as_they_are_written(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            body = chat("ask", ADD, response_format=FORMAT, stream=True)
            events = events_of((await client.post(CHAT, json=body)).text)
            deltas = [event["choices"][0]["delta"] for event in events]
            assert sum("tool_calls" in delta for delta in deltas) == 3  # name, 12, the end
            # A schema that cannot be met is named, and so is a tool's.
            no = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"enum": []}}}
            body = chat("ask", ADD, response_format=no)
            error = error_of(await client.post(CHAT, json=body), 400)
            assert error["param"] == "response_format" and "structural_tag" not in error["message"]
            wrong = {"name": "f", "parameters": {"minProperties": 2, "maxProperties": 1}}
            body = chat("ask", ADD, wrong, response_format=FORMAT)
            error = error_of(await client.post(CHAT, json=body), 400)
            assert error["param"] == "tools[1].function.parameters"

    run(test)


def test_json_of_llama_3_is_no_call_beside_a_strict_tool() -> None:
    """Which nothing would make follow the schema."""
    for strict, expected in ((True, None), (False, "free")):
        tool = {"type": "function", "function": {**ADD, "strict": strict}}
        sent = {"messages": [], "tools": [tool], "response_format": {"type": "json_object"}}
        assert call_mode(ChatBody.model_validate(sent), "llama3_json") == expected
