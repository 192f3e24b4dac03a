"""Servers to be measured: started, waited for, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from peers import preloaded

from octavo.bench.serve_client import Client
from octavo.bench.serve_report import summarize
from octavo.bench.serve_run import Load, run_load
from octavo.bench.serve_workload import Job

START_TIMEOUT = 300.0  # seconds; vLLM on a CPU takes up to two minutes


@dataclass(frozen=True)
class Server:
    """Its command ("{port}" stands for the port), or its URL if it runs already.

    environment: variables of its own.
    """

    name: str
    command: tuple[str, ...] = ()
    url: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


class Running(NamedTuple):
    """A server that answers. seconds: what that took; pid: of its process, 0 if it ran already."""

    url: str
    seconds: float = 0.0
    pid: int = 0


def octavo_server(*options: Any, name: str = "octavo") -> Server:
    command = (sys.executable, "-m", "octavo", "serve", "--port", "{port}")
    return Server(name, (*command, "--log-format", "json", *map(str, options)))


def llama_server(
    binary: Path, file: Path, threads: int, context: int, users: int, name: str = ""
) -> Server:
    """llama-server has a slot for each user, and one cache for all of them."""
    options = ["-m", str(file), "-t", str(threads), "-np", str(users), "-c", str(context * users)]
    command = (str(binary), *options, "--port", "{port}", "--no-webui")
    return Server(name or f"llama-server {file.stem}", command)


def vllm_server(python: Path, model: Path, context: int, users: int) -> Server:
    """vLLM as its documentation has it for CPUs: with libiomp5 and tcmalloc, where they are."""
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--max-model-len", str(context), "--max-num-seqs", str(users)]
    command += ["--dtype", "bfloat16", "--port", "{port}"]
    environment = {**preloaded(python), "VLLM_CPU_KVCACHE_SPACE": "2"}
    return Server("vLLM bf16", tuple(command), environment=environment)


@contextlib.contextmanager
def running(server: Server) -> Iterator[Running]:
    """Start a server and wait until it answers; it is stopped at the end."""
    if server.url:
        yield Running(server.url)
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [part.format(port=port) for part in server.command],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **server.environment},
        )
        try:
            while not _is_up(url):
                if process.poll() is not None or time.monotonic() - started > START_TIMEOUT:
                    log.seek(0)
                    raise SystemExit(f"{server.name} does not start:\n{log.read()[-3000:]}")
                time.sleep(0.02)
            yield Running(url, time.monotonic() - started, process.pid)
        finally:
            # Its own group, since vLLM starts processes of its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


Part = Callable[[Client, str, int], Awaitable[Any]]
"""Asks a server for a model, given the process of the server."""


def ask_octavo(part: Part, *options: Any) -> Any:
    """What a part finds, with an octavo of its own started with these options."""

    async def ask(url: str, pid: int) -> Any:
        client = Client(url)
        return await part(client, await client.model(), pid)

    with running(octavo_server(*options)) as (url, _, pid):
        return asyncio.run(ask(url, pid))


async def run_all(client: Client, model: str, jobs: Iterator[Job], load: Load) -> dict[str, Any]:
    """The figures of a load; SystemExit where a request failed."""
    found = summarize(await run_load(client, model, jobs, load, 0))
    if found["failed"]:
        raise SystemExit(f"{client.url} failed {found['failed']} requests: {found['errors']}")
    return found


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:  # URLError is one
        return False
