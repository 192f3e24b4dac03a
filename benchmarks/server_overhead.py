"""What the HTTP server costs beside the engine, in seconds of processor time.

Starts `octavo serve`, lets N users stream at a time, and reads from /proc what each thread of the
server has used: the main thread is the event loop (HTTP, JSON, one write a stream and step), the
others are the engine (scheduling, packing, and the native core). Linux only.

    python benchmarks/server_overhead.py [--users 64] [--tokens 128]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import repeat
from os import sysconf
from pathlib import Path
from typing import Any

from octavo.bench.serve_client import Client
from octavo.bench.serve_report import summarize
from octavo.bench.serve_run import Load, run_load
from octavo.bench.serve_workload import Job


@contextlib.contextmanager
def running_server(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`octavo serve` on a free port, ready; yields the process and its URL.

    What it logs later is read and dropped, since a full pipe would stop it.
    """
    command = [sys.executable, "-m", "octavo.cli", "serve", "--port", "0", "--log-format", "json"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr or ():
            event = json.loads(line)
            if event["event"] == "ready":
                threading.Thread(target=drain, args=(process,), daemon=True).start()
                yield process, event["url"]
                return
        raise SystemExit("the server ended before it was ready")
    finally:
        process.terminate()
        process.wait()


def drain(process: subprocess.Popen[str]) -> None:
    """Read all that it will yet log."""
    for _ in process.stderr or ():
        pass


def processor_seconds(pid: int) -> tuple[float, float]:
    """Used so far by the main thread, and by all others together."""
    ticks = sysconf("SC_CLK_TCK")
    main = others = 0.0
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        seconds = (int(fields[11]) + int(fields[12])) / ticks
        if int(task.name) == pid:
            main += seconds
        else:
            others += seconds
    return main, others


async def measure(url: str, pid: int, users: int, tokens: int) -> dict[str, Any]:
    """Stream to all users once to warm up, and once to count."""
    body = {"prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True}
    jobs = repeat(Job("/v1/completions", body))
    client = Client(url)
    model = await client.model()
    await run_load(client, model, jobs, Load(users, users), 0)
    before = processor_seconds(pid)
    measured = await run_load(client, model, jobs, Load(users, users), 0)
    after = processor_seconds(pid)
    server, engine = after[0] - before[0], after[1] - before[1]
    found = summarize(measured)
    if found["failed"]:
        raise SystemExit(f"{found['failed']} requests failed: {found['errors']}")
    return {
        "users": users,
        "tokens": found["answer_tokens"],
        "seconds": found["seconds"],
        "tokens_per_second": found["answer_tokens_per_second"],
        "server_cpu_seconds": round(server, 2),
        "engine_cpu_seconds": round(engine, 2),
        "server_over_engine": round(server / engine, 4),
        "server_microseconds_per_token": round(1e6 * server / found["answer_tokens"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    with running_server("--max-model-len", "1024") as (process, url):
        found = asyncio.run(measure(url, process.pid, arguments.users, arguments.tokens))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
