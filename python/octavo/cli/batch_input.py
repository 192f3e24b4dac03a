"""The lines of a batch: what each asks for, and what is wrong with it.

A line is one of
- OpenAI's batch format: {"custom_id", "method", "url", "body"}, for /v1/chat/completions and
  /v1/completions,
- an object with "prompt" (a text or token ids) or "messages", and any of the body's options,
- a JSON string, or any other text: the prompt itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import InvalidArgumentError, OctavoError
from octavo.files import reading
from octavo.sampling_params import SamplingParams
from octavo.text.chat import check_messages

if TYPE_CHECKING:
    from octavo.engine.outputs import RequestOutput
    from octavo.llm import LLM
    from octavo.prompts import EncodedPrompt
    from octavo.server.answers import Markup
    from octavo.server.formats import Format, Head
    from octavo.server.protocol import ChatBody, CompletionBody

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"


@dataclass(frozen=True)
class BatchRequest:
    """One line that the model can answer.

    body: as the server takes it. text: a bare prompt, which is answered if the model has a chat
    template and continued if not, as by `octavo generate`; None for other lines.
    """

    custom_id: str
    body: ChatBody | CompletionBody
    text: str | None
    params: SamplingParams

    @property
    def is_chat(self) -> bool | None:
        """Whether it is answered rather than continued; None lets the model decide."""
        from octavo.server.protocol import ChatBody

        return isinstance(self.body, ChatBody) if self.text is None else None

    @property
    def prompt(self) -> Any:
        """The request without its sampling options: a text, or an object."""
        from octavo.server.protocol import SamplingBody

        fields = set(type(self.body).model_fields) - set(SamplingBody.model_fields)
        made_of = self.body.model_dump(exclude_defaults=True, include=fields - _IN_PARAMS)
        if self.text is None:
            if "messages" in made_of:
                with suppress(InvalidArgumentError):  # which is reported when the line is answered
                    made_of["messages"] = check_messages(made_of["messages"])
            return made_of
        del made_of["messages" if "messages" in made_of else "prompt"]
        return {"text": self.text, **made_of} if made_of else self.text

    def body_for(self, is_chat: bool, system: str | None = None) -> ChatBody | CompletionBody:
        """The body with its prompt. system: goes before a bare prompt that is answered."""
        from octavo.server.protocol import ChatBody, CompletionBody

        if self.text is None:
            return self.body
        unlike = {"prompt", "messages", *_IN_PARAMS}
        options = self.body.model_dump(exclude_unset=True, exclude=unlike)
        if not is_chat:
            return CompletionBody.model_validate({**options, "prompt": self.text})
        messages = [{"role": "user", "content": self.text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return ChatBody.model_validate({**options, "messages": messages})

    def encode(self, llm: LLM, is_chat: bool, system: str | None) -> EncodedPrompt:
        """Its token ids. Raises an ApiError for options that do not go with `is_chat`."""
        from octavo.server import prepare
        from octavo.server.protocol import ChatBody, check_supported

        body = self.body_for(is_chat, system)
        check_supported(body)
        if isinstance(body, ChatBody):
            return prepare.encode_chat(llm, body, markup_of(llm, body))
        return prepare.encode_completion(llm, body)[0]

    def params_for(self, llm: LLM, prompt: EncodedPrompt, is_chat: bool) -> SamplingParams:
        """Its sampling parameters, with a grammar of calls where it demands one."""
        from octavo.server import prepare
        from octavo.server.protocol import ChatBody

        body = self.body_for(is_chat)
        if not isinstance(body, ChatBody):
            return self.params
        return prepare.steer(self.params, llm, body, markup_of(llm, body), prompt.text)

    def answer_format(self, llm: LLM, head: Head, output: RequestOutput, is_chat: bool) -> Format:
        """How the answer is written."""
        from octavo.prompts import EncodedPrompt
        from octavo.server import prepare
        from octavo.server.protocol import ChatBody

        body = self.body_for(is_chat)
        prompt = EncodedPrompt(output.prompt, output.prompt_token_ids)
        if isinstance(body, ChatBody):
            markup = markup_of(llm, body)
            prompt = replace(prompt, kept_special_ids=prepare.kept_ids(llm, body, markup))
            return prepare.chat_format(llm, body, head, self.params, markup, prompt)
        return prepare.completion_format(llm, body, head, [prompt])


# Fields of a chat or a completion that are in its sampling parameters.
_IN_PARAMS = {"max_completion_tokens", "logprobs", "top_logprobs", "best_of"}


def markup_of(llm: LLM, body: ChatBody) -> Markup:
    """How the model writes what is no plain text, by the chat template that makes its prompt."""
    from octavo.server import answers

    if body.chat_template is not None:
        return answers.detect_markup(body.chat_template)
    return answers.markup_of(llm.chat_template)


@dataclass(frozen=True)
class BadLine:
    """One line that cannot be answered."""

    custom_id: str
    message: str


@dataclass(frozen=True)
class Defaults:
    """Options of lines that give none; temperature None: 1 in OpenAI's lines, else 0."""

    temperature: float | None = None
    max_tokens: int = 256
    others: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchLine:
    """A line of the input and its name: its custom_id, else "line-N" counted from 1."""

    number: int
    custom_id: str
    text: str


