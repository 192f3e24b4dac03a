"""Anthropic's Messages API: answers, whole and streamed, and the prompts that its bodies make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from message_helpers import (
    ADD,
    COUNT,
    MESSAGES,
    TEMPLATE,
    THINKING,
    USER,
    ask,
    ask_both,
    events_of,
    load,
    message_of,
    plain,
    put_together,
)
from parrot import END, say
from server_helpers import RawClient, fake_llm, serving, slow_down
from server_helpers import run as run_test

from octavo.llm import LLM
from octavo.server import messages
from octavo.server.answers import Markup
from octavo.text.chat import ChatTemplate

CALL = '<tool_call>{"name": "add", "arguments": {"a": %s}}</tool_call>'


@pytest.fixture(scope="module")
def hello(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    chain = say("Hello", " there", "!") | {"Go": " on", " on": " now", " now": END}
    return load(tmp_path_factory.mktemp("hello"), chain)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What chat templates made."""
    found: list[str] = []
    render = ChatTemplate.render

    def recording_render(*args: Any, **variables: Any) -> str:
        found.append(render(*args, **variables))
        return found[-1]

    monkeypatch.setattr(ChatTemplate, "render", recording_render)
    return found


def seen(prompt: str) -> list[dict[str, Any]]:
    """The messages as the template had them."""
    return [json.loads(line) for line in prompt.splitlines() if line.startswith('{"role"')]


