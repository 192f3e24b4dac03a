"""Servers under the same load: octavo, llama-server and vLLM, asked by the same client.

Every server is started, checked, asked the same requests for each number of users or each rate, and
stopped. The gate: eight greedy answers, alone and among as many others; octavo has to keep all of
them, how many the others keep is in the results. Each must have cut the prompts into as many tokens
as the first, and fail no request: else it did other work.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from itertools import islice
from typing import Any

from catalog import Absent, Catalog
from record import Record, distribution, spread
from servers import Server, llama_server, octavo_server, running, vllm_server
from spec import LoadSpec, SystemSpec

from octavo.bench.serve_client import Client
from octavo.bench.serve_client import Record as Answer
from octavo.bench.serve_report import summarize
from octavo.bench.serve_run import Load, Measured, run_load
from octavo.bench.serve_workload import parse_lengths, random_jobs

GATE = 8
MOST_AT_ONCE = 64  # requests that run at a time where they come at a rate


def octavo_options(form: str) -> list[str]:
    """The options that make octavo's commands compute in a format."""
    return ["--dtype", form] if form in ("f32", "bf16") else ["--dtype", "bf16", "--quantize", form]


def measure_load(
    load: LoadSpec,
    catalog: Catalog,
    record: Record,
    arguments: argparse.Namespace,
    left: Callable[[], float],
) -> None:
    """All servers of a model; a failure of one is a gap. left: seconds that are left."""
    tokens: int | None = None
    for name in load.systems:
        system = SystemSpec(name)
        if left() <= 0:
            record.gap(catalog.path.name, name, "load", "the time for this model was used up")
            continue
        try:
            server = make_server(system, catalog, load, arguments.threads)
            with running(server) as (url, seconds, _):
                work = _measure(url, system, load, tokens, left)
                rows, tokens, same = asyncio.run(work)
        except (Exception, SystemExit) as error:
            record.gap(catalog.path.name, name, "load", error)
            continue
        more = {"model": catalog.path.name, "system": name, "measure": "load"}
        more |= {"same_answers": f"{same} of {GATE}", "start_seconds": round(seconds, 2)}
        record.content["rows"] += [{**more, **row} for row in rows]


def make_server(system: SystemSpec, catalog: Catalog, load: LoadSpec, threads: int) -> Server:
    """The server of a system; raises Absent."""
    most = max(load.users, default=MOST_AT_ONCE)
    if system.engine == "octavo":
        options = ["--num-threads", threads, "--max-model-len", load.context]
        options += ["--max-num-seqs", most, *octavo_options(system.format)]
        return octavo_server(catalog.path, *options, name=system.name)
    if system.engine == "vllm":
        return vllm_server(catalog.vllm_python(), catalog.path, load.context, most)
    bench = catalog.llama_bench() if system.engine == "llama.cpp" else None
    if bench is None or not bench.with_name("llama-server").is_file():
        raise Absent(f"there is no server of {system.engine} here")
    file = catalog.gguf(system.format, load.vocabulary)
    server = bench.with_name("llama-server")
    return llama_server(server, file, threads, load.context, most, system.name)


async def check(client: Client, model: str) -> tuple[int, int]:
    """How many of eight greedy answers are the same alone and among sixteen; all prompt tokens."""
    lengths = parse_lengths("gate", "20-60")
    jobs = list(islice(random_jobs(lengths, parse_lengths("gate", "24"), 0, 99), 2 * GATE))
    alone = [await client.ask(job, model) for job in jobs[:GATE]]
    together = await asyncio.gather(*(client.ask(job, model) for job in jobs))
    for answer in (*alone, *together):
        if not answer.ok:
            raise RuntimeError(f"it did not answer: {answer.error or answer.status}")
    same = sum(a.text == b.text for a, b in zip(alone, together[:GATE], strict=True))
    return same, sum(answer.num_prompt_tokens for answer in alone)


async def _measure(
    url: str, system: SystemSpec, load: LoadSpec, tokens: int | None, left: Callable[[], float]
) -> tuple[list[dict[str, Any]], int, int]:
    """The rows, the tokens of the gate's prompts, and how many of its answers stayed the same."""
    client = Client(url, timeout=max(60.0, left()))
    model = await client.model()
    same, found = await check(client, model)
    if tokens not in (None, found):
        raise RuntimeError(f"it cuts the gate's prompts into {found} tokens, not {tokens}")
    if system.engine == "octavo" and same != GATE:
        raise RuntimeError(f"{GATE - same} of {GATE} answers depend on who shares the batch")
    loads = [Load(max(8, load.each * users), users) for users in load.users]
    loads += [Load(max(8, round(10 * rate)), MOST_AT_ONCE, rate) for rate in load.rates]
    rows = []
    for each in loads:
        if rows and left() <= 0:
            break
        lengths = parse_lengths("prompt", load.prompt), parse_lengths("answer", load.answer)
        jobs = random_jobs(*lengths, 0, each.concurrency)
        rows.append(row_of(await run_load(client, model, jobs, each, 0)))
    return rows, found, same


def row_of(measured: Measured) -> dict[str, Any]:
    """A load's row; raises RuntimeError where a request failed."""
    found = summarize(measured)
    if found["failed"]:
        raise RuntimeError(f"{found['failed']} requests failed: {found['errors']}")
    answers: list[Answer] = [answer for answer in measured.records if answer.ok]
    speed = found["total_tokens_per_second"]
    gaps = [1000 * gap for answer in answers for gap in answer.gaps]
    return {
        "prompt": round(found["prompt_tokens"] / len(answers)),
        "tokens": round(found["answer_tokens"] / len(answers)),
        "requests": len(answers),
        "users": None if found["rate"] else measured.load.concurrency,
        "rate": found["rate"],
        "unit": "tokens/s",
        "samples": [speed],
        **spread([speed]),
        "first_ms": distribution([1000 * answer.ttft for answer in answers]),
        "between_ms": distribution(gaps or [0.0]),
    }
