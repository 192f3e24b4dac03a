"""What the HTTP server costs beside the engine, in seconds of processor time.

Starts `octavo serve`, lets N users stream at a time, and reads from /proc what each thread of the
server has used: the main thread is the event loop (HTTP, JSON, one write a stream and step), the
others are the engine (scheduling, packing, and the native core). Linux only.

    python benchmarks/server_overhead.py [--users 64] [--tokens 128]
"""

from __future__ import annotations

import asyncio
import json
from itertools import repeat
from os import sysconf
from pathlib import Path
from typing import Any

from common import make_parser
from servers import octavo_server, running

from octavo.bench.serve_client import Client
from octavo.bench.serve_report import summarize
from octavo.bench.serve_run import Load, run_load
from octavo.bench.serve_workload import Job


def processor_seconds(pid: int) -> tuple[float, float]:
    """Used so far by the main thread, and by all others together."""
    ticks = sysconf("SC_CLK_TCK")
    seconds = {True: 0.0, False: 0.0}  # of the main thread, of the others
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        seconds[int(task.name) == pid] += (int(fields[11]) + int(fields[12])) / ticks
    return seconds[True], seconds[False]


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
    parser = make_parser(__doc__)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    server = octavo_server("--max-model-len", 1024)
    with running(server) as (url, _, pid):
        found = asyncio.run(measure(url, pid, arguments.users, arguments.tokens))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
