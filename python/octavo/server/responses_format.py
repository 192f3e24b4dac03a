"""An answer as OpenAI's Responses API writes it: items, whole or as events while they grow."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from octavo.engine.outputs import OutputChunk, RequestOutput, TokenLogprob
from octavo.server.answers import AnswerParser, Piece, Reading
from octavo.server.errors import ApiError, renamed
from octavo.server.formats import ChatFormat, Head, NewPlaces, to_json
from octavo.server.prompt_logprobs import PromptLogprobs
from octavo.server.reasoning import Reasoning, ReasoningTags
from octavo.server.tools import Arguments, ToolCall

Kind = Literal["message", "reasoning", "function_call"]
_PREFIXES: dict[Kind, str] = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_EVENTS: dict[Kind, str] = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}
# A response has no such end, so it is an error as it is for an answer that is not streamed.
_LATE = ApiError(
    504,
    "the request's deadline passed before the answer was whole: raise timeout, or ask for less",
    param="timeout",
    code="deadline_exceeded",
)


@dataclass
class _Item:
    """One item of the output, while it grows and after. index: its place in the output."""

    kind: Kind
    index: int
    call: ToolCall | None = None
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    status: str = "in_progress"
    item_id: str = ""

    def __post_init__(self) -> None:
        self.item_id = f"{_PREFIXES[self.kind]}_{secrets.token_hex(12)}"

    @property
    def text(self) -> str:
        """All of its text, or of its arguments."""
        return "".join(self.texts)

    def part(self) -> dict[str, Any]:
        """Its only part, if it has parts."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        found = {"type": "output_text", "text": self.text, "annotations": []}
        return {**found, "logprobs": list(self.logprobs)}

    def as_json(self, *, is_empty: bool = False) -> dict[str, Any]:
        """As a response has it; is_empty: before its part has begun."""
        found: dict[str, Any] = {"id": self.item_id, "type": self.kind, "status": self.status}
        if self.call is not None:
            call = {"call_id": self.call.call_id, "name": self.call.name}
            return {**found, **call, "arguments": self.text}
        content = [] if is_empty else [self.part()]
        if self.kind == "reasoning":
            return {**found, "summary": [], "content": content}
        return {**found, "role": "assistant", "content": content}


