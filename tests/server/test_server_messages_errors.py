"""Anthropic's Messages API: what is refused, and errors in the form that its clients expect."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_runtime import NAN_TOKEN
from message_helpers import (
    ADD,
    COUNT,
    MESSAGES,
    TEMPLATE,
    THINKING,
    USER,
    ask,
    error_of,
    events_of,
    load,
    message_of,
)
from parrot import say
from server_helpers import error_of as openai_error_of
from server_helpers import fake_llm, run, serving, slow_down

from octavo.llm import LLM
from octavo.server.app import create_app
from octavo.server.options import ServerOptions
from octavo.server.service import Service

LONG = {"messages": USER, "max_tokens": 400, "ignore_eos": True, "temperature": 0}
BAD = "invalid_request_error"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return load(tmp_path_factory.mktemp("parrot"), say("Hello"), THINKING)


def talk(*blocks: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [*USER, {"role": role, "content": list(blocks)}, *USER]}


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}
RESULT = {"type": "tool_result", "tool_use_id": "1"}
ANSWER = {"role": "assistant", "content": "So"}
OLD_SCHEMA = {"output_format": {"type": "json_schema", "schema": {"type": "object"}}}
SCHEMA = {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}}
WRONG: list[tuple[dict[str, Any], str]] = [
    # fields, the message's beginning
    ({"max_tokens": None}, "max_tokens: Field required"),
    ({"max_tokens": 0}, "max_tokens: "),
    ({"max_tokens": "many"}, "max_tokens: "),
    ({"messages": None}, "messages: Field required"),
    ({"messages": []}, "messages: "),
    ({"messages": "x"}, "messages: "),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: "),
    ({"messages": [{"role": "user"}]}, "messages[0].content: Field required"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content is empty"),
    ({"messages": [ANSWER]}, "messages is the beginning of an answer alone"),
    (talk(IMAGE), "messages[1].content[0] is of type 'image'"),
    (talk({"type": "document"}), "messages[1].content[0] is of type 'document'"),
    (talk({"type": "text"}), "messages[1].content[0].text is missing"),
    (talk({"type": "text", "text": 5}), "messages[1].content[0].text is of type int"),
    (talk({"text": "x"}), "messages[1].content[0] is of type None"),
    (talk({"type": "tool_use"}), "messages[1].content[0] is of type 'tool_use'"),
    (talk({**RESULT, "tool_use_id": ""}), "messages[1].content[0].tool_use_id is empty"),
    (talk({**RESULT, "content": [IMAGE]}), "messages[1].content[0].content[0] is of type"),
    (talk({**RESULT, "content": 5}), "messages[1].content[0].content is malformed"),
    (talk({**RESULT, "content": ["x"]}), "messages[1].content[0].content is malformed"),
    (talk(IMAGE, role="assistant"), "messages[1].content[0] is of type 'image'"),
    (talk(RESULT, role="assistant"), "messages[1].content[0] is of type 'tool_result'"),
    (talk({"type": "thinking"}, role="assistant"), "messages[1].content[0].thinking is missing"),
    (
        talk({"type": "tool_use", "id": "1", "name": "f", "input": "{}"}, role="assistant"),
        "messages[1].content[0].input is of type str",
    ),
    (talk({"type": "tool_use", "id": "1"}, role="assistant"), "messages[1].content[0].name is"),
    (talk({"type": "server_tool_use"}, role="assistant"), "messages[1].content[0] is of type"),
    (talk(IMAGE, role="system"), "messages[1].content[0] is of type 'image'"),
    ({"system": [IMAGE]}, "system[0] is of type 'image'"),
    ({"system": 5}, "system: "),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema is missing"),
    ({"tools": [ADD, {**ADD, "name": ""}]}, "tools[1].name is empty"),
    (
        {"tools": [ADD, {"type": "web_search_20250305", "name": "web_search"}]},
        "tools[1] is of type 'web_search_20250305'",
    ),
    ({"tool_choice": {"type": "any"}}, "tool_choice is of type 'any', but there are no tools"),
    (
        {"tools": [ADD], "tool_choice": {"type": "tool", "name": "sub"}},
        "tool_choice.name is 'sub'; expected the name of a tool (['add'])",
    ),
    ({"tools": [ADD], "tool_choice": {"type": "tool"}}, "tool_choice.name is None"),
    ({"tools": [ADD], "tool_choice": "auto"}, "tool_choice: "),
    ({"tools": [ADD], "tool_choice": {"type": "required"}}, "tool_choice.type: "),
    ({"thinking": {"type": "between_tools"}}, "thinking.type: "),
    ({"thinking": True}, "thinking: "),
    (
        {"thinking": {"type": "enabled"}, "chat_template_kwargs": {"enable_thinking": False}},
        "thinking is given beside chat_template_kwargs.enable_thinking",
    ),
    ({"temperature": -1}, "temperature: "),
    ({"top_p": 2}, "top_p: "),
    ({"stop_sequences": "x"}, "stop_sequences: "),
    ({"stop_sequences": ["x"] * 33}, "stop_sequences: "),
    ({"stop": ["x"]}, "stop is not offered by octavo: its name here is stop_sequences"),
    ({"stop_sequence": ["x"]}, "stop_sequence is not offered"),
    ({"max_completion_tokens": 5}, "max_completion_tokens is not offered by octavo: it is a field"),
    (
        {"logprobs": True},
        "logprobs is not offered by octavo: it is a field of /v1/chat",
    ),
    ({"n": 2}, "n is 2, but a message is one answer"),
    ({"prompt_logprobs": 1}, "prompt_logprobs is given"),
    ({"mirostat": 2}, "mirostat is not offered"),
    ({"container": "c"}, "container is not offered"),
    ({"mcp_servers": [{"url": "u"}]}, "mcp_servers is not offered"),
    ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type: "),
    (
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "no"}}}},
        "output_config.format",
    ),
    ({**SCHEMA, "response_format": {"type": "json_object"}}, "output_config.format is given"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls is not offered here"),
    ({**SCHEMA, **OLD_SCHEMA}, "output_config.format is given beside output_format"),
    ({**OLD_SCHEMA, "guided_regex": "a"}, "output_format is given beside guided_regex"),
    ({**OLD_SCHEMA, "messages": [*USER, ANSWER]}, "output_format says what the whole"),
    ({**SCHEMA, "guided_regex": "a"}, "output_config.format is given beside guided_regex"),
    ({**SCHEMA, "messages": [*USER, ANSWER]}, "output_config.format says what the whole"),
    (
        {"messages": [*USER, ANSWER], "tools": [ADD], "tool_choice": {"type": "any"}},
        "tool_choice says what the whole answer is",
    ),
    (
        {"messages": [*USER, {"role": "assistant", "content": [{"type": "thinking"}]}]},
        "messages[1].content[0] is of type 'thinking', which octavo does not take to continue",
    ),
    (
        {"messages": [{"role": "user", "content": "long " * 400}]},
        "messages: the prompt is too long",
    ),
    ({"chat_template": "{% if %}"}, "chat_template is malformed"),
]


@pytest.fixture(scope="module")
def refusals(llm: LLM) -> list[httpx.Response]:
    """All of WRONG through one server."""
    return ask(llm, *(fields for fields, _ in WRONG))


@pytest.mark.parametrize("index", range(len(WRONG)))
def test_what_is_refused(refusals: list[httpx.Response], index: int) -> None:
    message = error_of(refusals[index], 400, BAD)
    assert message.startswith(WRONG[index][1]), message


def test_a_schema_of_a_tool_that_is_none(llm: LLM) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")
    tools = [ADD, {**ADD, "name": "sub", "input_schema": {"type": "no"}}]
    (response,) = ask(llm, {"tools": tools, "tool_choice": {"type": "any"}})
    assert error_of(response, 400, BAD).startswith("tools[1].input_schema")


def test_counting_refuses_the_same(llm: LLM) -> None:
    fields: list[dict[str, Any]] = [talk(IMAGE), {"container": "c"}, {"documents": [{"a": 1}]}]
    for response in ask(llm, *fields, {"messages": None}, path=COUNT):
        error_of(response, 400, BAD)


def test_a_template_that_begins_with_thinking(tmp_path: Path) -> None:
    llm = load(tmp_path, say("Hello"), f"{TEMPLATE}<think>{{# </think> #}}")
    (response,) = ask(llm, {"messages": [*USER, ANSWER]})
    assert "begins with what the model thinks" in error_of(response, 400, BAD)


def test_a_model_without_tools(tmp_path: Path) -> None:
    llm = load(tmp_path, say("Hello"), "{{ messages[0].content }}<go>")
    (response,) = ask(llm, {"tools": [ADD]})
    assert error_of(response, 400, BAD).startswith("tools is given, but this model's chat template")


def test_errors_before_a_route(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm, max_body_bytes=200) as (client, _):
            for path in (MESSAGES, COUNT):
                sent = json.dumps(LONG)
                found = await client.post(path, content=sent, headers={"content-type": "text/x"})
                assert "text/x" in error_of(found, 415, BAD)
                found = await client.post(path, json={**LONG, "system": "x" * 200})
                assert "--max-body-bytes" in error_of(found, 413, "request_too_large")
                error_of(await client.get(path), 405, BAD)
                headers = {"content-type": "application/json", "x-request-id": "mine"}
                found = await client.post(path, content="{", headers=headers)
                assert "the body is no JSON" in error_of(found, 400, BAD)
                assert found.json()["request_id"] == "mine"
                found = await client.post(path, content='{"a": "\\ud800"}', headers=headers)
                assert "surrogate" in error_of(found, 400, BAD)
                found = await client.post(path, json={**LONG, "model": "claude"})
                assert "'claude'" in error_of(found, 404, "not_found_error")
            error_of(await client.post(f"{MESSAGES}/batches", json={}), 404, "not_found_error")
            openai_error_of(await client.post("/v1/messagesx", json={}), 404)
            assert "request-id" not in (await client.get("/v1/models")).headers

    run(test)


def test_keys(llm: LLM) -> None:
    """Either header, on every route; each key is looked for in both."""

    async def test() -> None:
        async with serving(llm, api_keys=("secret", "other")) as (client, _):
            body = {"messages": USER, "max_tokens": 1}
            wrong = [{}, {"x-api-key": ""}, {"x-api-key": "secre"}, {"x-api-key": "Bearer secret"}]
            wrong.append({"x-api-key": "sécret"})
            wrong.append({"authorization": "secret", "x-api-key": "secret2"})
            for headers in wrong:
                sent = {name: value.encode("latin-1") for name, value in headers.items()}
                for path in (MESSAGES, COUNT):
                    found = await client.post(path, json=body, headers=sent)
                    message = error_of(found, 401, "authentication_error")
                    assert "X-Api-Key" in message and "secret" not in message
                found = await client.post("/v1/chat/completions", json=body, headers=sent)
                openai_error_of(found, 401)
            right = [{"x-api-key": "secret"}, {"x-api-key": "other"}]
            right += [{"authorization": "Bearer other"}, {"authorization": "Bearer other"}]
            right.append({"authorization": "Bearer wrong", "x-api-key": "secret"})
            right.append({"authorization": "Bearer secret", "x-api-key": "wrong"})
            for headers in right:
                for path in (MESSAGES, COUNT, "/v1/chat/completions"):
                    assert (await client.post(path, json=body, headers=headers)).status_code == 200
                assert (await client.get("/v1/models", headers=headers)).status_code == 200

    run(test)


def test_a_full_queue(tmp_path: Path) -> None:
    llm = fake_llm(tmp_path, max_waiting_requests=1, max_num_seqs=1)

    async def test() -> None:
        slow_down(llm, 0.003)
        async with serving(llm) as (client, _):
            bodies = [{**LONG, "max_tokens": 60, "stream": i % 2 == 1} for i in range(6)]
            responses = await asyncio.gather(*(client.post(MESSAGES, json=b) for b in bodies))
            refused = [r for r in responses if r.status_code != 200]
            assert len(refused) >= 3
            for response in refused:
                error_of(response, 429, "rate_limit_error")
                assert int(response.headers["retry-after"]) >= 1

    run(test)


def test_deadlines(tmp_path: Path) -> None:
    llm = fake_llm(tmp_path)

    async def test() -> None:
        slow_down(llm, 0.005)
        async with serving(llm) as (client, _):
            late = {**LONG, "timeout": 0.15}
            error_of(await client.post(MESSAGES, json=late), 504, "timeout_error")
            response = await client.post(MESSAGES, json={**late, "stream": True})
            *begun, last = events_of(response.text)
            kinds = [event["type"] for event in begun]
            assert kinds[:2] == ["message_start", "content_block_start"] and len(kinds) > 3
            assert "message_stop" not in kinds and last["type"] == "error"
            assert last["error"]["type"] == "timeout_error"
            assert last["request_id"] == response.headers["request-id"]

    run(test)


def test_a_server_that_loads_and_one_that_ends(tmp_path: Path) -> None:
    llm = fake_llm(tmp_path)
    slow_down(llm, 0.01)
    go = threading.Event()

    def load_late() -> LLM:
        go.wait(20)
        return llm

    async def test() -> None:
        service = Service(ServerOptions(), load_late)
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            starting = asyncio.ensure_future(service.start())
            await asyncio.sleep(0.05)
            for path in (MESSAGES, COUNT):
                response = await client.post(path, json=LONG)
                error_of(response, 503, "overloaded_error")
                assert int(response.headers["retry-after"]) >= 1
            go.set()
            await starting
            sent = client.post(MESSAGES, json={**LONG, "stream": True})
            running = asyncio.ensure_future(sent)
            while await service.engine.call(lambda m: m.engine.num_steps) < 5:
                await asyncio.sleep(0.01)
            service.abort_all()
            last = events_of((await running).text)[-1]
            assert (last["type"], last["error"]["type"]) == ("error", "overloaded_error")
            await service.engine.stop()

    run(test)


def test_a_nan_ends_its_request(tmp_path: Path) -> None:
    template = "{{ messages[0].content }}"
    llm = fake_llm(tmp_path, template)
    bad = llm.tokenizer.decode([NAN_TOKEN], False) if llm.tokenizer else ""

    async def test() -> None:
        async with serving(llm) as (client, _):
            for stream in (False, True):
                talk = [{"role": "user", "content": f"A{bad}"}]
                response = await client.post(
                    MESSAGES, json={**LONG, "messages": talk, "stream": stream}
                )
                assert "NaN" in error_of(response, 500, "api_error")
            fine = await client.post(MESSAGES, json={**LONG, "max_tokens": 3})
            assert message_of(fine)["usage"]["output_tokens"] == 3

    run(test)
