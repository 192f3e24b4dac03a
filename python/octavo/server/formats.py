"""Answers as OpenAI's API writes them: whole, or piece by piece as server-sent events.

A streamed piece is put together from strings that were made once for the stream; only the text
itself goes through the JSON encoder.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from octavo.engine.outputs import CompletionOutput, OutputChunk, RequestOutput, TokenLogprob
from octavo.server.tools import ToolCall, ToolFormat, ToolParser, make_parser
from octavo.text.places import TokenPlaces

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer

DONE = "data: [DONE]\n\n"


def to_json(value: Any) -> str:
    """Compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Head:
    """What every piece of an answer says: its id, when it was begun (Unix time), the model."""

    response_id: str
    created: int
    model: str

    def body(
        self, kind: str, choices: list[dict[str, Any]], usage: dict[str, Any]
    ) -> dict[str, Any]:
        """An answer that is not streamed. kind: OpenAI's "object"."""
        return {
            "id": self.response_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": usage,
        }


def usage_of(num_prompt: int, num_answer: int, num_cached: int | None = None) -> dict[str, Any]:
    """Tokens of the prompts, of the answers, and of the prompts' part that came from the cache."""
    usage: dict[str, Any] = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
    }
    if num_cached is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": num_cached}
    return usage


@dataclass(frozen=True)
class Tokens:
    """What log-probabilities need to know about the tokens of an answer; see `TokenPlaces`."""

    tokenizer: Tokenizer | None
    skip_special_tokens: bool = True
    kept: Collection[int] = ()
    ends: Collection[int] = ()

    def places(self, *, continues: bool) -> TokenPlaces:
        """Those of one answer; continues: it is read right behind the prompt."""
        return TokenPlaces(
            self.tokenizer,
            self.skip_special_tokens,
            continues=continues,
            kept=self.kept,
            ends=self.ends,
        )