def test_a_message(hello: LLM) -> None:
    salt = {"cache_salt": "message"}
    first, second = map(message_of, ask(hello, {**salt, "model": "model"}, salt))
    assert first.pop("id").startswith("msg_")
    usage = first.pop("usage")
    assert first == {
        **{"type": "message", "role": "assistant", "model": "model"},
        **{"content": [{"type": "text", "text": "Hello there!"}]},
        **{"stop_reason": "end_turn", "stop_sequence": None},
    }
    assert usage == {
        **{"input_tokens": usage["input_tokens"], "output_tokens": 4},
        **{"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0},
    }
    # What was cached is counted apart.
    cached = second["usage"]["cache_read_input_tokens"]
    assert cached == 32 and second["usage"]["input_tokens"] + cached == usage["input_tokens"]


def test_the_events_of_a_stream(hello: LLM) -> None:
    body = {"stream": True, "cache_salt": "stream"}
    response, again = ask(hello, body, body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["request-id"] == response.headers["x-request-id"]
    events = events_of(response.text)
    assert [event["type"] for event in events] == [
        *("message_start", "content_block_start"),
        *["content_block_delta"] * 3,
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    started, ended = events[0]["message"]["usage"], events[-2]["usage"]
    assert started["output_tokens"] == 0 and ended["output_tokens"] == 4
    assert started["input_tokens"] == ended["input_tokens"] > 0
    assert [e["delta"]["text"] for e in events[2:5]] == ["Hello", " there", "!"]
    assert put_together(events)["stop_reason"] == "end_turn"
    assert events_of(again.text)[-2]["usage"]["cache_read_input_tokens"] == 32


def test_stop_reasons(hello: LLM) -> None:
    message = ask_both(hello, stop_sequences=["no", "re!"])
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "re!")
    assert message["content"][0]["text"] == "Hello the"
    message = ask_both(hello, max_tokens=2)
    assert (message["stop_reason"], message["stop_sequence"]) == ("max_tokens", None)
    assert message["content"][0]["text"] == "Hello there"
    token = hello.encode_prompt("!").token_ids[0]
    message = ask_both(hello, stop_token_ids=[token])  # no sequence of the client's
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
    assert ask_both(hello, stop_sequences=["Hello"])["content"] == []


def test_fields_of_sampling(hello: LLM) -> None:
    message = ask_both(hello, temperature=1, top_p=0.5, top_k=1, seed=3, min_p=0.1)
    assert message["content"][0]["text"] == "Hello there!"
    message = ask_both(hello, min_tokens=6, ignore_eos=True, max_tokens=6)
    assert message["usage"]["output_tokens"] == 6
    message = ask_both(hello, logit_bias={str(hello.encode_prompt("!").token_ids[0]): -100})
    assert message["content"][0]["text"].startswith("Hello there")
    assert "!" not in message["content"][0]["text"]


def test_fields_that_change_nothing(hello: LLM) -> None:
    body = {
        **{"metadata": {"user_id": "u"}, "service_tier": "auto", "cache_control": {"type": "x"}},
        **{"context_management": {"edits": []}, "speed": "fast", "inference_geo": None},
        **{"container": None, "mcp_servers": [], "anthropic_beta": ["x"], "stream": None},
    }
    (response,) = ask(hello, body)
    assert message_of(response)["content"][0]["text"] == "Hello there!"
    assert "x-octavo-warning" not in response.headers
    (response,) = ask(hello, {"stop_sequencs": ["x"]})
    assert "stop_sequences" in response.headers["x-octavo-warning"]
    (response,) = ask(hello, {"output_confg": {}})
    assert "output_config" in response.headers["x-octavo-warning"]


def test_text_and_calls_of_tools(tmp_path: Path) -> None:
    text = f"Both: {CALL % 12}\n{CALL % 34}"
    llm = load(tmp_path, say(text[:30], text[30:]))
    message = ask_both(llm, tools=[ADD])
    text_block, *calls = message["content"]
    assert text_block == {"type": "text", "text": "Both:"}
    assert [call["input"] for call in calls] == [{"a": 12}, {"a": 34}]
    assert {call["name"] for call in calls} == {"add"} and len({c["id"] for c in calls}) == 2
    assert all(set(call) == {"type", "id", "name", "input"} for call in calls)
    assert all(call["id"].startswith("toolu_") for call in calls)
    assert (message["stop_reason"], message["stop_sequence"]) == ("tool_use", None)
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    message = ask_both(llm, tools=[ADD], tool_choice=choice)
    assert [block["type"] for block in message["content"]] == ["text", "tool_use"]
    assert message["stop_reason"] == "tool_use"
    message = ask_both(llm, tools=[ADD], tool_choice={"type": "none"})
    assert message["content"] == [{"type": "text", "text": text}]
    assert message["stop_reason"] == "end_turn"


def test_tools_reach_the_template(hello: LLM, prompts: list[str]) -> None:
    tools = [{**ADD, "cache_control": {"type": "ephemeral"}}, {**ADD, "type": "custom"}]
    ask(hello, {"tools": tools}, {"tools": []})
    (given,) = (line for line in prompts[0].splitlines() if line.startswith("<tool_call>"))
    function = {
        **{"name": "add", "parameters": ADD["input_schema"]},
        "description": ADD["description"],
    }
    expected = [{"type": "function", "function": function}] * 2
    assert json.loads(given.removeprefix("<tool_call>")) == expected
    assert "<tool_call>" not in prompts[1]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "add"}])
def test_a_tool_that_must_be_called(tmp_path: Path, choice: dict[str, Any]) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")
    llm = load(tmp_path, {"<go>": "no", "no": END})
    one = {**choice, "disable_parallel_tool_use": True}
    for seed in range(3):
        message = ask_both(llm, tools=[ADD], tool_choice=one, temperature=1, seed=seed)
        (call,) = message["content"]
        assert call["name"] == "add" and 10 <= call["input"]["a"] <= 99
        assert message["stop_reason"] == "tool_use"
    # Cut off, it has what was whole.
    body = {"tools": [ADD], "tool_choice": one, "max_tokens": 40}
    whole, stream = ask(llm, body, {**body, "stream": True})
    message = message_of(whole)
    assert message["stop_reason"] == "max_tokens"
    assert [block["input"] for block in message["content"]] in ([], [{}])
    assert events_of(stream.text)[-2]["delta"]["stop_reason"] == "max_tokens"


