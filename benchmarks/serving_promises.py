"""What `octavo serve` promises on a laptop, measured: each figure beside what it must be.

    python benchmarks/serving_promises.py [start] [prefix] [long] [batching] [soak]
        [--model smollm2-135m] [--requests 10000] [--output FILE]

start     seconds from starting the process to the first token
prefix    time to first token with 1,000 shared tokens in the cache, against without
long      a 6,000-token prompt amid 16 running answers: what it does to the time between tokens
batching  tokens a second with 1 to 128 users, long answers to short prompts
soak      requests with disconnects, deadlines and bad bodies, in a cache a quarter of what they
          want: nothing leaks, nothing but 503 and 504 fails, answers are those of a solo run

Nothing else may run on the machine, but for `soak`, which counts and does not time. Linux only.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

import numpy as np
from common import make_parser, stamp, write_json
from servers import Part, ask_octavo, run_all

from octavo.bench.serve_client import Client
from octavo.bench.serve_run import Load
from octavo.bench.serve_workload import Job, parse_lengths, random_jobs

COMPLETIONS = "/v1/completions"
CHUNK = 512  # tokens of a prompt that a step carries, in `long`
SOAK_USERS, SOAK_BLOCKS = 32, 38  # they want about 150 blocks of 16 tokens, up to 10 each


def job(prompt: str | list[int], max_tokens: int, **fields: Any) -> Job:
    """Greedy, and as long as asked for."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return Job(COMPLETIONS, {**body, **fields})


def words(count: int, seed: int) -> str:
    """A prompt of so many words, about a token each."""
    lengths = parse_lengths("words", str(count))
    (drawn,) = islice(random_jobs(lengths, lengths, 0, seed), 1)
    return str(drawn.body["prompt"])


async def first_token(client: Client, model: str, pid: int) -> float:
    """When it came, as `time.perf_counter` has it."""
    return (await client.ask(job("Once upon a time", 1), model)).chunk_times[0]


def measure_start(model: str) -> dict[str, Any]:
    """Five starts, of which the median counts; the disk's cache is warm."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        times.append(ask_octavo(first_token, model) - started)
    return {"seconds": median(times), "all": times, "must": "below 3"}


async def prefix(client: Client, model: str, pid: int) -> dict[str, Any]:
    """Five prefixes: each once, and twice again with other ends."""
    cold, warm, tokens = [], [], 0
    for seed in range(5):
        begin = words(1000, 1000 + seed)
        for times, own in ((cold, 0), (warm, 1), (warm, 2)):
            record = await client.ask(job(f"{begin} {words(16, 10 * seed + own)}", 4), model)
            times.append(1e3 * record.ttft)
            tokens = record.num_prompt_tokens
    return {
        "prompt_tokens": tokens,
        "ttft_ms_without": median(cold),
        "ttft_ms_with": median(warm),
        "ratio": median(cold) / median(warm),
        "must": "ratio of 5 at least",
    }


async def long(client: Client, model: str, pid: int) -> dict[str, Any]:
    """chunk_step_ms is the mean over the prompt; the last chunks see the longest context."""
    long_prompt = [3 + i * i % 4001 for i in range(6000)]
    alone = await client.ask(job(long_prompt, 1, cache_salt="alone"), model)
    answers = [job(words(20, seed), 400) for seed in range(16)]
    running = [asyncio.ensure_future(client.ask(one, model)) for one in answers]
    await asyncio.sleep(6)
    arrived = time.perf_counter()
    late = await client.ask(job(long_prompt, 1, cache_salt="amid"), model)
    records = await asyncio.gather(*running)
    if not all(record.ok for record in (alone, late, *records)):
        raise SystemExit("a request failed")
    before, amid = [], []
    for record in records:
        times = np.array(record.chunk_times)
        gaps = 1e3 * np.diff(times)
        before.append(gaps[(times[1:] < arrived) & (times[1:] > arrived - 5)])
        amid.append(gaps[(times[1:] > arrived) & (times[:-1] < late.chunk_times[0])])
    step = 1e3 * alone.ttft / -(-6000 // CHUNK)
    p99_before, p99_amid = (float(np.percentile(np.concatenate(g), 99)) for g in (before, amid))
    return {
        "chunk_tokens": CHUNK,
        "chunk_step_ms": step,
        "itl_p99_ms_before": p99_before,
        "itl_p99_ms_amid": p99_amid,
        "ttft_s_alone": alone.ttft,
        "ttft_s_amid": late.ttft,
        "rise_over_chunk_step": (p99_amid - p99_before) / step,
        "must": "rise of 2 chunk steps at most",
    }


async def batching(client: Client, model: str, pid: int) -> dict[str, Any]:
    """Prompts of 16 to 48 tokens, answers of 128; total tokens a second, users after users."""
    loads = []
    prompts, answers = parse_lengths("prompt", "16-48"), parse_lengths("answer", "128")
    for users in (1, 2, 4, 8, 16, 32, 64, 128):
        load = Load(max(8, 2 * users), users)
        jobs = random_jobs(prompts, answers, 0, users)
        summary = await run_all(client, model, jobs, load)
        rate = summary["total_tokens_per_second"]
        loads.append({"users": users, "tokens_per_second": rate, "itl_ms": summary["itl_ms"]})
    rates = {entry["users"]: entry["tokens_per_second"] for entry in loads}
    return {
        "loads": loads,
        "ratio_at_64": rates[64] / rates[1],
        "least_after_greatest": rates[128] / max(rates.values()),
        "must": "ratio_at_64 of 8; no fall behind saturation",
    }


# ---- soak ----

BAD_BODIES: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b'{"prompt": 5}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "temperature": "hot"}',
    b'{"prompt": [99999999], "max_tokens": 2}',
    b'{"model": "another", "prompt": "a"}',
    b'{"prompt": "a", "n": 1000000}',
    b"\xff\xfe\x00",
)


async def post_raw(url: str, body: bytes) -> int:
    """The status of the answer to exactly these bytes."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    return int(answer.split(b" ", 2)[1])


