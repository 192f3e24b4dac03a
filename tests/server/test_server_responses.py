"""OpenAI's Responses API: items whole and streamed, tools, thinking, schemas, what is refused."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types.responses import Response
from parrot import END, GO, byte_tokens, say, write_parrot
from response_helpers import RESPONSES, response_events, shown, told, without_ids
from response_helpers import ask_responses as ask
from server_helpers import (
    RawClient,
    error_of,
    fake_llm,
    run,
    runtime_of,
    serving,
    slow_down,
)

from octavo.llm import LLM

TEMPLATE = (
    "{# <think></think> #}{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ m | tojson }}{% endfor %}{{ messages[-1].content.split()[0] }}"
)
CALL = '{"name": "add", "arguments": {"a": 1}}'
CALLS = ("<tool_call>", CALL, "</tool_call>\n<tool_call>", '{"name": "now"}', "</tool_call>")
UNICORN = "\U0001f984!"
THOUGHT = f"<think>\nwell then</think>\n\n{UNICORN}"
PERSON = '{"name": "Ada"}'
CHAIN: dict[str, Any] = {
    **say("Hello", " there", after="hello"),
    **say(*CALLS, after="both"),
    **say("Well: ", "<tool_call>" + CALL, "\n</tool_call>", " and so", after="mixed"),
    **say(
        "<think>",
        "\nwell",
        " then",
        "</think>",
        "\n\n",
        *byte_tokens(UNICORN.encode()),
        after="think",
    ),
    **say(
        "<think>!",
        "ponder",
        "</think>?",
        "\n<tool_call>" + CALL + " ",
        "</tool_call>.",
        after="act",
    ),
    **say(
        "<tool_call>\n",
        '{"name": "add", "arguments": ',
        '{"a": 2}',
        "}\n</tool_call>",
        after="must",
    ),
    **say("\n", "<tool_call>  " + CALL, " </tool_call>", " \n\n", after="bare"),
    **say(PERSON, after="person"),
    **say(" \n", after="space"),
    **{"nothing": END, "sing": "la", "la": "la", "muse": "<think>~", "<think>~": "x", "x": "x"},
}
TOOLS = [
    {
        "type": "function",
        "name": "add",
        "description": "Add.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
    {"type": "function", "name": "now", "parameters": {}},
]
LOGPROBS = {"include": ["message.output_text.logprobs"]}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}},
    "required": ["name"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "name": "person", "schema": SCHEMA, "strict": True}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("parrot")
    write_parrot(folder, CHAIN, template=TEMPLATE)
    return LLM(folder, num_threads=1, num_kv_blocks=64, max_model_len=900)


def both(llm: LLM, **body: Any) -> dict[str, Any]:
    """The whole answer; the streamed one must be the same."""
    whole, stream = ask(llm, body, {**body, "stream": True})
    assert whole.status_code == 200, whole.text
    assert stream.headers["content-type"].startswith("text/event-stream")
    response: dict[str, Any] = whole.json()
    Response.model_validate(response, strict=True)
    assert without_ids(told(response_events(stream.text))) == without_ids(response)
    return response


def test_a_text(llm: LLM) -> None:
    body = {"input": "hello", "instructions": "Be kind.", "metadata": {"a": "b"}, "user": "u"}
    response = both(llm, model="model", top_p=0.5, max_output_tokens=9, store=True, **body)
    assert re.fullmatch("resp_[-_a-z0-9]+", response["id"])
    assert (response["object"], response["status"]) == ("response", "completed")
    assert response["error"] is None and response["incomplete_details"] is None
    assert response["completed_at"] >= response["created_at"]
    (item,) = response["output"]
    part = {"type": "output_text", "text": "Hello there", "annotations": [], "logprobs": []}
    assert item.pop("id").startswith("msg_")
    message = {"type": "message", "role": "assistant", "status": "completed", "content": [part]}
    assert item == message
    echo = {"instructions": "Be kind.", "metadata": {"a": "b"}, "user": "u", "model": "model"}
    echo |= {"temperature": 0, "top_p": 0.5, "max_output_tokens": 9, "store": False}
    echo |= {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
    echo |= {"text": {"format": {"type": "text"}, "verbosity": "medium"}}
    assert echo.items() <= response.items()
    usage = response["usage"]
    assert usage["output_tokens"] == 3  # two words and the end
    assert usage["total_tokens"] == usage["input_tokens"] + 3
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}


# input, more fields, the items of the answer
ANSWERS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "hello": ({}, [("message", "Hello there")]),
    "both": ({"tools": TOOLS}, [("call add", '{"a": 1}'), ("call now", "{}")]),
    "both one": ({"tools": TOOLS, "parallel_tool_calls": False}, [("call add", '{"a": 1}')]),
    "both none": ({"tools": TOOLS, "tool_choice": "none"}, [("message", "".join(CALLS))]),
    "mixed": (
        {"tools": TOOLS},
        [("message", "Well: "), ("call add", '{"a": 1}'), ("message", " and so")],
    ),
    "bare": ({"tools": TOOLS}, [("call add", '{"a": 1}')]),
    "think": ({}, [("reasoning", "well then"), ("message", UNICORN)]),
    "think not": ({"include_reasoning": False}, [("message", UNICORN)]),
    "think with it": ({"separate_reasoning": False}, [("message", THOUGHT)]),
    "think aloud": ({"reasoning_format": "none"}, [("message", THOUGHT)]),
    "act": (
        {"tools": TOOLS},
        [("reasoning", "!ponder"), ("message", "?\n"), ("call add", '{"a": 1}'), ("message", ".")],
    ),
    "person": ({"text": {"format": FORMAT}}, [("message", PERSON)]),
    "person any": ({"text": {"format": {"type": "json_object"}}}, [("message", PERSON)]),
    "space": ({}, [("message", " \n")]),
    "nothing": ({}, [("message", "")]),
}


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("word", ANSWERS)
def test_what_is_streamed_is_what_comes_whole(llm: LLM, word: str, logprobs: bool) -> None:
    fields, items = ANSWERS[word]
    response = both(llm, input=word, **fields, **(LOGPROBS if logprobs else {}))
    assert shown(response) == items and response["status"] == "completed"
    for item in response["output"]:
        assert item["status"] == "completed"
        if item["type"] == "function_call":
            assert item["id"].startswith("fc_") and item["call_id"].startswith("call_")
        if item["type"] == "message":  # the bytes of its tokens are its text, and no more
            tokens = item["content"][0]["logprobs"]
            data = bytes(byte for token in tokens for byte in token["bytes"])
            text = item["content"][0]["text"]
            assert bool(tokens) == logprobs
            if logprobs and word != "act":  # there tokens are of two parts
                assert data.decode() == text


@pytest.mark.parametrize(
    ("choice", "call"),
    [
        ("required", ("call add", '{"a": 2}')),
        ({"type": "function", "name": "add"}, ("call add", '{"a": 2}')),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"name": "add"}]},
            ("call add", '{"a": 2}'),
        ),
    ],
)
def test_a_tool_that_must_be_called(llm: LLM, choice: Any, call: tuple[str, str]) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")
    response = both(
        llm, input="must", tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, **LOGPROBS
    )
    assert shown(response) == [call]
    assert response["tool_choice"] == choice and response["tools"] == TOOLS


def test_allowed_tools_are_those_the_model_is_told_of(llm: LLM) -> None:
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [TOOLS[1]]}
    bodies = ({"input": "hello", "tools": TOOLS[1:]}, {"input": "hello", "tools": TOOLS})
    few, all_of_them, chosen = ask(llm, *bodies, {**bodies[1], "tool_choice": allowed})
    numbers = [each.json()["usage"]["input_tokens"] for each in (few, all_of_them, chosen)]
    assert numbers[0] == numbers[2] < numbers[1]


def test_tokens_of_the_thinking_are_counted(llm: LLM) -> None:
    usage = both(llm, input="think")["usage"]
    assert usage["output_tokens_details"]["reasoning_tokens"] == 4
    assert usage["output_tokens"] == 4 + 1 + len(UNICORN.encode()) + 1
    hidden = both(llm, input="think not", include_reasoning=False)["usage"]
    assert hidden["output_tokens_details"]["reasoning_tokens"] == 4
    assert both(llm, input="hello")["usage"]["output_tokens_details"]["reasoning_tokens"] == 0
    cut = both(llm, input="muse", max_output_tokens=6)
    assert cut["usage"]["output_tokens_details"]["reasoning_tokens"] == 6


def test_cached_tokens_are_told(llm: LLM) -> None:
    words = "hello you " * 40
    first, second = ask(llm, {"input": words}, {"input": words})
    assert first.json()["usage"]["input_tokens_details"]["cached_tokens"] < 64
    assert second.json()["usage"]["input_tokens_details"]["cached_tokens"] > 100


@pytest.mark.parametrize(
    ("word", "kind", "text"), [("sing", "message", "la" * 5), ("muse", "reasoning", "~xxxx")]
)
def test_an_answer_that_is_cut_off_is_incomplete(llm: LLM, word: str, kind: str, text: str) -> None:
    response = both(llm, input=word, max_output_tokens=5)
    assert response["status"] == "incomplete" and response["completed_at"] is None
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert shown(response) == [(kind, text)]
    assert response["output"][0]["status"] == "incomplete"


def test_forced_arguments_come_as_they_are_written(llm: LLM) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")
    body = {"input": "must", "tools": TOOLS, "tool_choice": "required", "max_output_tokens": 3}
    response = both(llm, **body)
    assert shown(response) == [("call add", '{"a": 2}')]
    assert response["output"][0]["status"] == "incomplete"


def test_log_probabilities_are_those_of_a_chat(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            body = {"temperature": 0, "top_logprobs": 2}
            messages = [{"role": "user", "content": "hello"}]
            chat = {**body, "messages": messages, "logprobs": True}
            found = (await client.post("/v1/chat/completions", json=chat)).json()
            response = await client.post(RESPONSES, json={**body, "input": "hello", **LOGPROBS})
            expected = found["choices"][0]["logprobs"]["content"]
            assert len(expected) == 3 and len(expected[0]["top_logprobs"]) == 2
            assert response.json()["output"][0]["content"][0]["logprobs"] == expected

    run(test)


def test_each_delta_has_the_tokens_of_its_text(llm: LLM) -> None:
    """Also where a stop string holds text back."""
    (stream,) = ask(llm, {"input": "think", "stream": True, "stop": ["\N{BUG}"], **LOGPROBS})
    deltas = [e for e in response_events(stream.text) if e["type"].endswith("output_text.delta")]
    found = [
        (event["delta"], bytes(b for token in event["logprobs"] for b in token["bytes"]).decode())
        for event in deltas
    ]
    assert found == [("\U0001f984", "\U0001f984"), ("!", "!"), ("", "")]


def test_a_text_that_a_stop_string_ends(llm: LLM) -> None:
    response = both(llm, input="hello", stop=" th", **LOGPROBS)
    assert shown(response) == [("message", "Hello")]
    tokens = response["output"][0]["content"][0]["logprobs"]
    assert [token["token"] for token in tokens] == ["Hello", " there"]


def test_effort_reaches_the_template(tmp_path: Path) -> None:
    template = "{{ reasoning_effort or 'none' }}{{ thinking or '' }}" + GO
    llm = LLM(write_parrot(tmp_path, say("yes"), template=template), num_threads=1)
    bodies = [{"reasoning": {"effort": "high!"}}, {}, {"chat_template_kwargs": {"thinking": "ab"}}]
    found = ask(llm, *({"input": "x", **body} for body in bodies))
    assert [each.json()["usage"]["input_tokens"] for each in found] == [6, 5, 7]


async def fail(client: httpx.AsyncClient, llm: LLM, *, stream: bool, after: float) -> Any:
    body = {"input": "A", "max_output_tokens": 400, "ignore_eos": True, "temperature": 0}
    posted = asyncio.ensure_future(client.post(RESPONSES, json={**body, "stream": stream}))
    await asyncio.sleep(after)
    runtime_of(llm).fail_next = RuntimeError("a planted fault")
    return await posted


def test_a_step_that_fails(tmp_path: Path) -> None:
    llm = fake_llm(tmp_path)

    async def test() -> None:
        slow_down(llm, 0.005)
        async with serving(llm) as (client, _):
            whole = await fail(client, llm, stream=False, after=0.1)
            assert error_of(whole, 500)["code"] == "engine_step_failed"
            stream = await fail(client, llm, stream=True, after=0.1)
            *before, error, last = response_events(stream.text)
            assert error["type"] == "error" and error["code"] == "engine_step_failed"
            assert "a planted fault" in error["message"]
            assert last["type"] == "response.failed"
            response = last["response"]
            assert response["status"] == "failed" and response["usage"] is None
            assert response["error"]["code"] == "server_error"
            assert "a planted fault" in response["error"]["message"]
            text = "".join(event.get("delta", "") for event in before)
            assert text and shown(response) == [("message", text)]
            assert response["output"][0]["status"] == "incomplete"

    run(test)


def test_an_error_before_the_first_token_of_a_stream_has_a_status(tmp_path: Path) -> None:
    llm = fake_llm(tmp_path)

    async def test() -> None:
        async with serving(llm) as (client, _):
            runtime_of(llm).fail_next = RuntimeError("a planted fault")
            response = await client.post(RESPONSES, json={"input": "A", "stream": True})
            assert error_of(response, 500)["code"] == "engine_step_failed"
            body = {"input": "A" * 600, "stream": True}
            error = error_of(await client.post(RESPONSES, json=body), 400)
            assert (error["code"], error["param"]) == ("context_length_exceeded", "input")

    run(test)


def test_a_deadline(tmp_path: Path) -> None:
    llm = fake_llm(tmp_path)

    async def test() -> None:
        slow_down(llm, 0.01)
        async with serving(llm) as (client, _):
            body = {"input": "A", "timeout": 0.4, "ignore_eos": True, "temperature": 0}
            assert error_of(await client.post(RESPONSES, json=body), 504)["param"] == "timeout"
            stream = await client.post(RESPONSES, json={**body, "stream": True})
            *_, error, last = response_events(stream.text)
            assert (error["type"], error["code"]) == ("error", "deadline_exceeded")
            assert last["type"] == "response.failed" and "timeout" in error["message"]
            assert shown(last["response"])[0][1]

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_blocks(tmp_path: Path, stream: bool) -> None:
    llm = fake_llm(tmp_path)

    async def test() -> None:
        slow_down(llm, 0.01)
        async with serving(llm) as (_, service):
            body = {"input": "A", "max_output_tokens": 400, "ignore_eos": True, "stream": stream}
            await RawClient(service, RESPONSES, body).go_while_running()
            assert service.engine.num_open == 0

    run(test)


def test_its_id_finds_the_request(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            headers = {"X-Request-Id": "mine"}
            answer = await client.post(RESPONSES, json={"input": "hello"}, headers=headers)
            name = answer.json()["id"]
            assert name.startswith("resp_mine-") and answer.headers["x-request-id"] == "mine"
            assert (await client.get(f"/engine/requests/{name}")).status_code == 200
            schema = (await client.get("/openapi.json")).json()["paths"][RESPONSES]["post"]
            assert "422" not in schema["responses"] and "400" in schema["responses"]
            fields = json.dumps(schema["requestBody"])
            assert "ResponsesBody" in fields

    run(test)