def test_thinking(tmp_path: Path, prompts: list[str]) -> None:
    llm = load(tmp_path, say("<think>", "\nA plan", ".\n", "</think>", "\n\nSo", "."), THINKING)
    message = ask_both(llm)
    thought = {"type": "thinking", "thinking": "A plan.", "signature": ""}
    assert message["content"] == [thought, {"type": "text", "text": "So."}]
    assert not seen(prompts[0])[0].get("enable_thinking") and prompts[0].startswith("{")
    for kind, flag in (("enabled", True), ("disabled", False), ("adaptive", True)):
        prompts.clear()
        ask(llm, {"thinking": {"type": kind, "budget_tokens": 1024}})
        assert prompts[0].startswith(f"[{flag}]")
    omitted = {"thinking": {"type": "adaptive", "display": "omitted"}}
    for fields in (omitted, {"include_reasoning": False}):
        message = ask_both(llm, **fields)
        assert message["content"] == [{"type": "text", "text": "So."}]
    for fields in ({"separate_reasoning": False}, {"reasoning_format": "none"}):
        message = ask_both(llm, **fields)
        whole = "<think>\nA plan.\n</think>\n\nSo."
        assert message["content"] == [{"type": "text", "text": whole}]
    message = ask_both(llm, max_tokens=2)
    assert message["content"] == [{**thought, "thinking": "A plan"}]
    assert message["stop_reason"] == "max_tokens"
    prompts.clear()
    ask(llm, {"output_config": {"effort": "high"}, "chat_template_kwargs": {"a": 1}})
    assert prompts[0].startswith("high")


def test_an_answer_of_a_schema(tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")
    llm = load(tmp_path, {"<go>": "no", "no": END})
    wanted = {"format": {"type": "json_schema", "schema": ADD["input_schema"]}}
    forms: list[dict[str, Any]] = [{"output_config": wanted}, {"output_format": wanted["format"]}]
    for fields in forms:
        message = ask_both(llm, **fields)
        assert 10 <= json.loads(message["content"][0]["text"])["a"] <= 99
    message = ask_both(llm, guided_choice=["yes"])
    assert message["content"][0]["text"] == "yes"


def tool_use(number: int) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{number}", "name": "add", "input": {"a": number}}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content, "cache_control": {"type": "ephemeral"}}


def result(number: int, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": f"toolu_{number}", **more}


def called(number: int) -> dict[str, Any]:
    function = {"name": "add", "arguments": {"a": number}}
    return {"id": f"toolu_{number}", "type": "function", "function": function}


def told(number: int, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"toolu_{number}", "content": content}


THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "s"}
REASONS = {"reasoning": "hm", "reasoning_content": "hm"}
# What is sent besides max_tokens, and the messages that the chat template sees.
TALKS: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    (
        {"system": "Be brief.", "messages": USER},
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}],
    ),
    (
        {"system": [text("a"), text("b")], "messages": [{"role": "user", "content": [text("x")]}]},
        [{"role": "system", "content": "a\nb"}, {"role": "user", "content": "x"}],
    ),
    (  # turns of one role are one
        {"messages": [*USER, {"role": "user", "content": [text("y"), text("z")]}], "system": ""},
        [{"role": "user", "content": "x\ny\nz"}],
    ),
    (
        {
            "messages": [
                *USER,
                {"role": "assistant", "content": [THOUGHT, text("Well:"), tool_use(1)]},
                {"role": "assistant", "content": [tool_use(2)]},
                {
                    "role": "user",
                    "content": [
                        result(1, content="5"),
                        text("and?"),
                        result(2, content=[text("p"), text("q")], is_error=True),
                    ],
                },
            ]
        },
        [
            {"role": "user", "content": "x"},
            {
                **{"role": "assistant", "content": "Well:", **REASONS},
                "tool_calls": [called(1), called(2)],
            },
            *(told(1, "5"), told(2, "Error: p\nq")),
            {"role": "user", "content": "and?"},
        ],
    ),
    (
        {
            "messages": [
                *USER,
                {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "?"}]},
                {"role": "system", "content": "New rules."},
                {"role": "user", "content": [result(3), result(4, is_error=False, content=[])]},
            ]
        },
        [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": ""},
            {"role": "system", "content": "New rules."},
            *(told(3, ""), told(4, "")),
        ],
    ),
]


@pytest.mark.parametrize("index", range(len(TALKS)))
def test_what_the_template_sees(hello: LLM, prompts: list[str], index: int) -> None:
    body, expected = TALKS[index]
    message = message_of(ask(hello, body)[0])
    found = seen(prompts[-1])
    assert found == expected
    (counted,) = ask(hello, body, path=COUNT)
    usage = message["usage"]
    total = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert counted.json() == {"input_tokens": total}


