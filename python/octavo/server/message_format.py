"""Answers as Anthropic's Messages API writes them: a message of blocks, or its events."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from octavo.engine.outputs import OutputChunk, RequestOutput
from octavo.server.answers import AnswerParser, Piece, Reading
from octavo.server.errors import ApiError
from octavo.server.formats import Format, Head, to_json, usage_of
from octavo.server.reasoning import Reasoning
from octavo.server.tools import ToolCall

Event = dict[str, Any]


class MessageFormat(Format):
    """/v1/messages: one answer. reading: how it is read. num_prompt: tokens of the prompt.

    A stream says what the answer's end was, and how many tokens it took, in `closing`.
    """

    def __init__(self, head: Head, reading: Reading, num_prompt: int, request_id: str) -> None:
        self._head = head
        self._num_prompt = num_prompt
        self._request_id = request_id
        self._parser = AnswerParser(reading)
        self._blocks = Blocks()
        self._end: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}

    def whole(self, results: Sequence[RequestOutput], usage: dict[str, Any]) -> dict[str, Any]:
        """The message. What it holds is what the events of a stream make."""
        (output,) = results[0].outputs
        content = blocks_of(self._take(output.text, output.finish_reason, output.stop_reason))
        return self._message(content, usage)

    def opening(self, num_choices: int, usage: str) -> str:
        """The message without content; how much of the prompt was cached is not known yet."""
        message = self._message([], usage_of(self._num_prompt, 0))
        return _written([{"type": "message_start", "message": message}])

    def piece(self, choice: int, chunk: OutputChunk, usage: str) -> str:
        """Events of one chunk. A deadline that passed is an error: no stop_reason says so."""
        if chunk.finish_reason == "timeout":
            raise ApiError(
                504,
                "the request's deadline passed before its answer was whole: raise timeout, or ask "
                "for less",
                param="timeout",
                code="deadline_exceeded",
            )
        return _written(self._take(chunk.text, chunk.finish_reason, chunk.stop_reason))

    def closing(self, usage: dict[str, Any] | None) -> str:
        """How the answer ended, and what it took."""
        used = _usage(usage or usage_of(self._num_prompt, 0))
        last = {"type": "message_delta", "delta": self._end, "usage": used}
        return _written([last, {"type": "message_stop"}])

    def failed(self, error: ApiError) -> str:
        """An event with the error, which ends the stream."""
        return f"event: error\ndata: {error.as_messages_json(self._request_id)}\n\n"

    def _take(
        self, text: str, finish_reason: str | None, stop_reason: str | int | None
    ) -> list[Event]:
        pieces = self._parser.push(text)
        if finish_reason is None:
            return self._blocks.push(pieces)
        events = self._blocks.push([*pieces, *self._parser.finish()])
        reason, sequence = "end_turn", None
        if finish_reason == "length":
            reason = "max_tokens"
        elif isinstance(stop_reason, str):
            reason, sequence = "stop_sequence", stop_reason
        elif self._parser.ends_with_call:
            reason = "tool_use"
        self._end = {"stop_reason": reason, "stop_sequence": sequence}
        return [*events, *self._blocks.finish()]

    def _message(self, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self._head.response_id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": content,
            **self._end,
            "usage": _usage(usage),
        }


class Blocks:
    """The pieces of an answer as events of content blocks, one of which is open at a time.

    White space between two blocks belongs to neither.
    """

    def __init__(self) -> None:
        self._index = -1
        self._kind: str | None = None  # of the block that is open
        self._space: list[str] = []  # behind the text so far, held back until more text comes

    def push(self, pieces: Iterable[Piece]) -> list[Event]:
        """What these pieces add."""
        events: list[Event] = []
        for piece in pieces:
            if isinstance(piece, str):
                shown = piece.rstrip()
                if shown:
                    events += self._text("".join([*self._space, shown]))
                    self._space = []
                self._space.append(piece[len(shown) :])
            elif isinstance(piece, Reasoning):
                if self._kind != "thinking":
                    events += self._start({"type": "thinking", "thinking": "", "signature": ""})
                events.append(self._delta("thinking_delta", "thinking", piece.text))
            elif isinstance(piece, ToolCall):
                call_id = f"toolu_{piece.call_id.removeprefix('call_')}"
                block = {"type": "tool_use", "id": call_id, "name": piece.name, "input": {}}
                events += self._start(block)
                if piece.arguments:  # all of them
                    arguments = object_text(piece.arguments)
                    events.append(self._delta("input_json_delta", "partial_json", arguments))
            else:
                events.append(self._delta("input_json_delta", "partial_json", piece.text))
        return events

    def finish(self) -> list[Event]:
        """What is left at the end. An answer of white space alone is that."""
        is_text, space = self._kind == "text" or self._index < 0, "".join(self._space)
        events = self._text(space) if space and is_text else []
        return [*events, *self._stop()]

    def _text(self, text: str) -> list[Event]:
        if self._kind == "text":
            return [self._delta("text_delta", "text", text)]
        begun = self._start({"type": "text", "text": ""})
        text = text.lstrip() if self._index else text
        return [*begun, self._delta("text_delta", "text", text)]

    def _start(self, block: dict[str, Any]) -> list[Event]:
        ended = self._stop()
        self._index += 1
        self._kind = block["type"]
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return [*ended, start]

    def _delta(self, kind: str, member: str, text: str) -> Event:
        delta = {"type": kind, member: text}
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _stop(self) -> list[Event]:
        if self._kind is None:
            return []
        # Some clients keep what was thought only where its signature came.
        signed = [self._delta("signature_delta", "signature", "")]
        events = signed if self._kind == "thinking" else []
        self._kind = None
        return [*events, {"type": "content_block_stop", "index": self._index}]


def blocks_of(events: Iterable[Event]) -> list[dict[str, Any]]:
    """The content that these events make, as a client puts it together."""
    content: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in events:
        if event["type"] == "content_block_start":
            content.append(dict(event["content_block"]))
            texts = []
        elif event["type"] == "content_block_delta":
            texts += [text for name, text in event["delta"].items() if name != "type"]
        else:
            block, text = content[-1], "".join(texts)
            if block["type"] == "tool_use":
                block["input"] = _read_object(text)
            else:
                block[block["type"]] = text
    return content


def object_text(arguments: str) -> str:
    """The arguments of a call as the text of an object, which they have to be here.

    What is none becomes the member "arguments" of one, so that nothing the model says is lost.
    """
    value: Any = arguments
    try:
        value = json.loads(arguments)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        value = arguments
    return arguments if isinstance(value, dict) else to_json({"arguments": value})


def _read_object(text: str) -> dict[str, Any]:
    """The object; of one that was cut off what was whole, down to its members' members.

    {} for what no body can hold: numbers of thousands of digits, objects too deep for Python.
    """
    with contextlib.suppress(RecursionError):
        for part_of in (str, _whole_part):
            with contextlib.suppress(ValueError):
                value = json.loads(part_of(text) or "{}")
                found = json.dumps(value, ensure_ascii=False, allow_nan=False)
                return dict(json.loads(found.encode(errors="replace")))  # half pairs of surrogates
    return {}


def _whole_part(text: str) -> str:
    """The beginning of an object as far as its members are whole, and brackets that close it."""
    end, closing, open_brackets = 0, "{}", ""
    in_string = is_escaped = False
    for index, character in enumerate(text):
        if in_string:
            in_string = is_escaped or character != '"'
            is_escaped = not is_escaped and character == "\\"
            continue
        in_string = character == '"'
        if character in "{[":
            open_brackets = ("}" if character == "{" else "]") + open_brackets
        elif character in "}]":
            open_brackets = open_brackets[1:]
        elif character != ",":
            continue
        end, closing = index + (character != ","), open_brackets
    return text[:end] + closing


def _usage(usage: dict[str, Any]) -> dict[str, int]:
    """Anthropic counts the part of a prompt that was cached apart from the rest."""
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }


def _written(events: Iterable[Event]) -> str:
    return "".join(f"event: {event['type']}\ndata: {to_json(event)}\n\n" for event in events)
