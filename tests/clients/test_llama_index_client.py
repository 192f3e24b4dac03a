"""llama-index's OpenAILike."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from clients.scenes import ARGUMENTS, HELLO, MODEL, RESULT, Served

_REASON = "needs llama-index-llms-openai-like: make test-clients installs it"
openai_like = pytest.importorskip("llama_index.llms.openai_like", reason=_REASON)
llms = pytest.importorskip("llama_index.core.llms", reason=_REASON)
tools = pytest.importorskip("llama_index.core.tools", reason=_REASON)


def add(a: int, b: Any) -> Any:
    """Add two numbers."""
    return a + b


TOOL = tools.FunctionTool.from_defaults(add)


def model_of(parrot: Served, **options: Any) -> Any:
    usual = {"model": MODEL, "temperature": 0, "max_retries": 0, "context_window": 1024}
    kinds = {"is_chat_model": True, "is_function_calling_model": True}
    return openai_like.OpenAILike(
        **{**usual, **kinds, **options}, api_base=parrot.api, api_key="none"
    )


def user(content: str) -> Any:
    return llms.ChatMessage(content, role="user")


def test_a_chat(parrot: Served) -> None:
    answer = model_of(parrot).chat([user("hello")])
    assert answer.message.content == HELLO
    assert answer.additional_kwargs["completion_tokens"] == 4


def test_a_stream(parrot: Served) -> None:
    parts = list(model_of(parrot).stream_chat([user("hello")]))
    assert "".join(part.delta for part in parts) == HELLO == parts[-1].message.content

    async def collect() -> str:
        stream = await model_of(parrot).astream_chat([user("hello")])
        return "".join([part.delta async for part in stream])

    assert asyncio.run(collect()) == HELLO


def test_a_completion(parrot: Served) -> None:
    model = model_of(parrot, is_chat_model=False)
    assert model.complete("hello").text == HELLO
    assert "".join(part.delta for part in model.stream_complete("count")) == "one two three"
    assert model_of(parrot).complete("hello").text == HELLO  # as a chat


def test_a_call_of_a_tool_and_its_result(parrot: Served) -> None:
    model = model_of(parrot)
    answer = model.chat_with_tools([TOOL], user_msg="add")
    (call,) = model.get_tool_calls_from_response(answer)
    assert (call.tool_name, call.tool_kwargs) == ("add", ARGUMENTS)
    result = llms.ChatMessage("5", role="tool", additional_kwargs={"tool_call_id": call.tool_id})
    history = [user("add"), answer.message, result]
    assert model.chat_with_tools([TOOL], chat_history=history).message.content == RESULT
    _, asked, told = parrot.seen()
    assert asked["tool_calls"][0]["function"] == {"name": "add", "arguments": ARGUMENTS}
    assert told == {"role": "tool", "tool_call_id": call.tool_id, "content": "5"}
    assert model.predict_and_call([TOOL], user_msg="add").response == "5"


def test_calls_of_tools_in_a_stream(parrot: Served) -> None:
    model = model_of(parrot)
    for parallel, wanted in ((True, [{"a": 1}, {"b": [2, "}"]}]), (False, [{"a": 1}])):
        *_, last = model.stream_chat_with_tools(
            [TOOL], user_msg="both", allow_parallel_tool_calls=parallel
        )
        calls = model.get_tool_calls_from_response(last)
        assert [call.tool_kwargs for call in calls] == wanted
        assert last.raw.choices[0].finish_reason == "tool_calls"


def test_an_answer_sent_back(parrot: Served) -> None:
    model = model_of(parrot)
    said = model.chat([user("hello")]).message
    model.chat([user("a"), said, user("hello")])
    assert parrot.seen()[1] == {"role": "assistant", "content": HELLO}


def test_logprobs_stop_and_a_seed(parrot: Served) -> None:
    answer = model_of(parrot, logprobs=True, top_logprobs=2).chat([user("weigh")])
    first = answer.logprobs[0]
    assert [(top.token, top.bytes) for top in first] == [("yes", list(b"yes")), ("no", list(b"no"))]
    assert first[0].logprob - first[1].logprob == pytest.approx(1, abs=1e-3)
    stopped = model_of(parrot, additional_kwargs={"stop": [" two"]}).chat([user("count")])
    assert stopped.message.content == "one"
    draw = model_of(parrot, temperature=1, additional_kwargs={"seed": 3})
    texts = {draw.chat([user("coin")]).message.content for _ in range(4)}
    assert len(texts) == 1


def test_errors(parrot: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-none"):
        model_of(parrot, model="gpt-none").chat([user("hello")])
    with pytest.raises(openai.BadRequestError, match="tokens") as long:
        model_of(parrot).chat([user("long " * 1024)])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="top_p"):
        model_of(parrot, additional_kwargs={"top_p": 2}).chat([user("hello")])


def test_a_real_model(smollm2: Served) -> None:
    model = model_of(smollm2, model="smollm2-135m", max_tokens=20)
    answer = model.chat([user("What is the capital of France?")])
    assert answer.message.content == "The capital of France is Paris."
