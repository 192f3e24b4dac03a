"""Anthropic's own client, on /v1/messages."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from server_helpers import fake_llm, listening, slow_down

from clients.scenes import ADD, ARGUMENTS, HELLO, MODEL, RESULT, UNICORN, Served, write_model
from octavo.llm import LLM

anthropic = pytest.importorskip("anthropic", reason="needs anthropic: make test-clients has it")
TOOL = {
    "name": "add",
    "description": ADD["function"]["description"],
    "input_schema": ADD["function"]["parameters"],
}


@pytest.fixture
def client(parrot: Served) -> Any:
    return anthropic.Anthropic(base_url=parrot.url, api_key="none", max_retries=0)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def body(word: Any, **options: Any) -> dict[str, Any]:
    more = {"temperature": 0, **options.pop("extra_body", {})}
    fixed = {"model": MODEL, "max_tokens": 50, "messages": [user(word)], "extra_body": more}
    return {**fixed, **options}


def ask(client: Any, word: Any, **options: Any) -> Any:
    return client.messages.create(**body(word, **options))


def test_a_message(client: Any, parrot: Served) -> None:
    answer = ask(client, "hello", system="Be kind.", metadata={"user_id": "u"})
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", MODEL)
    (block,) = answer.content
    assert (block.type, block.text) == ("text", HELLO)
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert answer.usage.output_tokens == 4 and answer.usage.input_tokens > 0
    assert answer._request_id
    assert parrot.seen() == [{"role": "system", "content": "Be kind."}, user("hello")]


def test_a_stream(client: Any) -> None:
    with client.messages.stream(**body("unicorn")) as stream:
        assert "".join(stream.text_stream) == UNICORN
        message = stream.get_final_message()
    whole = ask(client, "unicorn")
    assert message.content[0].text == whole.content[0].text == UNICORN
    assert message.stop_reason == whole.stop_reason == "end_turn"
    assert message.usage.output_tokens == whole.usage.output_tokens == 5
    cached = message.usage.cache_read_input_tokens
    total = whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    assert message.usage.input_tokens + cached == total
    events = list(ask(client, "hello", stream=True))
    assert [event.type for event in events[:2]] == ["message_start", "content_block_start"]
    assert [event.type for event in events[-2:]] == ["message_delta", "message_stop"]


def test_asynchronously(parrot: Served) -> None:
    async def ask_some() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=parrot.url, api_key="none") as client:
            calls = [client.messages.create(**body(word)) for word in ("hello", "unicorn")]
            texts = [answer.content[0].text for answer in await asyncio.gather(*calls)]
            async with client.messages.stream(**body("count")) as stream:
                texts.append(await stream.get_final_text())
            return texts

    assert asyncio.run(ask_some()) == [HELLO, UNICORN, "one two three"]


@pytest.mark.parametrize("streams", [False, True])
def test_a_call_of_a_tool_and_its_result(client: Any, parrot: Served, streams: bool) -> None:
    if streams:
        with client.messages.stream(**body("add", tools=[TOOL])) as stream:
            answer = stream.get_final_message()
    else:
        answer = ask(client, "add", tools=[TOOL])
    (call,) = answer.content
    assert (call.type, call.name, call.input) == ("tool_use", "add", ARGUMENTS)
    assert answer.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "5"}
    talk = [user("add"), {"role": "assistant", "content": answer.content}, user([result])]
    told = ask(client, "", messages=talk, tools=[TOOL])
    assert told.content[0].text == RESULT and told.stop_reason == "end_turn"
    _, asked, seen = parrot.seen()
    assert asked["tool_calls"][0]["function"] == {"name": "add", "arguments": ARGUMENTS}
    assert seen == {"role": "tool", "tool_call_id": call.id, "content": "5"}
    assert asked["tool_calls"][0]["id"] == call.id


def test_several_calls(client: Any) -> None:
    with client.messages.stream(**body("both", tools=[TOOL])) as stream:
        streamed = stream.get_final_message().content
    for content in (streamed, ask(client, "both", tools=[TOOL]).content):
        assert [block.type for block in content] == ["text", "tool_use", "tool_use"]
        assert [block.input for block in content[1:]] == [{"a": 1}, {"b": [2, "}"]}]
        assert content[0].text == "Both:"


def test_a_forced_call(client: Any) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")
    for choice in ({"type": "any"}, {"type": "tool", "name": "add"}):
        one = {**choice, "disable_parallel_tool_use": True}
        options = {"tools": [TOOL], "tool_choice": one, "max_tokens": 400}
        with client.messages.stream(**body("sing", **options)) as stream:
            (call,) = stream.get_final_message().content
        assert set(call.input) == {"a", "b"} and call.name == "add"


def test_a_schema(client: Any) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")
    pydantic = pytest.importorskip("pydantic")
    kind = pydantic.create_model("Answer", a=(int, ...))
    if not hasattr(client.messages, "parse"):
        pytest.skip("this version of anthropic has no messages.parse")
    answer = client.messages.parse(**body("sing", max_tokens=400), output_format=kind)
    assert isinstance(answer.parsed_output.a, int)


def test_stop_sequences_and_lengths(client: Any) -> None:
    answer = ask(client, "count", stop_sequences=[" three"])
    assert answer.content[0].text == "one two"
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", " three")
    assert ask(client, "count", max_tokens=2).stop_reason == "max_tokens"
    with client.messages.stream(**body("count", stop_sequences=["two"])) as stream:
        assert stream.get_final_message().stop_sequence == "two"


def test_an_answer_that_has_begun(client: Any) -> None:
    talk = [user("x"), {"role": "assistant", "content": "one"}]
    assert ask(client, "", messages=talk).content[0].text == " two three"


def test_tokens_are_counted(client: Any) -> None:
    options: dict[str, Any] = {"system": "Be kind.", "tools": [TOOL], "messages": [user("hello")]}
    counted = client.messages.count_tokens(model=MODEL, **options)
    usage = ask(client, "hello", **options).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_errors(client: Any) -> None:
    with pytest.raises(anthropic.NotFoundError, match="claude-none") as missing:
        ask(client, "hello", model="claude-none")
    assert missing.value.body["error"]["type"] == "not_found_error"
    assert missing.value.request_id == missing.value.body["request_id"]
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\] is of type"):
        picture = {"type": "base64", "media_type": "image/png", "data": "AA=="}
        ask(client, [{"type": "image", "source": picture}])
    with pytest.raises(anthropic.BadRequestError, match="web_search"):
        ask(client, "hello", tools=[{"type": "web_search_20250305", "name": "web_search"}])
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        ask(client, "hello", extra_body={"temperature": -1})
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        ask(client, "long " * 1024)


def test_keys(tmp_path: Path) -> None:
    """The client's versions send a key in either header."""
    llm = LLM(write_model(tmp_path), num_threads=1)
    with listening(llm, served_names=(MODEL,), api_keys=("secret",)) as url:
        for options in (
            {"api_key": "secret"},
            {"auth_token": "secret", "api_key": None},
            {"api_key": "no", "default_headers": {"X-Api-Key": "secret"}},
        ):
            client = anthropic.Anthropic(base_url=url, max_retries=0, **options)
            assert ask(client, "hello").content[0].text == HELLO
        client = anthropic.Anthropic(base_url=url, max_retries=0, api_key="wrong")
        with pytest.raises(anthropic.AuthenticationError, match="API key is missing or wrong"):
            ask(client, "hello")


def test_an_error_within_a_stream(tmp_path: Path) -> None:
    llm = fake_llm(tmp_path)
    slow_down(llm, 0.01)
    with listening(llm) as url:
        client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
        fields = {"ignore_eos": True, "timeout": 0.3}
        options = body("x", model="model", max_tokens=400, extra_body=fields)
        with (
            pytest.raises(anthropic.APIStatusError, match="deadline passed") as late,
            client.messages.stream(**options) as stream,
        ):
            stream.until_done()
        assert late.value.body["error"]["type"] == "timeout_error"
        assert stream.current_message_snapshot.content


def test_a_real_model(smollm2: Served) -> None:
    client = anthropic.Anthropic(base_url=smollm2.url, api_key="none")
    question = "What is the capital of France?"
    options = body(question, model="smollm2-135m", max_tokens=20)
    answer = client.messages.create(**options)
    assert answer.content[0].text == "The capital of France is Paris."
    with client.messages.stream(**options) as stream:
        assert stream.get_final_text() == answer.content[0].text
