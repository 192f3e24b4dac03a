"""Answers as OpenAI's API writes them: whole, or piece by piece as server-sent events."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from octavo.engine.outputs import CompletionOutput, OutputChunk, RequestOutput, TokenLogprob
from octavo.server.answers import AnswerParser, Piece, Reading
from octavo.server.errors import ApiError
from octavo.server.prompt_logprobs import PromptLogprobs, legacy_logprobs, unique_names
from octavo.server.reasoning import Reasoning
from octavo.server.tool_calls import Arguments, ToolCall
from octavo.text.places import TokenPlaces

DONE = "data: [DONE]\n\n"
to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
NewPlaces = Callable[[], TokenPlaces]


class Head(NamedTuple):
    """What every piece of an answer says: its id, when it was begun (Unix time), the model."""

    response_id: str
    created: int
    model: str


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


class WholeFormat(ABC):
    """How the results of a request are written in one body."""

    @abstractmethod
    def whole(self, results: Sequence[RequestOutput], usage: dict[str, Any]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""

    async def text(self, results: Sequence[RequestOutput], usage: dict[str, Any]) -> str:
        """The same as JSON."""
        return to_json(self.whole(results, usage))


class Format(WholeFormat):
    """One of the APIs for texts. Choices are counted over all prompts and answers."""

    @abstractmethod
    def opening(self, num_choices: int, usage: str) -> str:
        """Events before the first text; usage: as for `piece`."""

    @abstractmethod
    def piece(self, choice: int, chunk: OutputChunk, usage: str) -> str:
        """Events for one chunk, "" where it shows nothing; usage: "" or a JSON member."""

    @abstractmethod
    def closing(self, usage: dict[str, Any] | None) -> str:
        """What ends a stream; usage: of the whole request, None where it is not to be written."""

    @abstractmethod
    def failed(self, error: ApiError) -> str:
        """What ends a stream after an error."""


class ChoicesFormat(Format):
    """One of OpenAI's two older APIs, whose answers are `choices`.

    new_places: makes what log-probabilities need to know of one answer's tokens; None: they are
    not asked for. prompt_logprobs: how those of the prompt are written.
    """

    object_name: ClassVar[str]
    chunk_name: ClassVar[str]

    def __init__(
        self,
        head: Head,
        new_places: NewPlaces | None,
        prompt_logprobs: PromptLogprobs | None = None,
    ) -> None:
        self._head = head
        self._prompt_logprobs = prompt_logprobs or PromptLogprobs(None)
        self._places: dict[int, TokenPlaces] = defaultdict(new_places)  # by choice
        self._start = f"data: {to_json(self._body(self.chunk_name))[:-1]},"

    def whole(self, results: Sequence[RequestOutput], usage: dict[str, Any]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        outputs = [(result, output) for result in results for output in result.outputs]
        choices = [self._whole_choice(i, *output) for i, output in enumerate(outputs)]
        found = {"choices": choices, "usage": usage}
        return {**self._body(self.object_name), **found, **self._more(results[0])}

    def opening(self, num_choices: int, usage: str) -> str:
        """Events before the first text; usage: as for `piece`."""
        return ""

    def closing(self, usage: dict[str, Any] | None) -> str:
        """What ends a stream; usage: of the whole request, None where it is not to be written."""
        shown = "" if usage is None else self._event([], f',"usage":{to_json(usage)}')
        return shown + DONE

    def failed(self, error: ApiError) -> str:
        """What ends a stream after an error."""
        return f"data: {error.as_json()}\n\n{DONE}"

    def _more(self, result: RequestOutput) -> dict[str, Any]:
        """What the body has besides the choices."""
        return {}

    @abstractmethod
    def _whole_choice(
        self, index: int, result: RequestOutput, output: CompletionOutput
    ) -> dict[str, Any]:
        """One answer that is not streamed."""

    @abstractmethod
    def _logprobs(self, places: TokenPlaces, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The log-probabilities of an answer's next tokens."""

    def _body(self, name: str) -> dict[str, Any]:
        response_id, created, model = self._head
        return {"id": response_id, "object": name, "created": created, "model": model}

    def _event(self, choices: Sequence[Mapping[str, Any]], usage: str) -> str:
        return f'{self._start}"choices":{to_json(choices)}{usage}}}\n\n'

    def _choice(
        self,
        index: int,
        content: Mapping[str, Any],
        logprobs: Sequence[TokenLogprob] | None,
        finish_reason: str | None,
        stop_reason: str | int | None,
    ) -> dict[str, Any]:
        found = None if logprobs is None else self._logprobs(self._places[index], logprobs)
        ends = {"finish_reason": finish_reason, "stop_reason": stop_reason}
        return {"index": index, **content, "logprobs": found, **ends}


