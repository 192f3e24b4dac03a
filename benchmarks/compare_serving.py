"""octavo, llama-server and vLLM under the same load, in one run.

    python benchmarks/compare_serving.py --users 1,16,64
    python benchmarks/compare_serving.py --llama-server PATH --gguf FILE --vllm-python PATH \
        --output benchmarks/results/FILE.json

Every server is started, asked the same requests by the same client (octavo.bench.serve_client) for
each number of users, and stopped, in every round anew; who goes first alternates. Before it is
timed each must answer: eight prompts one by one, and then all at a time among as many others;
how many answers stay the same is kept, and octavo must keep all of them. Each must have cut the
prompts into as many tokens as the first, and fail no request: else it did other work.

A GGUF file with the model's tokenizer: benchmarks/write_gguf.py MODEL FILE --vocabulary smollm.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from common import asked, in_turns, make_parser, stamp, write_json
from servers import Server, llama_server, octavo_server, run_all, running, vllm_server

from octavo.bench.serve_client import Client
from octavo.bench.serve_run import Load
from octavo.bench.serve_workload import parse_lengths, random_jobs
from octavo.config import read_environment
from octavo.weights.hub import resolve_model

GATE = 8


async def check(client: Client, model: str) -> tuple[int, int]:
    """How many of eight greedy answers are the same alone and among sixteen; all prompt tokens."""
    lengths = parse_lengths("gate", "20-60")
    jobs = list(islice(random_jobs(lengths, parse_lengths("gate", "24"), 0, 99), 2 * GATE))
    alone = [await client.ask(job, model) for job in jobs[:GATE]]
    together = await asyncio.gather(*(client.ask(job, model) for job in jobs))
    for record in (*alone, *together):
        if not record.ok:
            raise SystemExit(f"{client.url} did not answer: {record.error or record.status}")
    same = sum(a.text == b.text for a, b in zip(alone, together[:GATE], strict=True))
    return same, sum(record.num_prompt_tokens for record in alone)


async def measure(
    url: str, name: str, arguments: argparse.Namespace, prompt_tokens: int | None
) -> tuple[list[dict[str, Any]], int]:
    """The gate, a warm-up, and every load; prompt_tokens: those of the gate's prompts elsewhere."""
    client = Client(url, timeout=arguments.timeout)
    model = await client.model()
    same, tokens = await check(client, model)
    if prompt_tokens not in (None, tokens):
        raise SystemExit(
            f"{name} cuts the gate's prompts into {tokens} tokens, not {prompt_tokens}"
        )
    if name.startswith("octavo") and same != GATE:
        raise SystemExit(f"{name}: {GATE - same} of {GATE} answers depend on who shares the batch")
    found = []
    for users in arguments.users:
        prompts = parse_lengths("--prompt-len", arguments.prompt_len)
        answers = parse_lengths("--answer-len", arguments.answer_len)
        jobs = random_jobs(prompts, answers, arguments.shared_prefix, arguments.seed + users)
        count = max(arguments.least, arguments.each * users)
        figures = await run_all(client, model, jobs, Load(count, users))
        summary = {"side": name, "same_answers": f"{same} of {GATE}", **figures}
        print(
            f"{name:28} {users:4} users  {summary['total_tokens_per_second']:9.1f} tokens/s  "
            f"first {summary['ttft_ms']['p50']:7.0f} ms  between p99 "
            f"{summary['itl_ms']['p99']:6.0f} ms",
            flush=True,
        )
        found.append(summary)
    return found, tokens


def make_servers(a: argparse.Namespace) -> list[Server]:
    path = resolve_model(a.model, read_environment())
    most = max(a.users)
    options = ("--num-threads", a.threads, "--max-model-len", a.context, "--max-num-seqs", most)
    servers = []
    for text in a.octavo:
        extra = text.split()
        name = " ".join(["octavo", *extra])
        servers.append(octavo_server(path, *options, *extra, name=name))
    for file in a.gguf if a.llama_server else ():
        servers.append(llama_server(a.llama_server, file, a.threads, a.context, most))
    if a.vllm_python:
        servers.append(vllm_server(a.vllm_python, path, a.context, most))
    for text in a.url:
        name, _, url = text.partition("=")
        servers.append(Server(name, url=url))
    return servers


def ratios(rounds: list[dict[str, Any]]) -> list[str]:
    """octavo's throughput over each other server's, and over its own with one user."""

    def of(name: str, users: int) -> float:
        own = [r for r in rounds if r["side"] == name and r["concurrency"] == users]
        return median(r["total_tokens_per_second"] for r in own)

    names = list(dict.fromkeys(r["side"] for r in rounds))
    users = sorted({r["concurrency"] for r in rounds})
    lines = []
    for name in names[1:]:
        parts = [f"{of(names[0], n) / of(name, n):.2f}x at {n}" for n in users]
        lines.append(f"{names[0]} over {name}: {', '.join(parts)}")
    for name in names if len(users) > 1 else ():
        parts = [f"{of(name, n) / of(name, users[0]):.2f}x at {n}" for n in users[1:]]
        lines.append(f"{name} over itself with {users[0]}: {', '.join(parts)}")
    return lines


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument(
        "--octavo", action="append", help="options of one octavo server, as one text"
    )
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--gguf", type=Path, action="append", default=[])
    parser.add_argument("--vllm-python", type=Path)
    parser.add_argument("--url", action="append", default=[], help="NAME=URL of a running server")
    parser.add_argument("--users", default="1,16,64")
    parser.add_argument("--prompt-len", default="32-256")
    parser.add_argument("--answer-len", default="32-128")
    parser.add_argument("--shared-prefix", type=int, default=0)
    parser.add_argument("--each", type=int, default=3, help="requests of each user")
    parser.add_argument("--least", type=int, default=8, help="requests of a load at least")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=900.0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.users = [int(number) for number in arguments.users.split(",")]
    arguments.octavo = arguments.octavo or [""]
    servers = make_servers(arguments)
    rounds: list[dict[str, Any]] = []
    tokens: int | None = None
    for number in range(arguments.rounds):
        for server in in_turns(servers, number):
            with running(server) as (url, seconds, _):
                found, tokens = asyncio.run(measure(url, server.name, arguments, tokens))
            started = {"round": number, "start_seconds": round(seconds, 2)}
            rounds += [{**started, **summary} for summary in found]
    print("\n".join(ratios(rounds)))
    content = {**stamp(arguments.threads), "asked": asked(arguments), "rounds": rounds}
    write_json(arguments.output, content)


if __name__ == "__main__":
    main()
