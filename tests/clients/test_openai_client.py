"""OpenAI's own client. tests/server/test_server_process.py has it over SmolLM2."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_helpers import fake_llm, listening, runtime_of, slow_down

from clients.scenes import (
    ADD,
    ARGUMENTS,
    HELLO,
    MODEL,
    RESULT,
    UNICORN,
    Served,
    write_model,
)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def ask(client: openai.OpenAI, word: Any, **options: Any) -> Any:
    options = {"temperature": 0, **options}
    return client.chat.completions.create(model=MODEL, messages=[user(word)], **options)


def test_a_chat(client: openai.OpenAI, parrot: Served) -> None:
    answer = ask(client, "hello")
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (HELLO, "stop")
    assert choice.message.role == "assistant"
    assert choice.message.tool_calls is None and choice.message.refusal is None
    assert answer.model == MODEL and answer.object == "chat.completion"
    assert answer.usage.completion_tokens == 4
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 4
    assert parrot.seen() == [user("hello")]


def test_a_content_of_parts(client: openai.OpenAI, parrot: Served) -> None:
    answer = ask(client, [{"type": "text", "text": "hello"}])
    assert answer.choices[0].message.content == HELLO
    with pytest.raises(openai.BadRequestError, match="image_url") as refused:
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
        ask(client, [picture])
    assert str(refused.value.param).startswith("messages[0].content[0]")


def test_a_streamed_chat(client: openai.OpenAI) -> None:
    chunks = list(ask(client, "hello", stream=True, stream_options={"include_usage": True}))
    *body, last = chunks
    assert last.choices == [] and last.usage.completion_tokens == 4
    assert all(chunk.usage is None for chunk in body)
    assert all(len(chunk.choices) == 1 and chunk.id == last.id for chunk in body)
    assert body[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in body][-1] == "stop"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in body) == HELLO
    assert all(chunk.usage is None for chunk in ask(client, "hello", stream=True))


def test_every_chunk_before_the_usage_says_null(parrot: Served) -> None:
    """OpenAI: "All other chunks will also include a usage field, but with a null value"."""
    body = {"messages": [user("hello")], "stream": True, "stream_options": {"include_usage": True}}
    text = httpx.post(f"{parrot.api}/chat/completions", json=body).text
    events = [json.loads(part[6:]) for part in text.split("\n\n") if part.startswith("data: {")]
    assert [event.get("usage", "missing") for event in events[:-1]] == [None] * (len(events) - 1)


def test_the_stream_helper(client: openai.OpenAI) -> None:
    """client.chat.completions.stream puts chunks together and is strict about them."""
    with client.chat.completions.stream(
        model=MODEL, messages=[user("add")], tools=[ADD], temperature=0, logprobs=True
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds and "logprobs.content.delta" in kinds
    (call,) = final.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == ARGUMENTS
    assert final.choices[0].finish_reason == "tool_calls"


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["hello", "count"], temperature=0, logprobs=1
    )
    assert [choice.text for choice in answer.choices] == [HELLO, "one two three"]
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert (logprobs.tokens or [])[:3] == ["one", " two", " three"]
    assert (logprobs.text_offset or [])[:3] == [0, 3, 7]
    stream = client.completions.create(
        model=MODEL,
        prompt="hello",
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == HELLO
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 4


def test_a_call_of_a_tool_and_its_result(client: openai.OpenAI, parrot: Served) -> None:
    message = ask(client, "add", tools=[ADD]).choices[0].message
    (call,) = message.tool_calls
    assert message.content is None and call.type == "function" and call.function.name == "add"
    assert json.loads(call.function.arguments) == ARGUMENTS
    talk = [user("add"), message, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
    answer = client.chat.completions.create(model=MODEL, messages=talk, tools=[ADD], temperature=0)
    assert answer.choices[0].message.content == RESULT
    assert answer.choices[0].finish_reason == "stop"
    _, asked, told = parrot.seen()
    assert asked["tool_calls"][0]["function"] == {"name": "add", "arguments": ARGUMENTS}
    assert asked["tool_calls"][0]["id"] == call.id
    assert told == {"role": "tool", "tool_call_id": call.id, "content": "5"}


@pytest.mark.parametrize("kept", [["message"], ["dump"]], ids=lambda kept: kept[0])
def test_a_message_sent_back_as_the_client_has_it(
    client: openai.OpenAI, parrot: Served, kept: list[str]
) -> None:
    """`refusal: null`, `audio: null`, `tool_calls: null` and such mean nothing to a template."""
    message = ask(client, "hello").choices[0].message
    sent = message if kept == ["message"] else message.model_dump()  # the latter with its nulls
    client.chat.completions.create(model=MODEL, messages=[user("a"), sent, user("hello")])
    assert parrot.seen()[1] == {"role": "assistant", "content": HELLO}


NOTHING = {
    "tool_calls": [],
    "function_call": None,
    "refusal": None,
    "audio": None,
    "name": None,
}


@pytest.mark.parametrize("name", NOTHING)
def test_fields_that_say_nothing(client: openai.OpenAI, parrot: Served, name: str) -> None:
    said = {"role": "assistant", "content": HELLO, name: NOTHING[name]}
    client.chat.completions.create(model=MODEL, messages=[user("a"), said, user("hello")])
    assert parrot.seen()[1] == {"role": "assistant", "content": HELLO}


def test_a_name_reaches_the_template(client: openai.OpenAI, parrot: Served) -> None:
    said = {**user("hello"), "name": "Ada"}
    client.chat.completions.create(model=MODEL, messages=[said])
    assert parrot.seen() == [said]


def test_two_calls_streamed(client: openai.OpenAI) -> None:
    text, calls, reason = "", {}, None
    for chunk in ask(client, "both", tools=[ADD], stream=True):
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        for part in choice.delta.tool_calls or []:
            name, arguments = calls.get(part.index, ("", ""))
            function = part.function
            calls[part.index] = (name + (function.name or ""), arguments + function.arguments)
        reason = choice.finish_reason or reason
    assert text.strip() == "Both:" and reason == "tool_calls"
    parsed = [(name, json.loads(arguments)) for _, (name, arguments) in sorted(calls.items())]
    assert parsed == [("add", {"a": 1}), ("add", {"b": [2, "}"]})]


def test_tool_choice_none(client: openai.OpenAI) -> None:
    message = ask(client, "add", tools=[ADD], tool_choice="none").choices[0].message
    assert message.tool_calls is None and message.content.startswith("<tool_call>")


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, stream: bool) -> None:
    answer = ask(client, "weigh", logprobs=True, top_logprobs=2, stream=stream)
    chunks = answer if stream else [answer]
    found = [chunk.choices[0].logprobs for chunk in chunks]
    first, *_ = [entry for logprobs in found if logprobs for entry in logprobs.content]
    assert first.token == "yes" and first.bytes == list(b"yes")
    assert [(top.token, top.bytes) for top in first.top_logprobs] == [
        ("yes", list(b"yes")),
        ("no", list(b"no")),
    ]
    logprobs = [top.logprob for top in first.top_logprobs]
    assert logprobs[0] - logprobs[1] == pytest.approx(1.0, abs=1e-3)
    assert sum(map(math.exp, logprobs)) == pytest.approx(1.0, abs=0.05)


def test_the_bytes_of_tokens_are_the_text(client: openai.OpenAI) -> None:
    answer = ask(client, "unicorn", logprobs=True, top_logprobs=1)
    assert answer.choices[0].message.content == UNICORN
    entries = answer.choices[0].logprobs.content[:4]
    assert [entry.bytes for entry in entries] == [[byte] for byte in UNICORN.encode()]


def test_several_answers(client: openai.OpenAI) -> None:
    answer = ask(client, "coin", n=8, temperature=1, seed=3)
    texts = [choice.message.content for choice in answer.choices]
    assert set(texts) == {"heads", "tails"}
    assert [choice.index for choice in answer.choices] == list(range(8))
    again = ask(client, "coin", n=8, temperature=1, seed=3)
    assert [choice.message.content for choice in again.choices] == texts
    streamed = dict.fromkeys(range(8), "")
    for chunk in ask(client, "coin", n=8, temperature=1, seed=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert list(streamed.values()) == texts


def test_stop_strings(client: openai.OpenAI) -> None:
    for stop in (" two", [" three", " two"], ["o th", " two"]):
        choice = ask(client, "count", stop=stop).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("one", "stop")
    choice = ask(client, "mark", stop=["<first>"]).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("", "stop")


def test_a_length(client: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = ask(client, "sing", **{name: 5})
        choice = answer.choices[0]
        assert (choice.message.content, choice.finish_reason) == ("la" * 5, "length")
        assert answer.usage.completion_tokens == 5


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "octavo"


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-none") as missing:
        client.chat.completions.create(model="gpt-none", messages=[user("hello")])
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, "long " * 1024)
    assert long.value.code == "context_length_exceeded" and long.value.param == "messages"
    assert long.value.type == "invalid_request_error"
    for name, value in {"temperature": -1, "top_p": 2, "n": 0, "logit_bias": {"x": 1}}.items():
        with pytest.raises(openai.BadRequestError) as bad:
            ask(client, "hello", **{name: value})
        assert str(bad.value.param).startswith(name)
    with pytest.raises(openai.BadRequestError, match="makes texts"):
        client.embeddings.create(model=MODEL, input="hello")
    with pytest.raises(openai.NotFoundError, match="/v1/responses/resp_1"):
        client.responses.retrieve("resp_1")  # nothing is stored


LOADING = """
import sys, time
from pathlib import Path
from octavo.llm import LLM
from octavo.server.options import ServerOptions
from octavo.server.serving import serve
def load():
    time.sleep(3)
    return LLM(Path(sys.argv[1]), num_threads=1)