class ResponsesFormat(ChatFormat):
    """/v1/responses: one answer.

    Whole and streamed answers go through the same steps, so that they have the same items. White
    space that would be a message of its own is left out, unless it is all there is.

    echo: the fields of the response that repeat what was asked for. thinking_end: the token behind
    the thinking, None where the vocabulary has none for it. names: what errors call fields of the
    request, and what they are in this API.
    """

    object_name = chunk_name = "response"

    def __init__(
        self,
        head: Head,
        new_places: NewPlaces | None,
        reading: Reading | None = None,
        prompt_logprobs: PromptLogprobs | None = None,
        *,
        echo: Mapping[str, Any],
        thinking_end: int | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(head, new_places, reading, prompt_logprobs)
        self._echo = echo
        self._thinking_end = thinking_end
        self._names = names or {}
        self._parser = AnswerParser(self._reading)
        self._num_events = 0
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._space: list[str] = []  # of a message that may begin
        self._num_thinking = 0
        self._finish_reason: str | None = None
        # Where log-probabilities are asked for: text that is to be read token by token, how many
        # characters were read before it, the tokens with the place where each ends, and those that
        # have been read and are in no message yet.
        self._unread, self._num_read = "", 0
        self._tokens: deque[tuple[dict[str, Any], int]] = deque()
        self._unplaced: list[dict[str, Any]] = []

    def whole(self, results: Sequence[RequestOutput], usage: dict[str, Any]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        output = results[0].outputs[0]
        self._read(output.text, output.logprobs or ())
        self._end(output.finish_reason, output.token_ids)
        return self._response(self._status, usage)

    def opening(self, num_choices: int, usage: str) -> str:
        """The events before the first item."""
        names = ("response.created", "response.in_progress")
        return "".join(self._whole_event(name, "in_progress") for name in names)

    def piece(self, choice: int, chunk: OutputChunk, usage: str) -> str:
        """Events for one chunk."""
        events = self._read(chunk.text, chunk.logprobs)
        if chunk.finish_reason is not None:
            result = chunk.result
            token_ids = chunk.token_ids if result is None else result.outputs[0].token_ids
            events += self._end(chunk.finish_reason, token_ids)
        return events

    def closing(self, usage: dict[str, Any] | None) -> str:
        """The last event, which has the whole response."""
        if self._finish_reason == "timeout":
            return self.failed(_LATE)
        return self._whole_event(f"response.{self._status}", self._status, usage)

    def failed(self, error: ApiError) -> str:
        """The error, and what there is of the response."""
        found = renamed(error, self._names)
        told = {"code": found.code, "message": found.message, "param": found.param}
        if self._open is not None:
            self._open.status = "incomplete"
        return self._event_of("error", told) + self._whole_event(
            "response.failed", "failed", error={"code": "server_error", "message": found.message}
        )

    @property
    def _status(self) -> str:
        """Of a response that has ended, and of its last item."""
        return "completed" if self._finish_reason == "stop" else "incomplete"

    def _response(
        self, status: str, usage: dict[str, Any] | None = None, error: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        response_id, created, model = self._head
        is_cut = status == "incomplete"
        return {
            "id": response_id,
            "object": "response",
            "created_at": created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": model,
            "output": [item.as_json() for item in self._items],
            "usage": usage and self._usage(usage),
            **self._echo,
        }

    def _usage(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._num_thinking},
            "total_tokens": usage["total_tokens"],
        }

    def _event_of(self, name: str, fields: Mapping[str, Any]) -> str:
        number, self._num_events = self._num_events, self._num_events + 1
        data = to_json({"type": name, "sequence_number": number, **fields})
        return f"event: {name}\ndata: {data}\n\n"

    def _whole_event(self, name: str, status: str, *response: Any, **fields: Any) -> str:
        return self._event_of(name, {"response": self._response(status, *response, **fields)})

    def _read(self, text: str, logprobs: Sequence[TokenLogprob]) -> str:
        """Events for more of the text.

        With log-probabilities it is read token by token, as far as the tokens are known and their
        text is: so each token comes with the text that it is part of, however the text is cut.
        """
        for entry in logprobs:
            (found,) = self._logprobs(self._places[0], [entry])["content"]
            self._tokens.append((found, self._places[0].length))
        text, begin, events = self._unread + text, 0, ""
        while self._tokens and self._tokens[0][1] <= self._num_read + len(text):
            token, place = self._tokens.popleft()
            end = max(begin, place - self._num_read)
            self._unplaced.append(token)
            events += self._show(self._parser.push(text[begin:end]))
            begin = end
        if not self._tokens:
            events += self._show(self._parser.push(text[begin:]))
            begin = len(text)
        self._unread, self._num_read = text[begin:], self._num_read + begin
        return events

    def _end(self, finish_reason: str | None, token_ids: Sequence[int]) -> str:
        """Events for the end of the answer. token_ids: all of its tokens."""
        self._finish_reason = finish_reason
        self._unplaced += [token for token, _ in self._tokens]
        pieces = self._parser.push(self._unread) if self._unread else []
        events = self._show([*pieces, *self._parser.finish()])
        is_answered = any(item.kind != "reasoning" for item in self._items)
        if not is_answered and (self._space or self._status == "completed"):
            events += self._speak("".join(self._space))
        if self._open is not None and self._open.kind == "message":
            events += self._grow("")  # the tokens that have no text
        if self._parser.has_thought and self._thinking_end is not None:
            is_closed = self._thinking_end in token_ids
            number = token_ids.index(self._thinking_end) + 1 if is_closed else len(token_ids)
            self._num_thinking = number
        is_cut_off = self._open is not None and self._open.kind == "function_call"
        is_cut_off = is_cut_off and not self._parser.ends_with_call  # by a stop string
        return events + self._finish("incomplete" if is_cut_off else self._status)

    def _show(self, pieces: Iterable[Piece]) -> str:
        events = ""
        for piece in pieces:
            if isinstance(piece, str):
                events += self._say(piece)
                continue
            self._unplaced.clear()
            if isinstance(piece, Reasoning):
                is_open = self._open is not None and self._open.kind == "reasoning"
                events += ("" if is_open else self._begin("reasoning")) + self._grow(piece.text)
            elif isinstance(piece, Arguments):
                events += self._grow(piece.text)
            else:
                events += self._begin("function_call", piece) + self._grow(piece.arguments)
        return events

    def _say(self, text: str) -> str:
        """Events for text of a message."""
        if self._open is not None and self._open.kind == "message":
            return self._grow(text)
        self._space.append(text)
        return self._speak("".join(self._space)) if text.strip() else ""

    def _speak(self, text: str) -> str:
        """Events for a message that begins with this text."""
        self._unplaced = _tokens_of(text, self._unplaced, self._reading.markup.reasoning)
        return self._begin("message") + self._grow(text)

    def _begin(self, kind: Kind, call: ToolCall | None = None) -> str:
        """Events for a new item, and for the end of the one before."""
        events = self._finish("completed")
        self._open = item = _Item(kind, len(self._items), call)
        self._items.append(item)
        added = {"output_index": item.index, "item": item.as_json(is_empty=True)}
        events += self._event_of("response.output_item.added", added)
        if kind != "function_call":
            events += self._event_of(
                "response.content_part.added", self._place({"part": item.part()})
            )
        return events

    def _grow(self, text: str) -> str:
        """Events for more text, or arguments, of the open item."""
        item = self._open
        if item is None:
            return ""
        more: dict[str, Any] = {"delta": text}
        if item.kind == "message":
            self._space = []
            more["logprobs"], self._unplaced = self._unplaced, []
            item.logprobs += more["logprobs"]
        if not text and not more.get("logprobs"):
            return ""
        item.texts.append(text)
        return self._event_of(f"{_EVENTS[item.kind]}.delta", self._place(more))

    def _finish(self, status: str) -> str:
        """Events for the end of the open item, if there is one."""
        item, self._space = self._open, []
        if item is None:
            return ""
        item.status = status
        done: dict[str, Any] = {"text": item.text}
        if item.call is not None:
            done = {"name": item.call.name, "arguments": item.text}
        if item.kind == "message":
            done["logprobs"] = item.logprobs
        events = self._event_of(f"{_EVENTS[item.kind]}.done", self._place(done))
        if item.kind != "function_call":
            events += self._event_of(
                "response.content_part.done", self._place({"part": item.part()})
            )
        ended = {"output_index": item.index, "item": item.as_json()}
        self._open = None
        return events + self._event_of("response.output_item.done", ended)

    def _place(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """These fields of an event, and which part of the open item it is about."""
        item = self._open
        if item is None:
            return dict(fields)
        place: dict[str, Any] = {"item_id": item.item_id, "output_index": item.index}
        if item.kind != "function_call":
            place["content_index"] = 0
        return {**place, **fields}


def _tokens_of(
    text: str, tokens: Sequence[dict[str, Any]], tags: ReasoningTags | None
) -> list[dict[str, Any]]:
    """Those of these tokens that a message begins with, and what follows.

    text: its first. Before it the end of the thinking may stand, and space.
    """
    data = b"".join(bytes(token["bytes"]) for token in tokens)
    _, found, rest = data.partition(tags.end.encode()) if tags else (b"", b"", b"")
    place = data.find(text.encode(), len(data) - len(rest) if found else 0)
    for index, token in enumerate(tokens):
        if place < max(1, len(token["bytes"])):
            return list(tokens[index:])
        place -= len(token["bytes"])
    return []