def resident_mebibytes(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0


def metric(url: str, name: str) -> float:
    """The sum over a metric's labels."""
    with urlopen(f"{url}/metrics") as response:
        text = response.read().decode()
    return sum(float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.M))


async def soak(requests: int, client: Client, model: str, pid: int) -> dict[str, Any]:
    """A quarter of the requests misbehave in one way or another; the rest are kept to compare.

    mebibytes: after every tenth of the requests. It grows while the ring of events fills.
    """
    started, url = time.perf_counter(), client.url
    rng = random.Random(0)
    memory: list[float] = []
    num_ended = 0
    statuses: Counter[str] = Counter()
    kept: list[tuple[Job, str]] = []
    room = asyncio.Semaphore(SOAK_USERS)

    async def one(*drawn: Any) -> None:
        nonlocal num_ended
        async with room:
            await ask(*drawn)
            num_ended += 1
            if num_ended % max(1, requests // 10) == 0:
                memory.append(resident_mebibytes(pid))

    async def ask(kind: str, drawn: Job, patience: float, bad: bytes) -> None:
        if kind == "bad body":
            statuses[f"bad body: {await post_raw(url, bad)}"] += 1
            return
        if kind == "leaves":
            try:
                await asyncio.wait_for(client.ask(drawn, model), patience)
            except asyncio.TimeoutError:
                statuses["left"] += 1
                return
        record = await client.ask(drawn, model)
        cut_short = f" {record.error[:60]}" if record.error and record.status == 200 else ""
        statuses[f"{kind}: {record.status}{cut_short}"] += 1
        if kind == "answer" and record.ok:
            kept.append((drawn, record.text))

    def draw() -> Iterator[tuple[str, Job, float, bytes]]:
        jobs = random_jobs(parse_lengths("prompt", "8-96"), parse_lengths("answer", "4-40"), 0, 2)
        for drawn in islice(jobs, requests):
            kind = rng.choices(("answer", "leaves", "deadline", "bad body"), (75, 10, 10, 5))[0]
            body = dict(drawn.body)
            if kind == "deadline":
                body["timeout"] = rng.uniform(0.01, 1.5)
            yield kind, Job(drawn.path, body), rng.uniform(0.005, 1.0), rng.choice(BAD_BODIES)

    await asyncio.gather(*(one(*drawn) for drawn in draw()))
    for _ in range(100):  # what was left behind ends within a step
        if metric(url, "vllm:num_requests_running") == 0:
            break
        await asyncio.sleep(0.1)
    sample = rng.sample(kept, min(200, len(kept)))
    wrong = 0
    for drawn, text in sample:
        solo = await client.ask(Job(drawn.path, {**drawn.body, "cache_salt": "solo"}), model)
        wrong += solo.text != text
    return {
        "statuses": dict(sorted(statuses.items())),
        "mebibytes": memory,
        "compared_with_solo_runs": len(sample),
        "wrong_answers": wrong,
        "seconds": time.perf_counter() - started,
        "preemptions": metric(url, "vllm:num_preemptions_total"),
        "blocks_in_use_at_the_end": metric(url, "vllm:kv_cache_usage_perc") * SOAK_BLOCKS,
        "must": "no wrong answer, no block in use, memory as before, no 5xx but 503 and 504",
    }


def main() -> None:
    def part(measure: Part, *options: Any) -> Callable[[str], Any]:
        return lambda model: ask_octavo(measure, model, *options)

    blocks = ("--num-kv-blocks", SOAK_BLOCKS, "--max-num-seqs", SOAK_USERS)
    parts = {
        "start": measure_start,
        "prefix": part(prefix, "--max-model-len", 2048),
        "long": part(long, "--max-model-len", 6400, "--max-num-batched-tokens", CHUNK),
        "batching": part(batching, "--max-model-len", 512, "--max-num-seqs", 128),
        "soak": part(
            lambda *where: soak(arguments.requests, *where), "--max-model-len", 160, *blocks
        ),
    }
    parser = make_parser(__doc__)
    parser.add_argument("parts", nargs="*", default=list(parts))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(parts)}")
    found = {}
    for name in arguments.parts:
        found[name] = parts[name](arguments.model)
        print(json.dumps({name: found[name]}, indent=2), flush=True)
    machine = stamp(len(os.sched_getaffinity(0)))
    write_json(arguments.output, {**machine, "model": arguments.model, "measured": found})


if __name__ == "__main__":
    main()