serve(ServerOptions(port=0, log_format="json"), load)
"""


def test_a_retry_while_the_model_is_loaded(tmp_path: Path) -> None:
    """503 with Retry-After: a client that tries again needs no help."""
    command = [sys.executable, "-c", LOADING, str(write_model(tmp_path))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = json.loads(process.stderr.readline())["url"].rstrip("/")
        once = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError) as early:
            once.completions.create(model="model", prompt="hello")
        assert early.value.status_code == 503
        assert early.value.response.headers["retry-after"] == "1"
        patient = once.with_options(max_retries=10)
        answer = patient.completions.create(model="model", prompt="hello", temperature=0)
        assert answer.choices[0].text == HELLO
    finally:
        process.kill()
        process.wait()


def test_a_full_queue_and_a_client_that_gives_up(tmp_path: Path) -> None:
    llm = fake_llm(tmp_path, max_num_seqs=1, max_waiting_requests=1)
    slow_down(llm, 0.05)
    with listening(llm) as url, ThreadPoolExecutor(2) as pool:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def complete(timeout: float) -> Any:
            return client.with_options(timeout=timeout).completions.create(
                model="model", prompt="A", max_tokens=400, extra_body={"ignore_eos": True}
            )

        others = [pool.submit(complete, 8.0)]
        wait_for_metric(url, "vllm:num_requests_running", 1)
        others.append(pool.submit(complete, 8.0))
        wait_for_metric(url, "vllm:num_requests_waiting", 1)
        with pytest.raises(openai.RateLimitError) as full:
            complete(8.0)
        assert full.value.code == "queue_full"
        assert full.value.response.headers["retry-after"] == "1"
        for other in others:
            with pytest.raises(openai.APITimeoutError):
                other.result()
        wait_for_metric(url, "vllm:num_requests_running", 0)
        wait_for_metric(url, "vllm:kv_cache_usage_perc", 0)


def wait_for_metric(url: str, name: str, value: float) -> None:
    """Until /metrics has this value; 20 seconds at most."""
    for _ in range(400):
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        found = [line for line in lines if line.startswith(f"{name}{{")]
        if found and float(found[0].rpartition(" ")[2]) == value:
            return
        time.sleep(0.05)
    raise AssertionError(f"{name} never was {value}")


def test_errors_of_streams(client: openai.OpenAI, tmp_path: Path) -> None:
    """What goes wrong before the first token has a status; what goes wrong later is an event."""
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, "long " * 1024, stream=True)
    assert long.value.code == "context_length_exceeded"
    llm = fake_llm(tmp_path)
    runtime, num_steps = runtime_of(llm), 0
    wait = runtime.wait

    def break_down(ticket: int) -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps > 5:
            raise RuntimeError("the device is gone")
        return wait(ticket)

    runtime.wait = break_down  # type: ignore[method-assign]
    with listening(llm) as url:
        fragile = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        texts = []
        with pytest.raises(openai.APIError, match="device is gone") as broken:
            for chunk in fragile.completions.create(
                model="model",
                prompt="A",
                stream=True,
                temperature=0,  # each token has a text; the end of an answer has none
                extra_body={"ignore_eos": True},
            ):
                texts.append(chunk.choices[0].text)
        assert texts and broken.value.code == "engine_step_failed"


def test_an_answer_out_of_time(tmp_path: Path) -> None:
    """A whole answer is an error with a status; a stream ends with what there is of it."""
    llm = fake_llm(tmp_path)
    slow_down(llm, 0.05)
    late: dict[str, Any] = {"model": "model", "prompt": "A", "max_tokens": 400}
    late["extra_body"] = {"ignore_eos": True, "timeout": 1.0}
    with listening(llm) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.InternalServerError) as error:
            client.completions.create(**late)
        assert error.value.status_code == 504 and error.value.code == "deadline_exceeded"
        *_, last = client.completions.create(stream=True, **late)
        assert last.choices[0].finish_reason == "timeout"
