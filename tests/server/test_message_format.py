"""Events of messages from answers that are cut anywhere, and what clients make of them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from message_helpers import events_of, plain, put_together

from octavo.engine.outputs import CompletionOutput, OutputChunk, RequestMetrics, RequestOutput
from octavo.server.answers import Markup, Reading
from octavo.server.errors import ApiError
from octavo.server.formats import Head, to_json, usage_of
from octavo.server.message_format import MessageFormat, blocks_of, object_text
from octavo.server.reasoning import REASONING

HERMES = Reading(Markup("hermes", REASONING["qwen3"]))
LLAMA = Reading(Markup("llama3_json"))
FORCED = Reading(Markup("hermes"), calls="only")
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": [1, "}"], "b": "é"}}\n</tool_call>'
INPUT = {"a": [1, "}"], "b": "é"}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def thought(content: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": content, "signature": ""}


def call(content: Any) -> dict[str, Any]:
    return {"type": "tool_use", "name": "f", "input": content}


# How the answer is read, the answer, the content.
CASES: list[tuple[Reading, str, list[dict[str, Any]]]] = [
    (HERMES, "", []),
    (HERMES, "\n ", [text("\n ")]),
    (HERMES, " just  words \n", [text(" just  words \n")]),
    (HERMES, "<think>\nhm \n</think>\n\nyes ", [thought("hm"), text("yes ")]),
    (HERMES, "<think>hm", [thought("hm")]),
    (HERMES, f"<think>hm</think>\n{CALL}\n", [thought("hm"), call(INPUT)]),
    (HERMES, f"\nSo: \n{CALL}\n\n{CALL} and \n", [text("\nSo:"), call(INPUT), call(INPUT)]),
    (HERMES, f"\n{CALL}", [call(INPUT)]),
    (HERMES, "a <tool_call>no", [text("a <tool_call>no")]),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', [call({})]),
    (HERMES, '<tool_call>{"name": "f", "arguments": 5}', [call({"arguments": 5})]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', [call({"a": 1})]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "x"}', [call({"arguments": "x"})]),
    (LLAMA, 'Well: <|python_tag|>{"name": "f", "parameters": {}}', [text("Well:"), call({})]),
    (LLAMA, '{"name": "f", "para', [text('{"name": "f", "para')]),
    (FORCED, CALL, [call(INPUT)]),
    (FORCED, f"{CALL}\n{CALL}", [call(INPUT), call(INPUT)]),
    (replace(HERMES, calls="only"), f"<think>hm</think>\n{CALL}", [thought("hm"), call(INPUT)]),
    (replace(HERMES, start="inside"), "hm</think>yes", [thought("hm"), text("yes")]),
]
CASES[6][2].append(text("and \n"))


def new_format(reading: Reading) -> MessageFormat:
    return MessageFormat(Head("msg_1", 0, "m"), reading, 7, "r")


def streamed(reading: Reading, pieces: list[str], finish_reason: str = "stop") -> str:
    answer_format = new_format(reading)
    chunks = [OutputChunk("", 0, piece) for piece in pieces]
    chunks.append(OutputChunk("", 0, "", finish_reason=finish_reason))
    written = [answer_format.opening(1, "")]
    written += [answer_format.piece(0, chunk, "") for chunk in chunks]
    return "".join([*written, answer_format.closing(usage_of(7, len(pieces), 2))])


def whole(reading: Reading, answer: str, finish_reason: str = "stop") -> dict[str, Any]:
    metrics = RequestMetrics(0, 0, 0, 1, 1, 1, 0)
    output = CompletionOutput(0, answer, (), finish_reason)
    result = RequestOutput("id", None, (1,), (output,), None, metrics)
    return new_format(reading).whole([result], usage_of(7, 0, 2))


def content_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    return list(plain(message)["content"])


@pytest.mark.parametrize("index", range(len(CASES)))
def test_whole_and_cut_at_any_character(index: int) -> None:
    reading, answer, content = CASES[index]
    message = whole(reading, answer)
    assert content_of(message) == content
    ends = "tool_use" if any(block["type"] == "tool_use" for block in content) else "end_turn"
    assert (message["stop_reason"], message["stop_sequence"]) == (ends, None)
    cuts = [[answer[:i], answer[i:]] for i in range(len(answer) + 1)]
    for pieces in [list(answer), *cuts]:
        found = put_together(events_of(streamed(reading, pieces)))
        assert (content_of(found), found["stop_reason"]) == (content, ends)


FRAGMENTS = ["<think>", "</think>", CALL, "<tool_call>", "<", "\n", " ", "a", "é "]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=10), st.data())
def test_however_it_is_cut(fragments: list[str], data: st.DataObject) -> None:
    answer = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=8)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    found = put_together(events_of(streamed(HERMES, pieces)))
    assert content_of(found) == content_of(whole(HERMES, answer))
    assert not any(block.get("text") == "" for block in found["content"])


def test_the_input_of_a_call_that_was_cut_off() -> None:
    """What is whole of it; a stream gives its text up to the end."""
    head = '<tool_call>\n{"name": "f", "arguments": '
    cuts = {
        "": {},
        "{": {},
        '{"a': {},
        '{"a": 1': {},
        '{"a": 1,': {"a": 1},
        '{"a": "x\\",': {},
        '{"a": "x\\\\", "b"': {"a": "x\\"},
        '{"a": [1, {"b": "}", "c': {"a": [1, {"b": "}"}]},
        '{"a": {"b": []}': {"a": {"b": []}},
    }
    for cut, found in cuts.items():
        message = whole(FORCED, head + cut, "length")
        assert content_of(message) == [call(found)], cut
        assert message["stop_reason"] == "max_tokens"
        events = events_of(streamed(FORCED, list(head + cut), "length"))
        deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
        assert "".join(delta["partial_json"] for delta in deltas) == cut


def test_a_call_that_a_stop_token_cuts_off_is_no_use_of_a_tool() -> None:
    answer = CALL[: CALL.index("}")]
    message = whole(FORCED, answer)
    assert (content_of(message), message["stop_reason"]) == ([call({"a": [1]})], "end_turn")
    assert put_together(events_of(streamed(FORCED, [CALL])))["stop_reason"] == "tool_use"


@given(
    st.dictionaries(
        st.text(max_size=3),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=4),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
        ),
        max_size=3,
    ),
    st.data(),
)
def test_an_object_that_was_cut_anywhere_is_an_object(value: Any, data: st.DataObject) -> None:
    written = json.dumps(value, ensure_ascii=data.draw(st.booleans()))
    cut = data.draw(st.integers(0, len(written)))
    block = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
    delta = {"type": "input_json_delta", "partial_json": written[:cut]}
    events = [
        {"type": "content_block_start", "index": 0, "content_block": block},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_stop", "index": 0},
    ]
    (found,) = blocks_of(events)
    assert found["input"].items() <= value.items() or cut < len(written)
    assert found["input"].keys() <= value.keys()
    if cut == len(written):
        assert found["input"] == value


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (f'{{"a": {"1" * 5000}}}', {}),
        (f'{{"a": {"1" * 5000}, "b": ', {}),
        ('{"a": 1e999}', {}),
        ('{"a": ' * 5000, {}),
        (r'{"a": "x\ud800", "b": 1}', {"a": "x?", "b": 1}),
        (r'{"a": "x\ud83d\ude00", "b": 1', {"a": "x\U0001f600"}),
    ],
)
def test_an_input_that_json_can_hold_and_a_body_cannot(arguments: str, found: Any) -> None:
    message = whole(FORCED, f'<tool_call>\n{{"name": "f", "arguments": {arguments}', "length")
    assert content_of(message) == [call(found)]
    assert json.loads(to_json(message).encode()) == message


@pytest.mark.parametrize("arguments", ["NaN", '{"a": NaN}', '{"a": 1e999}', "[1", "[" * 99999])
def test_arguments_that_are_no_object(arguments: str) -> None:
    assert json.loads(object_text(arguments)) == {"arguments": arguments}


def test_a_signature_ends_what_was_thought() -> None:
    """Some clients wait for it."""
    events = events_of(streamed(HERMES, ["<think>hm</think>", "yes"]))
    kinds = [event.get("delta", event).get("type") for event in events]
    assert kinds[1:5] == [
        *("content_block_start", "thinking_delta", "signature_delta", "content_block_stop"),
    ]


def test_a_deadline_in_a_stream_and_other_errors() -> None:
    answer_format = new_format(HERMES)
    with pytest.raises(ApiError) as late:
        answer_format.piece(0, OutputChunk("", 0, "x", finish_reason="timeout"), "")
    assert late.value.status == 504
    (event,) = events_of(answer_format.failed(ApiError(503, "the server is shutting down")))
    assert event == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "the server is shutting down"},
        "request_id": "r",
    }