class CompletionFormat(ChoicesFormat):
    """/v1/completions. echoes: for each choice the prompt's text to be shown before the answer."""

    object_name = chunk_name = "text_completion"

    def __init__(
        self,
        head: Head,
        new_places: NewPlaces | None,
        echoes: Sequence[str] = (),
        prompt_logprobs: PromptLogprobs | None = None,
    ) -> None:
        super().__init__(head, new_places, prompt_logprobs)
        self._echoes = dict(enumerate(echoes))  # those that have not been shown

    def _whole_choice(
        self, index: int, result: RequestOutput, output: CompletionOutput
    ) -> dict[str, Any]:
        echo = self._echoes.get(index)
        content = {"text": (echo or "") + output.text}
        ends = (output.finish_reason, output.stop_reason)
        choice = self._choice(index, content, output.logprobs, *ends)
        if echo is not None and choice["logprobs"] is not None:
            choice["logprobs"] = self._prompt_logprobs.before(choice["logprobs"], result, echo)
        return choice | self._prompt_logprobs.member(result)

    def piece(self, choice: int, chunk: OutputChunk, usage: str) -> str:
        text = self._echoes.pop(choice, "") + chunk.text
        if not text and not chunk.logprobs and chunk.finish_reason is None:
            return ""
        ends = (chunk.finish_reason, chunk.stop_reason)
        found = self._choice(choice, {"text": text}, chunk.logprobs or None, *ends)
        return self._event([found], usage)

    def _logprobs(self, places: TokenPlaces, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        return legacy_logprobs(places, entries)


class ChatFormat(ChoicesFormat):
    """/v1/chat/completions. reading: how the answers are read."""

    object_name, chunk_name = "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        head: Head,
        new_places: NewPlaces | None,
        reading: Reading | None = None,
        prompt_logprobs: PromptLogprobs | None = None,
    ) -> None:
        super().__init__(head, new_places, prompt_logprobs)
        self._reading = reading or Reading()
        self._parsers: dict[int, AnswerParser] = {}

    def _more(self, result: RequestOutput) -> dict[str, Any]:
        return self._prompt_logprobs.member(result)

    def _whole_choice(
        self, index: int, result: RequestOutput, output: CompletionOutput
    ) -> dict[str, Any]:
        texts, thoughts, calls = [], [], []
        parser = AnswerParser(self._reading)
        for piece in [*parser.push(output.text), *parser.finish()]:
            if isinstance(piece, str):
                texts.append(piece)
            elif isinstance(piece, Reasoning):
                thoughts.append(piece.text)
            elif isinstance(piece, ToolCall):
                calls.append(piece.as_json())
            else:
                calls[-1]["function"]["arguments"] += piece.text
        text, finish_reason = "".join(texts), output.finish_reason
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thoughts:
            message |= {"content": text or None, **_reasoning("".join(thoughts))}
        if calls:
            message |= {"content": text.strip() or None, "tool_calls": calls}
        if parser.ends_with_call:
            finish_reason = _with_calls(finish_reason)
        content = {"message": message}
        return self._choice(index, content, output.logprobs, finish_reason, output.stop_reason)

    def opening(self, num_choices: int, usage: str) -> str:
        """Each choice says who speaks."""
        delta = {"role": "assistant", "content": ""}
        choice = {"delta": delta, "logprobs": None, "finish_reason": None}
        numbers = range(num_choices)
        return "".join(self._event([{"index": i, **choice}], usage) for i in numbers)

    def piece(self, choice: int, chunk: OutputChunk, usage: str) -> str:
        if choice not in self._parsers:
            self._parsers[choice] = AnswerParser(self._reading)
        parser = self._parsers[choice]
        pieces = parser.push(chunk.text)
        finish_reason = chunk.finish_reason
        if finish_reason is not None:
            pieces += parser.finish()
        deltas = _deltas(pieces, parser.num_calls)
        if parser.ends_with_call:
            finish_reason = _with_calls(finish_reason)
        if not deltas and not chunk.logprobs and finish_reason is None:
            return ""
        *others, last = deltas or [{}]
        found = [self._choice(choice, {"delta": delta}, None, None, None) for delta in others]
        ends = (finish_reason, chunk.stop_reason)
        found.append(self._choice(choice, {"delta": last}, chunk.logprobs or None, *ends))
        return "".join(self._event([one], usage) for one in found)

    def _logprobs(self, places: TokenPlaces, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
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


def _deltas(pieces: Sequence[Piece], num_calls: int) -> list[dict[str, Any]]:
    """As "delta" has them. num_calls: how many calls there are, those among the pieces included."""
    number = num_calls - sum(isinstance(piece, ToolCall) for piece in pieces) - 1
    deltas: list[dict[str, Any]] = []
    for piece in pieces:
        if isinstance(piece, str):
            deltas.append({"content": piece})
        elif isinstance(piece, Reasoning):
            deltas.append(_reasoning(piece.text))
        elif isinstance(piece, Arguments):
            more = {"index": number, "function": {"arguments": piece.text}}
            deltas.append({"tool_calls": [more]})
        else:
            number += 1
            deltas.append({"tool_calls": [{"index": number, **piece.as_json()}]})
    return deltas


def _reasoning(text: str) -> dict[str, Any]:
    """Under both names that clients look for: vLLM's and llama.cpp's."""
    return {"reasoning": text, "reasoning_content": text}


def _with_calls(finish_reason: str | None) -> str | None:
    return "tool_calls" if finish_reason == "stop" else finish_reason
