"""The server over the fake engine, in this process, and over a real model, in another one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from engine_helpers import fake_adapter, fake_engine, plain_tokenizer_directory
from fake_runtime import EOS, FakeRuntime
from runtime_helpers import VOCAB as TINY_VOCAB
from runtime_helpers import tiny_runtime

from octavo.config import RuntimeOptions
from octavo.engine.engine import Engine
from octavo.llm import LLM
from octavo.server.app import create_app
from octavo.server.options import ServerOptions
from octavo.server.service import Service
from octavo.text.chat import ChatTemplate
from octavo.text.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}A"


def fake_llm(
    directory: Path, template: str | None = TEMPLATE, num_blocks: int = 256, **options: Any
) -> LLM:
    """A model whose tokens are characters; its answers mean nothing, and are always the same."""
    tokenizer = Tokenizer(plain_tokenizer_directory(directory))
    limits = {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 64, **options}
    read = fake_adapter if "max_adapters" in options else None
    engine = fake_engine(num_blocks, tokenizer=tokenizer, read_adapter=read, **limits)
    return LLM.from_engine(engine, None if template is None else ChatTemplate(template))


def tiny_llm(
    directory: Path, template: str | None = TEMPLATE, num_blocks: int = 32, **limits: Any
) -> LLM:
    """Two layers of random weights in the real native core, over the same tokenizer."""
    options = RuntimeOptions("f32", "f32", 16, 256, 8, 128, 1, **limits)
    engine = Engine(
        tiny_runtime(num_blocks=num_blocks, num_threads=1),
        options,
        num_kv_blocks=num_blocks,
        vocab_size=TINY_VOCAB,
        tokenizer=Tokenizer(plain_tokenizer_directory(directory, TINY_VOCAB)),
        eos_token_ids=(EOS,),
    )
    return LLM.from_engine(engine, None if template is None else ChatTemplate(template))


def runtime_of(llm: LLM) -> FakeRuntime:
    runtime = llm.engine.runtime
    assert isinstance(runtime, FakeRuntime)
    return runtime


def slow_down(llm: LLM, seconds: float) -> None:
    """Let every step take so long."""
    runtime = runtime_of(llm)
    wait = runtime.wait

    def slow_wait(ticket: int) -> Any:
        time.sleep(seconds)
        return wait(ticket)

    runtime.wait = slow_wait  # type: ignore[method-assign]


@contextlib.asynccontextmanager
async def serving(
    llm: LLM | Callable[[], LLM], **options: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    """A client of the application, no socket between; the engine in its thread as ever."""
    load = llm if callable(llm) else lambda: llm
    service = Service(ServerOptions(**options), load)
    transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        await service.start()
        try:
            yield client, service
            await asyncio.wait_for(service.engine.wait_until_idle(), 30)
            # Whatever has happened, all blocks are free in the end.
            used = await service.engine.call(
                lambda found: found.engine.blocks.num_blocks - found.engine.blocks.num_free_blocks
            )
            assert used == 0
            await service.engine.call(lambda found: found.engine.check_integrity())
        finally:
            await service.engine.stop()


class RawClient:
    """One request spoken in ASGI, that goes when it is told to."""

    def __init__(self, service: Service, path: str, body: dict[str, Any]) -> None:
        self.app = create_app(service)
        self.service = service
        self.gone = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "http_version": "1.1",
            "client": ("1.2.3.4", 5),
            "server": ("server", 80),
            "headers": [(b"content-type", b"application/json")],
        }
        self._body = json.dumps(body).encode()
        self._read = False

    async def receive(self) -> dict[str, Any]:
        if not self._read:
            self._read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def run(self) -> None:
        await self.app(self.scope, self.receive, self.send)

    async def go_while_running(self) -> None:
        """Ask, and go while it is answered; then nothing runs."""

        async def num_running() -> int:
            return await self.service.engine.call(lambda m: m.engine.scheduler.num_running)

        task = asyncio.ensure_future(self.run())
        while await num_running() != 1:
            await asyncio.sleep(0.01)
        self.gone.set()
        await asyncio.wait_for(task, 5)
        assert await num_running() == 0


@contextlib.contextmanager
def listening(llm: LLM, **options: Any) -> Iterator[str]:
    """The application behind a real socket, in a thread of its own; yields its URL."""
    service = Service(ServerOptions(**options), lambda: llm)
    app = create_app(service)

    async def started(scope: Any, receive: Any, send: Any) -> None:
        if service.engine.loaded is None:
            await service.start()
        await app(scope, receive, send)

    server = uvicorn.Server(uvicorn.Config(started, port=0, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        if service.engine.loaded is not None:
            asyncio.run(service.engine.stop())


def run(test: Callable[[], Awaitable[None]], seconds: float = 120) -> None:
    """Run an asynchronous test."""

    async def limited() -> None:
        await asyncio.wait_for(test(), seconds)

    asyncio.run(limited())


def events_of(text: str) -> list[Any]:
    """The objects of server-sent events; the text must end with [DONE]."""
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    assert all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error in OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    return dict(error)


@dataclass
class ServerProcess:
    """`octavo serve` in a process of its own. lines: its log."""

    arguments: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    url: str = ""
    process: Any = None
    log_path: Path = Path()

    def start(self, directory: Path, wait: bool = True) -> ServerProcess:
        self.log_path = directory / "server.log"
        command = [sys.executable, "-m", "octavo", "serve", "--port", "0", "--log-format"]
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "json", *self.arguments],
                stderr=log,
                stdout=log,
                env={**os.environ, **self.environment},
            )
        self.url = re.sub("/$", "", self.wait_for("listening")["url"])
        if wait:
            self.wait_for("ready")
        return self

    def events(self) -> list[dict[str, Any]]:
        lines = self.log_path.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def wait_for(self, event: str, seconds: float = 60, **fields: Any) -> dict[str, Any]:
        """The first log line of this event with these fields."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for entry in self.events():
                if event in entry["event"] and fields.items() <= entry.items():
                    return entry
            assert self.process.poll() is None, self.log_path.read_text()
            time.sleep(0.02)
        raise AssertionError(f"no {event} in {self.log_path.read_text()}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it and wait; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return int(self.process.wait(30))


@contextlib.contextmanager
def server_process(directory: Path, *arguments: str, **options: Any) -> Iterator[ServerProcess]:
    wait = options.pop("wait", True)
    server = ServerProcess(arguments, **options)
    try:
        yield server.start(directory, wait)
    finally:
        if server.process is not None and server.process.poll() is None:
            server.process.kill()
            server.process.wait()