def read_lines(path: Path) -> Iterator[BatchLine]:
    """The lines of a file without the blank ones. Bytes that are not UTF-8 become U+FFFD."""
    with reading(path, "a file with one prompt a line"):
        file = path.open("rb")
    with file:
        for number, data in enumerate(file, start=1):
            text = data.decode("utf-8", errors="replace").strip("\r\n").removeprefix("\ufeff")
            if text.strip():
                yield BatchLine(number, _custom_id(number, text), text)


def check_ids(path: Path) -> list[str]:
    """The ids of all lines in order; InvalidArgumentError if two lines have the same one."""
    seen: dict[str, int] = {}
    for line in read_lines(path):
        first = seen.setdefault(line.custom_id, line.number)
        if first != line.number:
            raise InvalidArgumentError(
                f"{path}: custom_id {line.custom_id!r} is on line {first} and on line "
                f"{line.number}; expected a different one for each line, since answers come in "
                "any order and are told apart by it"
            )
    return list(seen)


def parse_line(line: BatchLine, defaults: Defaults) -> BatchRequest | BadLine:
    """What a line asks for; every mistake in it becomes a BadLine that names it."""
    try:
        return _parse(line, defaults)
    except OctavoError as error:
        return BadLine(line.custom_id, f"line {line.number}: {error}")


