"""Servers for compare_serving.py: started, waited for, and stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_side import find_preloaded

START_TIMEOUT = 300.0  # seconds; vLLM on a CPU takes up to two minutes


@dataclass(frozen=True)
class Side:
    """A server: its name, and its command ("{port}" stands for the port) or its URL if it runs.

    environment: variables of its own.
    """

    name: str
    command: tuple[str, ...] = ()
    url: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def octavo_side(model: str, threads: int, context: int, users: int, extra: Sequence[str]) -> Side:
    options = ["--num-threads", str(threads), "--max-model-len", str(context)]
    options += ["--max-num-seqs", str(users), "--log-format", "json", *extra]
    command = [sys.executable, "-m", "octavo.cli", "serve", model, "--port", "{port}", *options]
    return Side(" ".join(["octavo", *extra]), tuple(command))


def llama_side(binary: Path, file: Path, threads: int, context: int, users: int) -> Side:
    """llama-server has a slot for each user, and one cache for all of them."""
    options = ["-m", str(file), "-t", str(threads), "-np", str(users), "-c", str(context * users)]
    command = [str(binary), *options, "--port", "{port}", "--no-webui"]
    return Side(f"llama-server {file.stem}", tuple(command))


def vllm_side(python: Path, model: Path, context: int, users: int) -> Side:
    """vLLM as its documentation has it for CPUs: with libiomp5 and tcmalloc, where they are."""
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--max-model-len", str(context), "--max-num-seqs", str(users)]
    command += ["--dtype", "bfloat16", "--port", "{port}"]
    environment = {
        "LD_PRELOAD": ":".join(str(file) for file in find_preloaded(python)),
        "VLLM_CPU_KVCACHE_SPACE": "2",
    }
    return Side("vLLM bf16", tuple(command), environment=environment)


@contextlib.contextmanager
def running(side: Side) -> Iterator[tuple[str, float]]:
    """The side's URL, once it answers, and the seconds that took; it is stopped at the end."""
    if side.url:
        yield side.url, 0.0
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    command = [part.format(port=port) for part in side.command]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **side.environment},
        )
        try:
            while not _is_up(url):
                if process.poll() is not None or time.monotonic() - started > START_TIMEOUT:
                    log.seek(0)
                    raise SystemExit(f"{side.name} does not start:\n{log.read()[-3000:]}")
                time.sleep(0.1)
            yield url, time.monotonic() - started
        finally:
            # Its own group, since vLLM starts processes of its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
