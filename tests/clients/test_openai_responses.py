"""OpenAI's own client with the Responses API: create, stream and parse."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest
from parrot import say, write_parrot
from server_helpers import fake_llm, listening, runtime_of, slow_down

from clients.scenes import ADD, ARGUMENTS, HELLO, MODEL, RESULT, UNICORN, Served, Sum
from octavo.llm import LLM

FLAT_ADD: dict[str, Any] = {"type": "function", **ADD["function"]}
LOGPROBS: Any = ["message.output_text.logprobs"]


class Person(pydantic.BaseModel):
    name: Literal["Ada", "Bea"]
    age: int = pydantic.Field(ge=10, le=99)


def ask(client: openai.OpenAI, given: Any, **options: Any) -> Any:
    return client.responses.create(model=MODEL, input=given, **{"temperature": 0, **options})


def test_a_text(client: openai.OpenAI, parrot: Served) -> None:
    response = ask(client, "hello", instructions="Be kind.", metadata={"a": "b"})
    assert response.output_text == HELLO and response.status == "completed"
    assert response.id.startswith("resp_") and response.model == MODEL
    assert response.metadata == {"a": "b"} and response.instructions == "Be kind."
    assert response.usage.output_tokens == 4
    assert response.usage.total_tokens == response.usage.input_tokens + 4
    assert parrot.seen() == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hello"},
    ]


def test_a_conversation_of_items(client: openai.OpenAI, parrot: Served) -> None:
    """With what the client got sent back as it is."""
    first = ask(client, "hello")
    part = {"type": "input_text", "text": "hello"}
    items = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "hello"},
        *first.output,
        {"type": "message", "role": "user", "content": [part, part]},
    ]
    assert ask(client, items, instructions="Be brief.").output_text == HELLO
    assert parrot.seen() == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": HELLO},
        {"role": "user", "content": "hello\nhello"},
    ]


def test_a_stream(client: openai.OpenAI) -> None:
    events = list(ask(client, "unicorn", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events if "delta" not in event.type] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(getattr(event, "delta", "") for event in events) == UNICORN
    assert events[-1].response.output_text == UNICORN


def test_the_stream_helper(client: openai.OpenAI) -> None:
    """client.responses.stream puts events together and is strict about them."""
    free: Any = {**FLAT_ADD, "strict": False}  # the second call breaks the schema
    with client.responses.stream(model=MODEL, input="both", tools=[free]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds.count("response.function_call_arguments.done") == 2
    message, *calls = final.output
    assert message.type == "message" and final.output_text == "Both: "
    found = [json.loads(call.arguments) for call in calls if call.type == "function_call"]
    assert found == [{"a": 1}, {"b": [2, "}"]}]


def test_an_asynchronous_stream(parrot: Served) -> None:
    async def test() -> str:
        client = openai.AsyncOpenAI(base_url=parrot.api, api_key="none", max_retries=0)
        async with client.responses.stream(model=MODEL, input="hello") as stream:
            async for _ in stream:
                pass
            return (await stream.get_final_response()).output_text

    assert asyncio.run(test()) == HELLO


def test_a_call_of_a_tool_and_its_result(client: openai.OpenAI, parrot: Served) -> None:
    response = ask(client, "add", tools=[FLAT_ADD])
    (call,) = response.output
    assert (call.type, call.name) == ("function_call", "add")
    assert json.loads(call.arguments) == ARGUMENTS and call.id.startswith("fc_")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
    items = [{"role": "user", "content": "add"}, call, result]
    assert ask(client, items, tools=[FLAT_ADD]).output_text == RESULT
    _, asked, told = parrot.seen()
    assert asked["tool_calls"][0]["function"] == {"name": "add", "arguments": ARGUMENTS}
    assert asked["tool_calls"][0]["id"] == call.call_id
    assert told == {"role": "tool", "tool_call_id": call.call_id, "content": "5"}


def test_a_class_is_parsed(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")
    for seed in range(3):
        response = client.responses.parse(
            model=MODEL,
            input="hello",
            text_format=Person,
            temperature=1,
            extra_body={"seed": seed},
        )
        assert isinstance(response.output_parsed, Person)
    with client.responses.stream(
        model=MODEL, input="hello", text_format=Person, temperature=1, extra_body={"seed": 1}
    ) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Person)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "Sum"}])
def test_a_tool_that_must_be_called(client: openai.OpenAI, choice: Any) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")
    response = client.responses.parse(
        model=MODEL,
        input="hello",
        tools=[openai.pydantic_function_tool(Sum)["function"] | {"type": "function"}],  # type: ignore[list-item]
        tool_choice=choice,
        parallel_tool_calls=False,
        temperature=1,
        extra_body={"seed": 2},
    )
    (call,) = response.output
    assert call.type == "function_call"
    assert isinstance(Sum.model_validate_json(call.arguments), Sum)


def test_logprobs(client: openai.OpenAI) -> None:
    response = ask(client, "weigh", include=LOGPROBS, top_logprobs=2)
    first, *_ = response.output[0].content[0].logprobs
    assert (first.token, first.bytes) == ("yes", list(b"yes"))
    assert [top.token for top in first.top_logprobs] == ["yes", "no"]
    events = ask(client, "weigh", include=LOGPROBS, top_logprobs=2, stream=True)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert deltas[0].logprobs[0].top_logprobs[1].token == "no"


def test_a_length(client: openai.OpenAI) -> None:
    response = ask(client, "sing", max_output_tokens=5)
    assert (response.output_text, response.status) == ("la" * 5, "incomplete")
    assert response.incomplete_details.reason == "max_output_tokens"
    *_, last = ask(client, "sing", max_output_tokens=5, stream=True)
    assert last.type == "response.incomplete" and last.response.output_text == "la" * 5


def test_what_is_not_offered(client: openai.OpenAI) -> None:
    picture = {"type": "input_image", "image_url": "data:image/png;base64,AA"}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"input": [{"role": "user", "content": [picture]}]}, "input[0].content[0]"),
    ]
    for fields, param in wrong:
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(**{"model": MODEL, "input": "hello", **fields})
        assert refused.value.param == param
    with pytest.raises(openai.NotFoundError, match="gpt-none"):
        client.responses.create(model="gpt-none", input="hello")
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, "long " * 1024, stream=True)
    assert long.value.code == "context_length_exceeded" and long.value.param == "input"


def test_thinking_is_an_item_and_may_be_sent_back(tmp_path: Path) -> None:
    template = (
        "{# </think> #}{% for m in messages %}<{{ m.role }}|{{ m.reasoning_content }}|"
        "{{ m.content }}>{% endfor %}{{ messages[-1].content }}"
    )
    chain = say("<think>", "Well", ".", "</think>", "Yes", "!", after="think")
    llm = LLM(write_parrot(tmp_path / "m", chain, template=template), num_threads=1)
    with listening(llm, served_names=(MODEL,)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        first = ask(client, "think", reasoning={"effort": "low", "summary": "auto"})
        thought, message = first.output
        assert (thought.type, message.type) == ("reasoning", "message")
        assert thought.content[0].text == "Well." and thought.summary == []
        assert first.output_text == "Yes!"
        assert first.usage.output_tokens_details.reasoning_tokens == 4
        events = list(ask(client, "think", stream=True))
        deltas = [e.delta for e in events if e.type == "response.reasoning_text.delta"]
        assert "".join(deltas) == "Well."
        user = {"role": "user", "content": "think"}
        again = ask(client, [user, *first.output, user])
        prompt = "<user||think><assistant|Well.|Yes!><user||think>think"
        assert again.usage.input_tokens == len(llm.encode_prompt(prompt).token_ids)


def test_a_stream_that_breaks(tmp_path: Path) -> None:
    llm = fake_llm(tmp_path)
    slow_down(llm, 0.005)
    with listening(llm) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        events = []
        for event in client.responses.create(
            model="model",
            input="A",
            stream=True,
            temperature=0,
            extra_body={"ignore_eos": True},
        ):
            events.append(event)
            if len(events) == 6:
                runtime_of(llm).fail_next = RuntimeError("the device is gone")
        *_, error, last = events
        assert error.type == "error" and error.code == "engine_step_failed"
        assert last.type == "response.failed" and last.response.output_text
        assert last.response.error is not None and "is gone" in last.response.error.message
