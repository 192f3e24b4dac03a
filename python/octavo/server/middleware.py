"""What every request passes before it reaches a route: id, key, size, and the log afterwards.

Plain ASGI, outside of FastAPI, so that every failure inside is answered and logged here. The body
is read here too, up to a limit, before anything else is done with it.
"""

from __future__ import annotations

import hmac
import json
import logging
import re
import secrets
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.server.errors import ApiError, bad_request, is_of_messages, to_api_error
from octavo.server.logs import log_event
from octavo.server.options import ServerOptions
from octavo.server.response_writer import CLIENT_GONE
from octavo.structured_outputs import is_deeper

_log = logging.getLogger("octavo.access")
# Clients and scrapers that have no key may look at these; vLLM asks for a key under /v1 alone.
_OPEN_PATHS = frozenset(
    {
        *("/", "/docs", "/favicon.ico", "/openapi.json"),
        *("/health", "/ready", "/ping", "/version", "/metrics"),
    }
)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}.*")
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# Of lists and objects: so few that whatever reads, copies or writes a value gets to its end, since
# most of it recurses, and more than any schema that a grammar can follow.
MAX_DEPTH = 256


class RequestMiddleware:
    """Wraps the application. `scope["state"]["notes"]` is what a route adds to the log line."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app = app
        self._options = options
        self._keys = [key.encode() for key in options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; other things of ASGI pass as they are."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16)
        traceparent = headers.get("traceparent", "")
        trace = _TRACEPARENT.fullmatch(traceparent)
        notes: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=request_id, notes=notes)
        status, started = 0, time.monotonic()
        # HEAD is answered as GET is; the HTTP server leaves the body out.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                marked = MutableHeaders(scope=message)
                marked["X-Request-Id"] = request_id
                if is_of_messages(scope["path"]):  # where Anthropic's clients look for it
                    marked["Request-Id"] = request_id
                if trace:
                    marked["traceparent"] = traceparent
            await send(message)

        try:
            self._check_key(scope["path"], headers)
            receive = await self._read_body(scope, headers, receive)
            await self._app(inner, receive, send_marked)
        except ApiError as error:
            notes["error"] = error.message
            await error.response(scope)(scope, receive, send_marked)
        except Exception as error:
            _log.exception("a request failed in a way that octavo did not foresee")
            if not status:
                await to_api_error(error).response(scope)(scope, receive, send_marked)
        finally:
            # What the page and the probes ask for all the time is not worth a line each.
            quiet = _is_open(scope["path"]) or scope["path"] == "/engine"
            log_event(
                _log,
                logging.DEBUG if quiet else logging.INFO,
                "request",
                request_id=request_id,
                method=scope["method"],
                path=scope["path"],
                status=status or CLIENT_GONE,
                seconds=round(time.monotonic() - started, 4),
                client=scope["client"][0] if scope.get("client") else None,
                trace_id=trace[1] if trace else None,
                parent_id=trace[2] if trace else None,
                **notes,
            )

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._keys or _is_open(path):
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        bearer = given.strip() if kind.lower() == "bearer" else ""
        presented = [bearer.encode(), headers.get("x-api-key", "").strip().encode()]
        # Every key is compared, each in constant time.
        matches = [hmac.compare_digest(one, key) for one in presented for key in self._keys]
        if not any(matches):
            raise ApiError(
                401,
                "the API key is missing or wrong; expected the header "
                "'Authorization: Bearer KEY', or 'X-Api-Key: KEY', with a key that this server was "
                "started with",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read_body(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """Read the body to its end; returns a `receive` that gives it again, and then goes on."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        declared = headers.get("content-length", "")
        self._check_size(int(declared[:20]) if declared.isdecimal() else 0)
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(CLIENT_GONE, "the client went before its request was whole")
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            self._check_size(size)
            more = message.get("more_body", False)
        body = b"".join(chunks)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if body and kind != "application/json":
            raise ApiError(415, f"the content type is {kind!r}; expected application/json")
        if is_deeper(body, MAX_DEPTH):
            raise bad_request(
                f"the body has more than {MAX_DEPTH} lists and objects within each other: nest "
                "them less deep"
            )
        _check_unicode(body)
        again = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return again.pop() if again else await receive()

        return receive_again

    def _check_size(self, size: int) -> None:
        limit = self._options.max_body_bytes
        if size > limit:
            raise ApiError(
                413,
                f"the body has more than {limit} bytes: send less, or start the server with a "
                f"larger --max-body-bytes",
                code="body_too_large",
            )


def _is_open(path: str) -> bool:
    return path in _OPEN_PATHS or path.startswith("/static/")


def _check_unicode(body: bytes) -> None:
    """Refuse half of a surrogate pair, which JSON may spell and no text may hold."""
    if not _LONE_SURROGATE.search(body):
        return
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise bad_request(
            "the body spells half of a surrogate pair (\\ud800 to \\udfff), which is no Unicode "
            "character"
        ) from error
    except ValueError:
        return  # no JSON at all: the route says so
