"""Items of the Responses API by themselves: made of text cut anywhere, and put into messages."""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from response_helpers import response_events, shown, told, without_ids

from octavo.engine.outputs import (
    CompletionOutput,
    OutputChunk,
    RequestMetrics,
    RequestOutput,
    TokenLogprob,
)
from octavo.server.answers import Markup, Reading
from octavo.server.errors import ApiError, renamed
from octavo.server.formats import Head
from octavo.server.reasoning import REASONING
from octavo.server.responses_body import ResponsesBody, translate
from octavo.server.responses_format import ResponsesFormat
from octavo.server.tools import CallMode
from octavo.text.places import TokenPlaces

USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
END = 5  # the token behind the thinking
FRAGMENTS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "f", "arguments": {"a": 1}}'),
    *(" ", "\n", "<", "a", "b c", "é", "\U0001f984"),
]


class Letters:
    """A tokenizer whose tokens are bytes."""

    special_ids = frozenset[int]()

    def token(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_id: int, at_start: bool = False) -> bytes:
        return bytes([token_id])


def make_format(logprobs: bool = False, calls: CallMode = "free") -> ResponsesFormat:
    places: Any = partial(TokenPlaces, Letters(), continues=False) if logprobs else None
    reading = Reading(Markup("hermes", REASONING["qwen3"]), calls=calls)
    body = ResponsesBody(input="x")
    echo = {**body.echo(), "temperature": 1.0, "top_p": 1.0}
    return ResponsesFormat(
        Head("resp_1", 1, "m"),
        places,
        reading,
        echo=echo,
        thinking_end=END,
        names=translate(body).names,
    )


def result_of(text: str, logprobs: Any, reason: str = "stop") -> RequestOutput:
    output = CompletionOutput(0, text, (1, END), reason, logprobs=logprobs)
    metrics = RequestMetrics(0, 0, 0, 1, 1, 1, 0)
    return RequestOutput("id", None, (1,), (output,), None, metrics)


def stream_of(answer_format: ResponsesFormat, chunks: list[OutputChunk]) -> dict[str, Any]:
    """What the events tell of."""
    text = answer_format.opening(1, "")
    for chunk in chunks:
        text += answer_format.piece(0, chunk, "")
    return told(response_events(text + answer_format.closing(USAGE)))


@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=14),
    st.data(),
    st.sampled_from(["stop", "length"]),
)
def test_however_the_text_is_cut(fragments: list[str], data: st.DataObject, reason: str) -> None:
    text = "".join(fragments)
    result = result_of(text, None, reason)
    whole = make_format().whole([result], USAGE)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=9)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    chunks = [OutputChunk("id", 0, part) for part in parts]
    chunks.append(OutputChunk("id", 0, "", finish_reason=reason, result=result))
    assert without_ids(stream_of(make_format(), chunks)) == without_ids(whole)
    assert whole["status"] == ("completed" if reason == "stop" else "incomplete")
    kinds = [kind for kind, _ in shown(whole)]
    assert "reasoning" not in kinds[1:]
    assert all(a != b for a, b in pairwise(kinds) if a == "message")


