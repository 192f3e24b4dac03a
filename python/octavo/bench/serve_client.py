"""A client of OpenAI's API that does no more than a load test needs, so that it costs little.

HTTP/1.1 over asyncio's streams, a connection a request, and of each server-sent event the time it
came. A general client does more, and on a small machine would take that time from the server.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from octavo.bench.serve_workload import Job
from octavo.errors import InvalidArgumentError, OctavoError


@dataclass
class Record:
    """The result of one request; times in seconds of `time.perf_counter`.

    chunk_times: when each piece of text came; pieces: the text. status: of HTTP, 0 where there was
    no answer. num_cached_tokens: of the prompt, in the server's cache; None where it does not tell.
    """

    start: float
    end: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_answer_tokens: int = 0
    status: int = 0
    error: str | None = None
    num_cached_tokens: int | None = None

    @property
    def ok(self) -> bool:
        """Whether the whole answer came."""
        return self.error is None and self.status == 200 and bool(self.chunk_times)

    @property
    def text(self) -> str:
        """The answer."""
        return "".join(self.pieces)

    @property
    def ttft(self) -> float:
        """Seconds to the first text."""
        return self.chunk_times[0] - self.start

    @property
    def e2e(self) -> float:
        """Seconds to the end."""
        return self.end - self.start

    @property
    def gaps(self) -> list[float]:
        """Seconds between one piece of text and the next."""
        return [after - before for before, after in pairwise(self.chunk_times)]

    @property
    def mean_gap(self) -> float:
        """Seconds for each token after the first; 0 for a single one."""
        count = self.num_answer_tokens - 1
        return (self.chunk_times[-1] - self.chunk_times[0]) / count if count > 0 else 0.0


class Client:
    """Asks one server. url: as in http://127.0.0.1:8000, with or without /v1 at its end."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 600.0) -> None:
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:  # a port that is no number up to 65535, half of an IPv6 address
            raise InvalidArgumentError(
                f"url is {url!r}; expected one as http://127.0.0.1:8000"
            ) from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidArgumentError(f"url is {url!r}; expected one as http://127.0.0.1:8000")
        self._host, self._port = parts.hostname, port
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._timeout = timeout
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers = f"Host: {parts.netloc}\r\n{key}Connection: close\r\n"
        self.url = url

    async def model(self) -> str:
        """The first model that the server names."""
        try:
            status, body = await asyncio.wait_for(self._get_models(), 30)
        except (OSError, asyncio.TimeoutError) as error:
            reason = getattr(error, "strerror", None) or str(error) or "no reply in 30 seconds"
            raise OctavoError(
                f"{self.url} does not answer ({reason}): start a server first, as in `octavo serve`"
            ) from error
        try:
            return str(json.loads(body)["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            text = body[:200].decode(errors="replace")
            raise OctavoError(f"{self.url}/v1/models gave status {status}: {text}") from error

    async def _get_models(self) -> tuple[int, bytes]:
        async with self._send("GET", "/v1/models") as (status, parts):
            return status, b"".join([part async for part in parts])

    async def ask(self, job: Job, model: str) -> Record:
        """Send a request and read its whole answer; errors are recorded, never raised."""
        body = {**job.body, "model": model, "stream": True}
        body["stream_options"] = {"include_usage": True}
        record = Record(time.perf_counter())
        try:
            await asyncio.wait_for(self._take_answer(job.path, body, record), self._timeout)
        except (OSError, asyncio.TimeoutError, ValueError, asyncio.IncompleteReadError) as error:
            record.error = f"{type(error).__name__}: {error}"
        record.end = time.perf_counter()
        if record.error is None and record.status == 200 and not record.num_answer_tokens:
            record.num_answer_tokens = len(record.chunk_times)  # a server that counts nothing
        return record

    async def _take_answer(self, path: str, body: dict[str, Any], record: Record) -> None:
        async with self._send("POST", path, json.dumps(body).encode()) as (status, parts):
            record.status = status
            if status != 200:
                text = b"".join([part async for part in parts])
                record.error = text[:300].decode(errors="replace")
                return
            rest = b""
            async for part in parts:
                now = time.perf_counter()
                *events, rest = (rest + part).split(b"\n\n")
                for event in events:
                    _take_event(event, now, record)

    @asynccontextmanager
    async def _send(
        self, method: str, path: str, content: bytes = b""
    ) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """Send a request; yields the answer's status, and the pieces of its body as they come."""
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}"
        if content:
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._ssl)
        try:
            writer.write(f"{head}\r\n".encode() + content)
            status, chunked = await _read_head(reader)
            yield status, _body(reader, chunked)
        finally:
            writer.close()


def _take_event(event: bytes, now: float, record: Record) -> None:
    data = event.strip().removeprefix(b"data:").strip()
    if not data or data == b"[DONE]" or data.startswith(b":"):
        return
    found = json.loads(data)
    if "error" in found:
        error = found["error"]
        record.error = str(error.get("message", error) if isinstance(error, dict) else error)
        return
    if usage := found.get("usage"):
        record.num_prompt_tokens = usage.get("prompt_tokens", 0)
        record.num_answer_tokens = usage.get("completion_tokens", 0)
        details = usage.get("prompt_tokens_details") or {}
        record.num_cached_tokens = details.get("cached_tokens")
    for choice in found.get("choices") or ():
        if text := choice.get("text") or (choice.get("delta") or {}).get("content"):
            record.chunk_times.append(now)
            record.pieces.append(text)


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """The status, and whether the body is chunked."""
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    chunked = any(line.lower().replace(b" ", b"") == b"transfer-encoding:chunked" for line in lines)
    return int(first.split()[1]), chunked


async def _body(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """The body's pieces as they come; the connection ends with it."""
    if not chunked:
        while part := await reader.read(65536):
            yield part
        return
    while True:
        size = int((await reader.readline()).split(b";")[0], 16)
        if size == 0:
            return
        yield (await reader.readexactly(size + 2))[:size]
