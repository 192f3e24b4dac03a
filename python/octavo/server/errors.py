"""Errors as HTTP has them: a status, and the JSON object that the API's clients expect."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from octavo.errors import (
    AdapterNotFoundError,
    AdaptersInUseError,
    EngineStepError,
    InvalidArgumentError,
    OctavoError,
    QueueFullError,
    ShutdownError,
    TokenizerError,
)

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import Scope

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    500: "internal_error",
    503: "unavailable_error",
    504: "timeout_error",
}
# What Anthropic's API calls them.
_MESSAGES_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
# The status and the code of octavo's errors, the first that fits.
_STATUSES: tuple[tuple[type[OctavoError], int, str], ...] = (
    (QueueFullError, 429, "queue_full"),
    (AdaptersInUseError, 429, "adapters_in_use"),
    (ShutdownError, 503, "draining"),
    (EngineStepError, 500, "engine_step_failed"),
    (OctavoError, 500, "engine_error"),
)
# "temperature is -1; …", "messages[0].content is …", "an entry of stop_token_ids is …".
_FIELD = re.compile(
    r"(?:an? (?:entry|token id) of )?([a-z_]+(?:\[\d+\]|\.\w+)*) (?:is|has|holds|of)\b"
)
MAX_MESSAGE = 2000  # characters; a message quotes values of any length
_NO_FIELDS = frozenset({"the", "this", "an", "a", "token"})


@dataclass(eq=False, repr=False)
class ApiError(Exception):
    """What a client gets instead of an answer.

    status: of HTTP. param: the field at fault; code: a word for programs; headers: more of HTTP's.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        self.message, self.param = _shortened(self.message), self.param and _shortened(self.param)
        super().__init__(self.message)
        if self.status in (429, 503):
            self.headers = {**(self.headers or {}), "Retry-After": "1"}

    @property
    def for_log(self) -> str:
        """What the log may say of it: with status 400 a message quotes what was sent."""
        if self.status != 400:
            return self.message
        return f"{self.code or 'invalid_request_error'} ({self.param or 'the body'})"

    def as_json(self) -> str:
        """{"error": {…}}, as OpenAI has it; ASCII, since a message may quote invalid Unicode."""
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error})

    def as_messages_json(self, request_id: str | None) -> str:
        """{"type": "error", …}, as Anthropic has it, where only the message can name a field."""
        names_it = self.param is None or self.param in self.message
        error = {
            "type": _MESSAGES_TYPES.get(self.status, "invalid_request_error"),
            "message": self.message if names_it else f"{self.param}: {self.message}",
        }
        return json.dumps({"type": "error", "error": error, "request_id": request_id})

    def response(self, scope: Scope) -> Response:
        """The error as an answer to the request of this scope, as that API has errors."""
        from starlette.responses import Response

        if is_of_messages(scope["path"]):
            content = self.as_messages_json(scope.get("state", {}).get("request_id"))
        else:
            content = self.as_json()
        return Response(content, self.status, self.headers, "application/json")


def is_of_messages(path: str) -> bool:
    """Whether this is a route of Anthropic's Messages API."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def bad_request(message: str, param: str | None = None) -> ApiError:
    """Status 400."""
    return ApiError(400, message, param=param)


def to_api_error(error: Exception, param: str | None = None) -> ApiError:
    """Any exception as what to tell a client; unknown ones keep their details to the log.

    param: the field that is to blame when the message does not begin with one.
    """
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if isinstance(error, AdapterNotFoundError):
        return ApiError(404, message, param="model", code="model_not_found")
    if isinstance(error, (InvalidArgumentError, TokenizerError)):
        code = "context_length_exceeded" if "max_model_len" in message else None
        return ApiError(400, message, param=field_of(message) or param, code=code)
    for kind, status, code in _STATUSES:
        if isinstance(error, kind):
            return ApiError(status, message, code=code)
    return ApiError(500, "octavo failed on this request; its log says why", code="internal_error")


@contextlib.contextmanager
def in_own_words(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors name what the client sent. names: as of `renamed`."""
    try:
        yield
    except ApiError as error:
        raise renamed(error, names) from error


def renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """The error with other names for these fields and places, wherever it holds them."""
    words = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w.])(?:{words})(?!\w)" if names else r"(?!)")

    def rename(text: str) -> str:
        return pattern.sub(lambda found: names[found[0]], text)

    return replace(error, message=rename(error.message), param=error.param and rename(error.param))


def _shortened(text: str) -> str:
    """Its beginning, which names a field, and its end, which says what to do."""
    half = MAX_MESSAGE // 2
    return text if len(text) <= MAX_MESSAGE else f"{text[:half]} … {text[-half:]}"


def field_of(message: str) -> str | None:
    """The field that one of octavo's messages begins with, if it does."""
    found = _FIELD.match(message)
    return found[1] if found and found[1] not in _NO_FIELDS else None


# What pydantic calls a body that is none.
_NO_OBJECT = ("missing", "dict_type", "model_type", "model_attributes_type")


def validation_error(problems: Sequence[Any]) -> ApiError:
    """What pydantic found, as one message; param is the first field."""
    parts, first = [], None
    for problem in problems[:5]:
        location = [part for part in problem.get("loc", ()) if part != "body"]
        field = _field_name(location)
        if problem.get("type") == "json_invalid":
            field, text = "", f"the body is no JSON: {problem.get('ctx', {}).get('error', '')}"
        elif not field and problem.get("type") in _NO_OBJECT:
            given = problem.get("input")
            kind = "empty or null" if given is None else f"of type {type(given).__name__}"
            text = f"the body is {kind}; expected a JSON object with the fields of the request"
        else:
            reason = problem.get("msg", "is wrong").removeprefix("Value error, ")
            text = f"{field}: {reason}" if field else reason
        first = first or field or None
        parts.append(text)
    return ApiError(400, "; ".join(dict.fromkeys(parts)) or "the body is wrong", param=first)


def _field_name(location: Sequence[Any]) -> str:
    """("messages", 0, "role") -> "messages[0].role"; the names of alternatives are left out."""
    name = ""
    for part in location:
        if isinstance(part, str) and part[:1].isupper():
            continue  # the name of a body's class
        if isinstance(part, int):
            name += f"[{part}]"
        elif not name:
            name = str(part) if str(part).isidentifier() else ""
        elif part.isidentifier() and part not in ("str", "bool", "int", "dict", "list"):
            name += f".{part}"
    return name