def test_a_call_that_a_stop_string_cuts_off_is_incomplete() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}'
    for text, status in ((call, "completed"), (call[:-3], "incomplete")):
        whole = make_format(calls="only").whole([result_of(text, None)], USAGE)
        assert (whole["status"], whole["output"][0]["status"]) == ("completed", status)


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14), st.data())
def test_log_probabilities_however_text_and_tokens_come(
    fragments: list[str], data: st.DataObject
) -> None:
    """Text may come later than its tokens, where a stop string may have begun."""
    text = "".join(fragments)
    tokens = [*text.encode(), 0]
    logprobs = tuple(TokenLogprob(token, -0.5) for token in tokens)
    result = result_of(text, logprobs)
    whole = make_format(logprobs=True).whole([result], USAGE)
    ends = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=9)))
    chunks, done, shown_until = [], 0, 0
    for end in [*ends, len(tokens)]:
        known = len(bytes(tokens[:end]).decode(errors="ignore"))
        until = data.draw(st.integers(shown_until, max(shown_until, min(known, len(text)))))
        until = len(text) if end == len(tokens) else until
        is_last = len(chunks) == len(ends)
        chunks.append(
            OutputChunk(
                "id",
                0,
                text[shown_until:until],
                tuple(tokens[done:end]),
                logprobs[done:end],
                "stop" if is_last else None,
                result=result if is_last else None,
            )
        )
        done, shown_until = end, until
    assert without_ids(stream_of(make_format(logprobs=True), chunks)) == without_ids(whole)
    for item in whole["output"]:
        if item["type"] == "message":
            (part,) = item["content"]
            data_of = bytes(byte for token in part["logprobs"] for byte in token["bytes"])
            assert part["text"] == "" or part["text"].encode() in data_of
            assert len(data_of) - len(part["text"].encode()) <= len("</tool_call>\0")


def test_thinking_and_calls_bring_no_tokens_into_a_message() -> None:
    text = '<think>so</think>\n\nYes <tool_call>{"name": "f"}</tool_call> no'
    logprobs = tuple(TokenLogprob(token, -0.5) for token in text.encode())
    whole = make_format(logprobs=True).whole([result_of(text, logprobs)], USAGE)
    messages = [item["content"][0] for item in whole["output"] if item["type"] == "message"]
    for part, shown_text in zip(messages, ("Yes ", " no"), strict=True):
        data = bytes(byte for token in part["logprobs"] for byte in token["bytes"])
        assert part["text"] == shown_text == data.decode()


def test_an_error_in_a_stream_has_the_names_of_this_api() -> None:
    answer_format = make_format()
    answer_format.opening(1, "")
    answer_format.piece(0, OutputChunk("id", 0, "Well"), "")
    events = answer_format.failed(ApiError(400, "max_tokens is 0", "max_tokens", "wrong"))
    error, last = (json.loads(each.split("data: ")[1]) for each in events.split("\n\n")[:2])
    assert (error["type"], error["param"], error["code"]) == ("error", "max_output_tokens", "wrong")
    assert last["response"]["error"]["message"] == error["message"] == "max_output_tokens is 0"
    assert shown(last["response"]) == [("message", "Well")] and last["sequence_number"] == 6