class Format(Protocol):
    """One of the two APIs. Choices are counted over all prompts and answers."""

    def whole(self, results: Sequence[RequestOutput], usage: dict[str, Any]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""

    def opening(self, num_choices: int, usage: str) -> str:
        """Events before the first text; usage: as for `piece`."""

    def piece(self, choice: int, chunk: OutputChunk, usage: str) -> str:
        """Events for one chunk, "" where it shows nothing; usage: "" or a JSON member."""

    def closing(self, usage: dict[str, Any]) -> str:
        """The event with the usage of the whole request."""


class CompletionFormat:
    """/v1/completions. echoes: for each choice the prompt's text to be shown before the answer."""

    def __init__(self, head: Head, tokens: Tokens, echoes: Sequence[str] = ()) -> None:
        self._head = head
        self._echoes = echoes
        self._places: dict[int, TokenPlaces] = defaultdict(  # by choice
            lambda: tokens.places(continues=True)
        )
        self._pending = dict(enumerate(echoes))
        self._start = (
            f'data: {{"id":{to_json(head.response_id)},"object":"text_completion",'
            f'"created":{head.created},"model":{to_json(head.model)},"choices":['
        )

    def whole(self, results: Sequence[RequestOutput], usage: dict[str, Any]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        outputs = [output for result in results for output in result.outputs]
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        return self._head.body("text_completion", choices, usage)

    def _choice(self, index: int, output: CompletionOutput) -> dict[str, Any]:
        logprobs = output.logprobs
        echo = self._echoes[index] if self._echoes else ""
        return {
            "index": index,
            "text": echo + output.text,
            "logprobs": None if logprobs is None else self._logprobs(index, logprobs),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def opening(self, num_choices: int, usage: str) -> str:
        """Nothing comes before the text."""
        return ""

    def piece(self, choice: int, chunk: OutputChunk, usage: str) -> str:
        """One event, or none while there is nothing to show."""
        text = self._pending.pop(choice, "") + chunk.text
        if not text and not chunk.logprobs and chunk.finish_reason is None:
            return ""
        logprobs = to_json(self._logprobs(choice, chunk.logprobs)) if chunk.logprobs else "null"
        return (
            f'{self._start}{{"index":{choice},"text":{to_json(text)},"logprobs":{logprobs},'
            f'"finish_reason":{to_json(chunk.finish_reason)},'
            f'"stop_reason":{to_json(chunk.stop_reason)}}}]{usage}}}\n\n'
        )

    def closing(self, usage: dict[str, Any]) -> str:
        """The event with the usage of the whole request."""
        return f'{self._start}],"usage":{to_json(usage)}}}\n\n'

    def _logprobs(self, choice: int, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        places = self._places[choice]
        names, tops, offsets = [], [], []
        for entry in entries:
            found = unique_names(places, (entry.token_id, *entry.top_token_ids))
            names.append(found[entry.token_id])
            top = zip(entry.top_token_ids, entry.top_logprobs, strict=True)
            # As vLLM: the token that was drawn is among them, even where it is not of the best.
            tops.append({found[token]: p for token, p in (*top, (entry.token_id, entry.logprob))})
            offsets.append(places.offset(entry.token_id))
            places.advance(entry.token_id)
        return {
            "tokens": names,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


class ChatFormat:
    """/v1/chat/completions.

    tools: how calls are written; None looks for none. max_calls: further ones are left out.
    """

    def __init__(
        self,
        head: Head,
        tokens: Tokens,
        tools: ToolFormat | None = None,
        max_calls: int | None = None,
    ) -> None:
        self._head = head
        self._tools = tools
        self._max_calls = max_calls
        self._places: dict[int, TokenPlaces] = defaultdict(  # by choice
            lambda: tokens.places(continues=False)
        )
        self._parsers: dict[int, ToolParser] = {}
        self._num_calls: dict[int, int] = {}
        self._start = (
            f'data: {{"id":{to_json(head.response_id)},"object":"chat.completion.chunk",'
            f'"created":{head.created},"model":{to_json(head.model)},"choices":['
        )

    def whole(self, results: Sequence[RequestOutput], usage: dict[str, Any]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        outputs = [output for result in results for output in result.outputs]
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        return self._head.body("chat.completion", choices, usage)

    def _choice(self, index: int, output: CompletionOutput) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": output.text}
        finish_reason = output.finish_reason
        if self._tools is not None:
            parser = make_parser(self._tools)
            pieces = [*parser.push(output.text), *parser.finish()]
            calls = [piece.as_json() for piece in pieces if isinstance(piece, ToolCall)]
            calls = calls[: self._max_calls]
            text = "".join(piece for piece in pieces if isinstance(piece, str))
            if calls:
                message = {"role": "assistant", "content": text.strip() or None}
                message["tool_calls"] = calls
                finish_reason = _with_calls(finish_reason)
        logprobs = output.logprobs
        return {
            "index": index,
            "message": message,
            "logprobs": None if logprobs is None else self._logprobs(index, logprobs),
            "finish_reason": finish_reason,
            "stop_reason": output.stop_reason,
        }

    def opening(self, num_choices: int, usage: str) -> str:
        """Each choice says who speaks."""
        delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        numbers = range(num_choices)
        return "".join(f'{self._start}{{"index":{i},{delta}}}]{usage}}}\n\n' for i in numbers)

    def piece(self, choice: int, chunk: OutputChunk, usage: str) -> str:
        """The text or the calls that a chunk adds, and the end."""
        if self._tools is None:
            deltas = [{"content": chunk.text}] if chunk.text else []
            finish_reason = chunk.finish_reason
        else:
            deltas, finish_reason = self._parse(choice, chunk, self._tools)
        if not deltas and not chunk.logprobs and finish_reason is None:
            return ""
        logprobs = to_json(self._logprobs(choice, chunk.logprobs)) if chunk.logprobs else "null"
        events = []
        for index, delta in enumerate(deltas or [{}]):
            is_last = index >= len(deltas) - 1
            events.append(
                f'{self._start}{{"index":{choice},"delta":{to_json(delta)},'
                f'"logprobs":{logprobs if is_last else "null"},'
                f'"finish_reason":{to_json(finish_reason if is_last else None)},'
                f'"stop_reason":{to_json(chunk.stop_reason if is_last else None)}}}]{usage}}}\n\n'
            )
        return "".join(events)

    def closing(self, usage: dict[str, Any]) -> str:
        """The event with the usage of the whole request."""
        return f'{self._start}],"usage":{to_json(usage)}}}\n\n'

    def _parse(
        self, choice: int, chunk: OutputChunk, tools: ToolFormat
    ) -> tuple[list[dict[str, Any]], str | None]:
        parser = self._parsers.setdefault(choice, make_parser(tools))
        pieces = parser.push(chunk.text)
        if chunk.finish_reason is not None:
            pieces += parser.finish()
        deltas: list[dict[str, Any]] = []
        for piece in pieces:
            if isinstance(piece, str):
                deltas.append({"content": piece})
            else:
                number = self._num_calls.get(choice, 0)
                if number == self._max_calls:
                    continue
                self._num_calls[choice] = number + 1
                deltas.append({"tool_calls": [{"index": number, **piece.as_json()}]})
        has_calls = bool(self._num_calls.get(choice))
        return deltas, _with_calls(chunk.finish_reason) if has_calls else chunk.finish_reason

    def _logprobs(self, choice: int, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        places = self._places[choice]
        content = []
        for entry in entries:
            names = unique_names(places, (entry.token_id, *entry.top_token_ids))
            tops = zip(entry.top_token_ids, entry.top_logprobs, strict=True)
            one, *others = (
                {"token": names[token], "logprob": logprob, "bytes": list(places.data(token))}
                for token, logprob in ((entry.token_id, entry.logprob), *tops)
            )
            content.append({**one, "top_logprobs": others})
            places.advance(entry.token_id)
        return {"content": content}


def unique_names(places: TokenPlaces, token_ids: Iterable[int]) -> dict[int, str]:
    """A name for each token at its place, all different: a second one of a name gets its number."""
    names: dict[int, str] = {}
    taken = set()
    for token_id in dict.fromkeys(token_ids):
        name = places.name(token_id)
        names[token_id] = f"token_id:{token_id}" if name in taken else name
        taken.add(name)
    return names


def _with_calls(finish_reason: str | None) -> str | None:
    return "tool_calls" if finish_reason == "stop" else finish_reason