def test_tokens_are_counted(hello: LLM) -> None:
    found = [r.json() for r in ask(hello, {}, {"system": "ab"}, {"tools": [ADD]}, path=COUNT)]
    assert all(set(count) == {"input_tokens"} for count in found)
    counts = [count["input_tokens"] for count in found]
    prompt = '{"role": "user", "content": "x"}\n<go>'
    assert counts[0] == len(hello.encode_prompt(prompt).token_ids)
    assert counts[0] < counts[1] < counts[2]
    body = {"max_tokens": None, "stop_sequences": ["x"], "temperature": None, "model": "model"}
    (response,) = ask(hello, body, path=COUNT)
    assert response.json() == found[0]


def test_an_answer_that_has_begun(hello: LLM) -> None:
    """The model goes on with the last message, if it is its own."""
    begun = [*USER, {"role": "assistant", "content": [text("Go")]}]
    message = ask_both(hello, messages=begun)
    assert message["content"] == [{"type": "text", "text": " on now"}]
    counted, bare = ask(hello, {"messages": begun}, {}, path=COUNT)
    assert counted.json()["input_tokens"] == bare.json()["input_tokens"] + 1
    for nothing in ("", []):
        again = [*USER, {"role": "assistant", "content": nothing}]
        (response,) = ask(hello, {"messages": again})
        assert message_of(response)["content"][0]["text"] == "Hello there!"


def test_a_space_may_come_first_in_an_answer_that_has_begun(hello: LLM) -> None:
    """Behind a chat template some tokenizers' first space is none of the answer's."""
    body = {"messages": [*USER, {"role": "assistant", "content": "Go"}], "max_tokens": 1}
    chat, begun = messages.to_chat(messages.MessagesBody(**body))
    assert (begun, len(chat.messages)) == ("Go", 1)
    prompt = messages.encode(hello, chat, Markup(), begun)
    assert not prompt.is_chat and str(prompt.text).endswith("<go>Go")
    assert messages.encode(hello, chat, Markup(), "").is_chat


def test_an_answer_that_has_begun_is_behind_the_thinking(tmp_path: Path) -> None:
    begun = [*USER, {"role": "assistant", "content": "Go"}]
    chain = {"Go": "<think>", "<think>": END, "<go>": END}
    llm = load(tmp_path / "a", chain, THINKING)
    assert ask_both(llm, messages=begun)["content"] == [{"type": "text", "text": "<think>"}]
    closed = load(tmp_path / "b", chain, f"{TEMPLATE}<think></think>")
    assert ask_both(closed, messages=begun)["content"] == [{"type": "text", "text": "<think>"}]


def test_a_client_that_goes_frees_its_blocks(tmp_path: Path) -> None:
    llm = fake_llm(tmp_path)
    slow_down(llm, 0.01)

    async def test() -> None:
        for stream in (False, True):
            async with serving(llm) as (_, service):
                body = {"messages": USER, "max_tokens": 400, "ignore_eos": True, "stream": stream}
                await RawClient(service, MESSAGES, body).go_while_running()

    run_test(test)


def test_a_message_is_what_a_chat_is(hello: LLM) -> None:
    """Adapters, priorities and metrics are those of any request."""

    async def test() -> None:
        async with serving(hello, served_names=("parrot", "claude")) as (client, _):
            body = {"messages": USER, "max_tokens": 9, "temperature": 0, "priority": 3}
            message = message_of(await client.post(MESSAGES, json={**body, "model": "claude"}))
            assert plain(message)["model"] == "parrot"
            explained = await client.get(f"/engine/requests/{message['id']}")
            assert explained.status_code == 200
            metrics = (await client.get("/metrics")).text
            assert 'finished_reason="stop",model_name="parrot"} 1.0' in metrics
            paths = (await client.get("/openapi.json")).json()["paths"]
            assert {MESSAGES, COUNT} <= set(paths) and "422" not in paths[COUNT]["post"][
                "responses"
            ]

    run_test(test)
