"""`octavo bench serve`: a server under load, octavo's or any with OpenAI's API."""

from __future__ import annotations

import json
import math
import secrets
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from octavo.cli.bench import parse_numbers
from octavo.cli.common import FAILED, note, print_error, progress_bar
from octavo.cli.options import argument, grouped, option, refuse_unused, tried
from octavo.errors import InvalidArgumentError
from octavo.files import write_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from octavo.bench.serve_client import Client
    from octavo.bench.serve_run import Load, Measured
    from octavo.bench.serve_workload import Job

_asked = partial(option, panel="Requests")
_MOST_CACHED = 0.05  # of the prompts' tokens, without a note about it


@dataclass(frozen=True)
class Arrivals:
    """When requests come."""

    users: Annotated[
        str,
        option(
            "Users who ask again as soon as they are answered. Several numbers are measured one "
            "after the other. With --rate: the most that are answered at a time.",
            "-u",
            "--users",
            metavar="N,N,…",
        ),
    ] = "16"
    rate: Annotated[
        float | None,
        option("Arrivals a second, as a Poisson process, answered or not.", metavar="N"),
    ] = None
    requests: Annotated[
        int,
        option(
            "Requests of each run. 0: four for each user, 32 at least.",
            "-r",
            "--requests",
            metavar="N",
        ),
    ] = 0


@dataclass(frozen=True)
class Requests:
    """What is asked."""

    prompt_len: Annotated[
        str,
        option(
            "Words of a prompt, as in 128 or 32-512. A word is about a token; 32-512 is uniform, "
            "200~100 log-normal with this mean and standard deviation.",
            "-p",
            "--prompt-len",
            metavar="N",
        ),
    ] = "128"
    answer_len: Annotated[
        str,
        option(
            "Tokens of an answer, in the same forms. Answers have exactly this length.",
            "-n",
            "--answer-len",
            metavar="N",
        ),
    ] = "64"
    shared_prefix: Annotated[int, _asked("Words that all prompts begin with.")] = 0
    dataset: Annotated[
        Path | None,
        option(
            'JSON lines with "prompt" or "messages", instead of words.',
            metavar="FILE",
        ),
    ] = None
    seed: Annotated[
        int | None,
        _asked(
            "Seed of words, lengths and arrivals. Left out: a new one, so that a second run does "
            "not find the prompts of the first in the server's prefix cache."
        ),
    ] = None


@dataclass(frozen=True)
class Results:
    """What becomes of the figures."""

    slo: Annotated[
        str | None,
        option(
            "Limits in ms, as in ttft:500,itl:50,e2e:10000. Goodput counts the requests that "
            "stayed within them.",
            metavar="LIMITS",
        ),
    ] = None
    json_file: Annotated[
        Path | None, option("Write all figures here.", "--json", **tried("the figures"))
    ] = None
    plot_file: Annotated[
        Path | None,
        option(
            "Draw the distributions here, as SVG. It needs matplotlib.",
            "--plot",
            **tried("the plot"),
        ),
    ] = None


@grouped
def bench_serve(
    url: Annotated[str, argument("Where the server is.", "URL")] = "http://127.0.0.1:8000",
    *,
    model: Annotated[
        str | None, option("Model to name. Left out: the first one served.", metavar="NAME")
    ] = None,
    api_key: Annotated[
        str | None,
        option("The server's key. Left out: OCTAVO_API_KEY, or none.", metavar="KEY"),
    ] = None,
    arrivals: Arrivals,
    asked: Requests,
    results: Results,
    timeout: Annotated[float, _asked("Seconds after which a request counts as failed.")] = 600.0,
) -> int:
    """Measure a server under load: latencies and throughput.

    The latencies are the time to the first token, between tokens, and to the end. The server may be
    octavo's (`octavo serve`) or any other with OpenAI's API. Exit code: 0 every request was
    answered, 1 not.

    [bold]octavo bench serve --users 1,16,64 --slo ttft:1000,itl:100[/bold]
    """
    import asyncio

    from rich.console import Console

    from octavo.bench.serve_client import Client
    from octavo.bench.serve_report import cached_share, make_table, parse_slo, summarize
    from octavo.config import read_environment

    if results.plot_file is not None:
        from octavo.bench.serve_plot import need_matplotlib

        need_matplotlib()  # before anything is measured
    limits = None if results.slo is None else parse_slo(results.slo)
    loads = _loads(arrivals)
    seed = secrets.randbelow(10**9) if asked.seed is None else asked.seed
    asked = replace(asked, seed=seed)
    jobs = _jobs(asked, seed)
    client = Client(url, api_key or read_environment().api_key, timeout)
    measured, served = asyncio.run(_measure(client, model, jobs, loads, seed))
    summaries = [summarize(found, limits) for found in measured]
    Console().print(make_table(summaries))
    for summary in summaries:
        for reason, count in summary["errors"].items():
            print_error(f"{summary['load']}: {count} failed: {reason}")
        if (share := cached_share(summary) or 0) > _MOST_CACHED:
            note(
                f"{summary['load']}: {share:.0%} of the prompts' tokens were in the server's "
                "prefix cache, so first tokens came sooner than for new prompts. Prompts are new "
                "where --seed, --shared-prefix and --dataset are left out"
            )
    stamp = {"url": url, "model": served, **vars(asked)}
    stamp["dataset"] = asked.dataset and str(asked.dataset)
    _write(results, stamp, measured, summaries)
    return FAILED if any(summary["failed"] for summary in summaries) else 0


