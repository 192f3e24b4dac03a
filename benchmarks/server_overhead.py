"""What the HTTP server costs beside the engine, in seconds of processor time.

Starts `octavo serve`, lets N users stream at a time, and reads from /proc what each thread of the
server has used: the main thread is the event loop (HTTP, JSON, one write a stream and step), the
others are the engine (scheduling, packing, and the native core). Linux only.

    python benchmarks/server_overhead.py [--users 64] [--tokens 128]
"""

from __future__ import annotations

import json
from functools import partial
from itertools import repeat
from os import sysconf
from pathlib import Path
from typing import Any

from common import make_parser
from servers import ask_octavo, run_all

from octavo.bench.serve_client import Client
from octavo.bench.serve_run import Load
from octavo.bench.serve_workload import Job


def processor_seconds(pid: int) -> tuple[float, float]:
    """Used so far by the main thread, and by all others together."""
    ticks = sysconf("SC_CLK_TCK")
    seconds = {True: 0.0, False: 0.0}  # of the main thread, of the others
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        seconds[int(task.name) == pid] += (int(fields[11]) + int(fields[12])) / ticks
    return seconds[True], seconds[False]


async def measure(users: int, tokens: int, client: Client, model: str, pid: int) -> dict[str, Any]:
    """Stream to all users once to warm up, and once to count."""
    body = {"prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True}
    jobs = repeat(Job("/v1/completions", body))
    await run_all(client, model, jobs, Load(users, users))
    before = processor_seconds(pid)
    found = await run_all(client, model, jobs, Load(users, users))
    after = processor_seconds(pid)
    server, engine = after[0] - before[0], after[1] - before[1]
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
    part = partial(measure, arguments.users, arguments.tokens)
    found = ask_octavo(part, "--max-model-len", 1024)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