def messages_of(given: Any, **fields: Any) -> list[dict[str, Any]]:
    chat = translate(ResponsesBody(input=given, **fields)).chat
    return [message.model_dump(exclude_none=True) for message in chat.messages]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def call(name: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": name, "name": name, "arguments": "{}", "id": "fc_1"}


def called(*names: str) -> list[dict[str, Any]]:
    functions = [{"name": name, "arguments": "{}"} for name in names]
    return [{"id": f["name"], "type": "function", "function": f} for f in functions]


def thought(text: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "id": "rs_1", "summary": [], "content": content}


def said(text: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {"type": "message", "role": "assistant", "id": "msg_1", "content": content}


OUTPUT = {"type": "function_call_output", "call_id": "f", "output": "5"}
TALKS: dict[str, tuple[list[Any], list[dict[str, Any]]]] = {
    "a turn is one message": (
        [user("a"), thought("t"), said("s"), call("f"), call("g"), OUTPUT, said("e")],
        [
            user("a"),
            {"role": "assistant", "reasoning": "t", "content": "s", "tool_calls": called("f", "g")},
            {"role": "tool", "tool_call_id": "f", "content": "5"},
            {"role": "assistant", "content": "e"},
        ],
    ),
    "two turns are two": (
        [said("a"), said("b"), thought("t"), call("f"), thought("u"), said("c")],
        [
            {"role": "assistant", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "assistant", "reasoning": "t", "tool_calls": called("f")},
            {"role": "assistant", "reasoning": "u", "content": "c"},
        ],
    ),
    "text behind calls": (
        [call("f"), said("a"), OUTPUT],
        [
            {"role": "assistant", "content": "a", "tool_calls": called("f")},
            {"role": "tool", "tool_call_id": "f", "content": "5"},
        ],
    ),
    "system messages of the beginning are one": (
        [{"role": "developer", "content": "a"}, {"role": "system", "content": "b"}, user("c")],
        [{"role": "system", "content": "a\n\nb"}, user("c")],
    ),
    "a later one stays": (
        [user("a"), {"role": "developer", "content": "b"}],
        [user("a"), {"role": "system", "content": "b"}],
    ),
    "summaries, and what only others can read": (
        [
            {**thought(""), "content": None, "summary": [{"type": "summary_text", "text": "s"}]},
            {"type": "reasoning", "summary": [], "encrypted_content": "x"},
            said("a"),
        ],
        [{"role": "assistant", "reasoning": "s", "content": "a"}],
    ),
    "parts": (
        [user([{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}, "c"])],
        [user("a\nb\nc")],
    ),
    "a refusal": (
        [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}],
        [{"role": "assistant", "content": "no"}],
    ),
    "a result of parts": (
        [{**OUTPUT, "output": [{"type": "input_text", "text": "5"}]}],
        [{"role": "tool", "tool_call_id": "f", "content": "5"}],
    ),
}


@pytest.mark.parametrize("name", TALKS)
def test_items_become_messages(name: str) -> None:
    items, messages = TALKS[name]
    assert messages_of(items) == messages


def test_instructions_are_the_first_of_the_system_messages() -> None:
    items = [{"role": "system", "content": "b"}, user("c")]
    want = [{"role": "system", "content": "a\n\nb"}, user("c")]
    assert messages_of(items, instructions="a") == want
    assert messages_of("c", instructions="a") == [{"role": "system", "content": "a"}, user("c")]


ERRORS = [
    (
        "messages[2].tool_calls[1]",
        "messages[2].tool_calls[1] is bad",
        "input[3]",
        "input[3] is bad",
    ),
    (
        "messages[1].content",
        "messages[1].content is x",
        "input[0].content",
        "input[0].content is x",
    ),
    ("messages[0]", "messages[0] is x", "instructions", "instructions is x"),
    ("tools[0].function.parameters", "x", "tools[1].parameters", "x"),
    ("max_tokens", "max_tokens is 0", "max_output_tokens", "max_output_tokens is 0"),
    ("response_format", "no: lower max_tokens", "text.format", "no: lower max_output_tokens"),
    ("temperature", "temperature is 9", "temperature", "temperature is 9"),
    (None, "x", None, "x"),
]


@pytest.mark.parametrize(("param", "message", "own_param", "own_message"), ERRORS)
def test_errors_have_the_names_of_this_api(
    param: str | None, message: str, own_param: str | None, own_message: str
) -> None:
    tools = [{"type": "function", "name": name} for name in ("a", "b")]
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "b"}]}
    items = [user("u"), thought("t"), call("f"), call("g")]
    body = ResponsesBody(input=items, instructions="i", tools=tools, tool_choice=allowed)
    error = ApiError(400, message, param, "code", {"a": "b"})
    found = renamed(error, translate(body).names)
    assert (found.param, found.message) == (own_param, own_message)
    assert (found.status, found.code, found.headers) == (400, "code", {"a": "b"})


def test_what_a_schema_says_of_null_is_kept() -> None:
    schema = {"enum": [None, {"a": None}]}
    body = ResponsesBody(input="x", structured_outputs={"json": schema})
    assert translate(body).chat.structured_outputs == {"json": schema}


def test_what_is_repeated_can_be_written() -> None:
    tool = {"type": "function", "name": "f", "parameters": {"default": float("nan")}}
    echo = ResponsesBody(input="x", user="a\ud800", tools=[tool]).echo()
    assert echo["user"] == "a?" and echo["tools"][0]["parameters"] == {"default": None}
    json.dumps(echo, ensure_ascii=False, allow_nan=False).encode()
