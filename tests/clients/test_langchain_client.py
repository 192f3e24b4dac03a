"""langchain-openai's ChatOpenAI and OpenAI."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from clients.scenes import ARGUMENTS, HELLO, MODEL, RESULT, Served

_REASON = "needs langchain-openai: make test-clients installs it"
langchain_openai = pytest.importorskip("langchain_openai", reason=_REASON)
messages = pytest.importorskip("langchain_core.messages", reason=_REASON)
tools = pytest.importorskip("langchain_core.tools", reason=_REASON)


@tools.tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def chat_model(parrot: Served, **options: Any) -> Any:
    options = {"model": MODEL, "temperature": 0, "max_retries": 0, **options}
    return langchain_openai.ChatOpenAI(base_url=parrot.api, api_key="none", **options)


def test_a_chat(parrot: Served) -> None:
    answer = chat_model(parrot).invoke("hello")
    assert answer.content == HELLO
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["output_tokens"] == 4


def test_roles_and_contents_of_parts(parrot: Served) -> None:
    part = {"type": "text", "text": "hello"}
    talk = [messages.SystemMessage("Be brief."), messages.HumanMessage([part])]
    assert chat_model(parrot).invoke(talk).content == HELLO
    assert [message["role"] for message in parrot.seen()] == ["system", "user"]
    assert parrot.seen()[1]["content"] == "hello"


def test_a_stream(parrot: Served) -> None:
    chunks = list(chat_model(parrot, stream_usage=True).stream("hello"))
    assert "".join(chunk.content for chunk in chunks) == HELLO
    whole = sum(chunks[1:], chunks[0])
    assert whole.usage_metadata["output_tokens"] == 4
    assert whole.response_metadata["finish_reason"] == "stop"


def test_asynchronously_and_in_batches(parrot: Served) -> None:
    async def collect() -> str:
        return "".join([chunk.content async for chunk in chat_model(parrot).astream("hello")])

    assert asyncio.run(collect()) == HELLO
    answers = chat_model(parrot, stop=[" two"]).batch(["hello", "count"])
    assert [answer.content for answer in answers] == [HELLO, "one"]


def test_a_completion(parrot: Served) -> None:
    model = langchain_openai.OpenAI(
        model=MODEL, base_url=parrot.api, api_key="none", temperature=0, max_retries=0
    )
    assert model.invoke("hello") == HELLO
    assert "".join(model.stream("count")) == "one two three"


def test_a_call_of_a_tool_and_its_result(parrot: Served) -> None:
    model = chat_model(parrot).bind_tools([add])
    talk: list[Any] = [messages.HumanMessage("add")]
    answer = model.invoke(talk)
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("add", ARGUMENTS)
    talk += [answer, add.invoke(call)]
    assert model.invoke(talk).content == RESULT
    _, asked, told = parrot.seen()
    assert asked["tool_calls"][0]["function"] == {"name": "add", "arguments": ARGUMENTS}
    assert told["tool_call_id"] == call["id"] and told["content"] == "5"
    assert "".join(chunk.content for chunk in model.stream(talk)) == RESULT


def test_calls_of_tools_in_a_stream(parrot: Served) -> None:
    chunks = list(chat_model(parrot).bind_tools([add]).stream("both"))
    whole = sum(chunks[1:], chunks[0])
    assert [call["args"] for call in whole.tool_calls] == [{"a": 1}, {"b": [2, "}"]}]
    assert whole.content.strip() == "Both:"
    assert whole.response_metadata["finish_reason"] == "tool_calls"


def test_an_answer_sent_back(parrot: Served) -> None:
    model = chat_model(parrot)
    said = model.invoke("hello")
    model.invoke([messages.HumanMessage("a"), said, messages.HumanMessage("hello")])
    assert parrot.seen()[1] == {"role": "assistant", "content": HELLO}


def test_logprobs_and_a_seed(parrot: Served) -> None:
    answer = chat_model(parrot, logprobs=True, top_logprobs=2).invoke("weigh")
    first = answer.response_metadata["logprobs"]["content"][0]
    assert first["token"] == "yes" and first["bytes"] == list(b"yes")
    assert [top["token"] for top in first["top_logprobs"]] == ["yes", "no"]
    coin = chat_model(parrot, temperature=1, seed=5)
    assert coin.invoke("coin").content == coin.invoke("coin").content
    draws = chat_model(parrot, temperature=1, n=6, seed=3).generate(
        [[messages.HumanMessage("coin")]]
    )
    assert {draw.text for draw in draws.generations[0]} == {"heads", "tails"}


def test_a_schema_by_a_tool_that_may_be_called(parrot: Served) -> None:
    """with_structured_output forces the tool; where the model may choose it works today."""
    model = chat_model(parrot).bind_tools([add], tool_choice="auto")
    assert model.invoke("add").tool_calls[0]["args"] == ARGUMENTS


def test_errors(parrot: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-none"):
        chat_model(parrot, model="gpt-none").invoke("hello")
    with pytest.raises(openai.BadRequestError, match="tokens") as long:
        chat_model(parrot).invoke("long " * 1024)
    # langchain tells a full context from other errors, so that a program can shorten it.
    assert "ContextOverflow" in type(long.value).__name__
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat_model(parrot, temperature=-1).invoke("hello")


def test_a_real_model(smollm2: Served) -> None:
    model = chat_model(smollm2, model="smollm2-135m", max_tokens=20)
    answer = model.invoke("What is the capital of France?")
    assert answer.content == "The capital of France is Paris."