def _loads(arrivals: Arrivals) -> list[Load]:
    from octavo.bench.serve_run import Load

    users, rate, requests = arrivals.users, arrivals.rate, arrivals.requests
    if rate is not None and not 0 < rate < math.inf:
        raise InvalidArgumentError(f"--rate is {rate}; expected arrivals a second, above 0")
    if requests < 0:
        raise InvalidArgumentError(f"--requests is {requests}; expected 1 or more, or 0")
    numbers = parse_numbers("--users", users)
    if not all(numbers):
        raise InvalidArgumentError(f"--users is {users!r}; expected numbers above 0")
    return [
        Load(requests or max(32, 4 * number), number, math.inf if rate is None else rate)
        for number in numbers
    ]


def _jobs(asked: Requests, seed: int) -> Iterator[Job]:
    from octavo.bench.serve_workload import jobs_of_file, parse_lengths, random_jobs

    refuse_unused(asked, "prompt_len shared_prefix", asked.dataset is None, "without --dataset")
    answers = parse_lengths("--answer-len", asked.answer_len)
    if asked.dataset is not None:
        return jobs_of_file(asked.dataset, answers, seed)
    prompts = parse_lengths("--prompt-len", asked.prompt_len)
    return random_jobs(prompts, answers, asked.shared_prefix, seed)


async def _measure(
    client: Client, model: str | None, jobs: Iterator[Job], loads: list[Load], seed: int
) -> tuple[list[Measured], str]:
    from octavo.bench.serve_run import run_load

    served = model or await client.model()
    warm_up = await client.ask(next(jobs), served)
    if not warm_up.ok:
        reason = warm_up.error or f"status {warm_up.status}, and no text"
        raise InvalidArgumentError(f"the server does not answer a first request: {reason}")
    note(f"measuring {served} at {client.url}, seed {seed}")
    found = []
    with progress_bar("count", keep=True) as bar:
        for load in loads:
            bar.start(load.name, load.num_requests)
            started = time.monotonic()

            def advance(
                done: int, running: int, tokens: int, load: Load = load, started: float = started
            ) -> None:
                speed = tokens / max(1e-9, time.monotonic() - started)
                facts = f"{running} running, {speed:,.0f} tokens/s"
                bar.update(load.name, done, load.num_requests, facts)

            found.append(await run_load(client, served, jobs, load, seed, advance))
    return found, served


def _write(
    results: Results,
    asked: dict[str, Any],
    measured: list[Measured],
    summaries: list[dict[str, Any]],
) -> None:
    if results.json_file is not None:
        from octavo import __version__
        from octavo.machine import processor

        stamp = {"octavo": __version__, "client": processor(), "asked": asked, "loads": summaries}
        write_text(results.json_file, "the figures", json.dumps(stamp, indent=2) + "\n")
    if results.plot_file is not None:
        from octavo.bench.serve_plot import plot

        title = f"{asked['model']}: prompts {asked['prompt_len']}, answers {asked['answer_len']}"
        write_text(results.plot_file, "the plot", plot(measured, summaries, title))
