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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.errors import InvalidArgumentError, OctavoError
from octavo.files import reading
from octavo.sampling_params import SamplingParams

CHAT_URL = "/v1/chat/completions"
COMPLETIONS_URL = "/v1/completions"

# Options of a body that have an equal among SamplingParams.
_NUMBER: tuple[type, ...] = (int, float)
_SAME_NAME: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p"), _NUMBER),
    **dict.fromkeys(("top_k", "seed", "max_tokens", "min_tokens", "n"), (int,)),
    **dict.fromkeys(("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"), (bool,)),
}
# Options that change nothing here, whatever their value.
_IGNORED = frozenset({"model", "user", "metadata", "store", "service_tier"})
# Options that octavo does not have: welcome only with a value that asks for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
}


@dataclass(frozen=True)
class BatchRequest:
    """One line that can be asked of the model.

    prompt: a text, token ids, or messages. is_chat: None lets the model decide (a chat template or
    none), as `octavo generate` does; only a text leaves it open.
    """

    custom_id: str
    prompt: Any
    is_chat: bool | None
    params: SamplingParams


@dataclass(frozen=True)
class BadLine:
    """One line that cannot."""

    custom_id: str
    message: str


@dataclass(frozen=True)
class Defaults:
    """What a line that says nothing gets; temperature None: 1 in OpenAI's lines, else 0."""

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
    """The lines of a file but for the blank ones. Bytes that are no UTF-8 become U+FFFD."""
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
    prompt = line.text
    if text.startswith('"'):
        try:
            prompt = json.loads(text)
        except ValueError:
            prompt = line.text  # a text that begins with a quotation mark
    return BatchRequest(line.custom_id, prompt, None, _params({}, defaults, 0.0, is_chat=True))


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
    options = {name: value for name, value in body.items() if name != key}
    params = _params(options, defaults, 1.0, is_chat=is_chat)
    return BatchRequest(custom_id, _checked_prompt(key, body[key]), is_chat, params)


def _parse_plain(custom_id: str, content: dict[str, Any], defaults: Defaults) -> BatchRequest:
    keys = [key for key in ("prompt", "messages") if key in content]
    if len(keys) != 1:
        raise InvalidArgumentError(
            f"has the fields {', '.join(map(repr, content)) or '(none)'}; expected either 'prompt' "
            "or 'messages', or OpenAI's custom_id, method, url and body"
        )
    key = keys[0]
    options = {name: value for name, value in content.items() if name not in (key, "custom_id")}
    is_chat = True if key == "messages" else None if isinstance(content[key], str) else False
    params = _params(options, defaults, 0.0, is_chat=is_chat is not False)
    return BatchRequest(custom_id, _checked_prompt(key, content[key]), is_chat, params)


def _checked_prompt(key: str, value: Any) -> Any:
    """Messages are checked when they are rendered; a prompt here, for a wrong type."""
    if key == "messages":
        if not isinstance(value, list):
            raise InvalidArgumentError(f"messages is {type(value).__name__}; expected a list")
        return value
    is_ids = isinstance(value, list) and all(type(token) is int for token in value)
    if not isinstance(value, str) and not (is_ids and value):
        raise InvalidArgumentError(
            f"prompt is {str(value)[:60]!r}; expected a text or a list of token ids (one prompt a "
            "line)"
        )
    return value


def _params(
    body: Mapping[str, Any], defaults: Defaults, temperature: float, *, is_chat: bool
) -> SamplingParams:
    """A body's options; InvalidArgumentError for one that octavo would have to ignore."""
    options: dict[str, Any] = {
        **defaults.others,
        "max_tokens": defaults.max_tokens,
        "temperature": temperature if defaults.temperature is None else defaults.temperature,
    }
    body = dict(body)
    if body.get("max_completion_tokens") is not None:
        body["max_tokens"] = body["max_completion_tokens"]
    body.pop("max_completion_tokens", None)
    logprobs = _num_logprobs(body, is_chat)
    for name, value in body.items():
        if value is None or name in _IGNORED:
            continue
        if name in _SAME_NAME:
            kinds = _SAME_NAME[name]
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                expected = " or ".join(kind.__name__ for kind in kinds)
                raise InvalidArgumentError(f"{name} is {value!r}; expected {expected}")
            options[name] = value
        elif name == "stop":
            options["stop"] = tuple(value) if isinstance(value, list) else (value,)
        elif name == "stop_token_ids" and isinstance(value, list):
            options["stop_token_ids"] = tuple(value)
        elif value not in _NEUTRAL.get(name, ()):
            known = "is not supported with this value" if name in _NEUTRAL else "is unknown"
            raise InvalidArgumentError(f"{name} {known}: {json.dumps(value)[:80]}; leave it out")
    return SamplingParams(**options, logprobs=logprobs)


def _num_logprobs(body: dict[str, Any], is_chat: bool) -> int | None:
    """How many alternatives to report: chat says it in two fields, completions in one."""
    asked, top = body.pop("logprobs", None), body.pop("top_logprobs", None)
    if asked is None or asked is False:
        if top:
            raise InvalidArgumentError("top_logprobs needs logprobs: true")
        return None
    if asked is True and is_chat:
        return 0 if top is None else top
    if type(asked) is int and top is None:
        return asked
    raise InvalidArgumentError(
        f"logprobs is {asked!r}; expected true or false with messages, a number with a prompt"
    )