def _custom_id(number: int, text: str) -> str:
    if text.lstrip().startswith("{"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = {}
        name = found.get("custom_id") if isinstance(found, dict) else None
        if isinstance(name, str) and name:
            return name
    return f"line-{number}"


def _parse(line: BatchLine, defaults: Defaults) -> BatchRequest:
    text = line.text.strip()
    if text.startswith("{"):
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidArgumentError(f"no valid JSON: {error}") from error
        if "custom_id" in content and line.custom_id != content["custom_id"]:
            raise InvalidArgumentError(
                f"custom_id is {content['custom_id']!r}; expected a string that is not empty"
            )
        if "body" in content or "url" in content or "method" in content:
            return _parse_openai(line.custom_id, content, defaults)
        return _parse_plain(line.custom_id, content, defaults)
    return _text_request(line.custom_id, text_of(line.text), {}, defaults)


def text_of(line: str) -> str:
    """The text that a line is: itself, or what a JSON string holds."""
    if line.lstrip().startswith('"'):
        with suppress(ValueError):  # a text that begins with a quotation mark
            return str(json.loads(line))
    return line


def _parse_openai(custom_id: str, content: dict[str, Any], defaults: Defaults) -> BatchRequest:
    if "custom_id" not in content:
        raise InvalidArgumentError("custom_id is missing; OpenAI's batch lines need one")
    if content.get("method", "POST") != "POST":
        raise InvalidArgumentError(f"method is {content['method']!r}; expected 'POST'")
    url, body = content.get("url"), content.get("body")
    if url not in (CHAT_URL, COMPLETIONS_URL):
        raise InvalidArgumentError(f"url is {url!r}; expected {CHAT_URL} or {COMPLETIONS_URL}")
    if not isinstance(body, dict):
        raise InvalidArgumentError(f"body is {type(body).__name__}; expected an object")
    is_chat = url == CHAT_URL
    key = "messages" if is_chat else "prompt"
    if key not in body:
        raise InvalidArgumentError(f"body has no {key!r}, which {url} needs")
    return _request(custom_id, body, is_chat, defaults, 1.0)


def _parse_plain(custom_id: str, content: dict[str, Any], defaults: Defaults) -> BatchRequest:
    keys = [key for key in ("prompt", "messages") if key in content]
    if len(keys) != 1:
        raise InvalidArgumentError(
            f"has the fields {', '.join(map(repr, content)) or '(none)'}; expected either 'prompt' "
            "or 'messages', or OpenAI's custom_id, method, url and body"
        )
    body = {name: value for name, value in content.items() if name != "custom_id"}
    if isinstance(body.get("prompt"), str):
        return _text_request(custom_id, body.pop("prompt"), body, defaults)
    return _request(custom_id, body, "messages" in body, defaults, 0.0)


def _text_request(
    custom_id: str, text: str, options: dict[str, Any], defaults: Defaults
) -> BatchRequest:
    # Completions have a number in "logprobs"; chats have true there, and "top_logprobs".
    is_chat = type(options.get("logprobs")) is not int
    prompt = {"messages": [{"role": "user", "content": text}]} if is_chat else {"prompt": text}
    return replace(_request(custom_id, {**options, **prompt}, is_chat, defaults, 0.0), text=text)


def _request(
    custom_id: str, body: dict[str, Any], is_chat: bool, defaults: Defaults, temperature: float
) -> BatchRequest:
    """The body as the server would read it; InvalidArgumentError for what is not supported.

    temperature: the default where neither the body nor the command gives one.
    """
    from pydantic import ValidationError

    from octavo.server.errors import ApiError, validation_error
    from octavo.server.prepare import read_params
    from octavo.server.protocol import ChatBody, CompletionBody

    _check_prompt(body)
    try:
        read = (ChatBody if is_chat else CompletionBody).model_validate(body, strict=True)
        _check_options(read)
        given = {
            "max_tokens": defaults.max_tokens,
            "temperature": temperature if defaults.temperature is None else defaults.temperature,
            **defaults.others,
        }
        return BatchRequest(custom_id, read, None, read_params(read, given))
    except ValidationError as error:
        raise InvalidArgumentError(validation_error(error.errors()).message) from error
    except ApiError as error:
        raise InvalidArgumentError(error.message) from error


def _check_prompt(body: dict[str, Any]) -> None:
    """Check what a batch allows; messages are checked further when they are rendered."""
    if "messages" in body:
        messages = body["messages"]
        if not isinstance(messages, list):
            raise InvalidArgumentError(f"messages is {type(messages).__name__}; expected a list")
        return
    prompt = body["prompt"]
    is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not isinstance(prompt, str) and not (is_ids and prompt):
        raise InvalidArgumentError(
            f"prompt is {str(prompt)[:60]!r}; expected a text or a list of token ids (one prompt a "
            "line)"
        )


def _check_options(body: ChatBody | CompletionBody) -> None:
    """Refuse options that only a server offers, and unknown ones."""
    from octavo.server.protocol import slips

    for name in ("stream", "timeout"):
        if getattr(body, name):
            raise InvalidArgumentError(f"{name} is not offered in a batch: leave it out")
    for name, meant in slips(body).items():
        advice = "leave it out" if meant is None else f"perhaps {meant} was meant"
        raise InvalidArgumentError(f"{name} is unknown: {advice}")
