"""litellm, by its providers openai/ and hosted_vllm/."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from clients.scenes import ADD, ARGUMENTS, HELLO, MODEL, RESULT, UNICORN, Served

litellm = pytest.importorskip("litellm", reason="needs litellm: make test-clients installs it")
PROVIDERS = ("openai", "hosted_vllm")


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def ask(parrot: Served, messages: Any, provider: str = "openai", **options: Any) -> Any:
    options = {"model": f"{provider}/{MODEL}", "temperature": 0, "num_retries": 0, **options}
    talk = [user(messages)] if isinstance(messages, str) else messages
    return litellm.completion(messages=talk, api_base=parrot.api, api_key="none", **options)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_chat(parrot: Served, provider: str) -> None:
    answer = ask(parrot, "hello", provider)
    assert answer.choices[0].message.content == HELLO
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 4 and answer.usage.prompt_tokens > 0


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_stream(parrot: Served, provider: str) -> None:
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ask(parrot, "hello", provider, **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == HELLO
    whole = litellm.stream_chunk_builder(chunks)
    assert whole.choices[0].message.content == HELLO
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens == 4


def test_asynchronously(parrot: Served) -> None:
    async def ask_some() -> list[Any]:
        options = {"model": f"openai/{MODEL}", "api_base": parrot.api, "api_key": "none"}
        questions = [[user("hello")], [user("unicorn")]]
        calls = [litellm.acompletion(messages=q, temperature=0, **options) for q in questions]
        return await asyncio.gather(*calls)

    texts = [answer.choices[0].message.content for answer in asyncio.run(ask_some())]
    assert texts == [HELLO, UNICORN]


@pytest.mark.parametrize("provider", ["text-completion-openai", "hosted_vllm"])
def test_a_completion(parrot: Served, provider: str) -> None:
    answer = litellm.text_completion(
        model=f"{provider}/{MODEL}",
        prompt="count",
        api_base=parrot.api,
        api_key="none",
        temperature=0,
        stop=" three",
    )
    assert answer.choices[0].text == "one two" and answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_call_of_a_tool_and_its_result(parrot: Served, provider: str) -> None:
    message = ask(parrot, "add", provider, tools=[ADD]).choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "add" and json.loads(call.function.arguments) == ARGUMENTS
    talk = [user("add"), message, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
    answer = ask(parrot, talk, provider, tools=[ADD])
    assert answer.choices[0].message.content == RESULT
    _, asked, told = parrot.seen()
    assert set(asked) == {"role", "content", "tool_calls"}
    assert asked["tool_calls"][0]["function"] == {"name": "add", "arguments": ARGUMENTS}
    assert told["tool_call_id"] == call.id == asked["tool_calls"][0]["id"]


def test_calls_of_tools_in_a_stream(parrot: Served) -> None:
    chunks = list(ask(parrot, "both", tools=[ADD], stream=True))
    message = litellm.stream_chunk_builder(chunks).choices[0].message
    assert [json.loads(call.function.arguments) for call in message.tool_calls] == [
        {"a": 1},
        {"b": [2, "}"]},
    ]
    assert message.content.strip() == "Both:"


def test_an_answer_sent_back(parrot: Served) -> None:
    """As litellm's object, and as its dump with `tool_calls: null` and more that is null."""
    message = ask(parrot, "hello").choices[0].message
    for sent in (message, message.model_dump()):
        ask(parrot, [user("a"), sent, user("hello")])
        assert parrot.seen()[1] == {"role": "assistant", "content": HELLO}


def test_logprobs_several_answers_and_a_seed(parrot: Served) -> None:
    answer = ask(parrot, "weigh", logprobs=True, top_logprobs=2)
    first = answer.choices[0].logprobs.content[0]
    assert first.token == "yes" and bytes(first.bytes) == b"yes"
    assert [top.token for top in first.top_logprobs] == ["yes", "no"]
    draws = [ask(parrot, "coin", n=6, temperature=1, seed=3) for _ in range(2)]
    texts = [[choice.message.content for choice in draw.choices] for draw in draws]
    assert texts[0] == texts[1] and set(texts[0]) == {"heads", "tails"}


def test_fields_of_vllm(parrot: Served) -> None:
    answer = ask(parrot, "coin", "hosted_vllm", temperature=1, top_k=1, max_tokens=1)
    assert answer.choices[0].message.content in ("heads", "tails")
    answer = ask(parrot, "count", extra_body={"ignore_eos": True, "min_tokens": 6}, max_tokens=6)
    assert answer.usage.completion_tokens == 6


def test_errors(parrot: Served) -> None:
    with pytest.raises(litellm.NotFoundError, match="gpt-none"):
        ask(parrot, "hello", model="openai/gpt-none")
    with pytest.raises(litellm.ContextWindowExceededError, match="tokens"):
        ask(parrot, "long " * 1024)
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        ask(parrot, "hello", temperature=-1)
    with pytest.raises(litellm.BadRequestError, match="makes texts"):
        litellm.embedding(
            model=f"openai/{MODEL}", input=["hello"], api_base=parrot.api, api_key="none"
        )


def test_a_real_model(smollm2: Served) -> None:
    question = [user("What is the capital of France?")]
    model = "openai/smollm2-135m"
    answer = ask(smollm2, question, model=model, max_tokens=20)
    assert answer.choices[0].message.content == "The capital of France is Paris."
