"""`octavo bench serve`: a server under load, octavo's or any with OpenAI's API."""

from __future__ import annotations

import json
import math
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from octavo.cli.bench import parse_numbers
from octavo.cli.common import FAILED, note, print_error, progress_bar
from octavo.cli.options import argument, option, tried
from octavo.errors import InvalidArgumentError
from octavo.files import write_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from octavo.bench.serve_client import Client
    from octavo.bench.serve_run import Load, Measured
    from octavo.bench.serve_workload import Job

_arrivals = partial(option, panel="Arrivals")
_asked = partial(option, panel="Requests")
_output = partial(option, panel="Output")


def bench_serve(
    url: Annotated[
        str, argument("Where the server is, with or without /v1.", "URL")
    ] = "http://127.0.0.1:8000",
    model: Annotated[str | None, option("Model to name. Left out: the first one served.")] = None,
    api_key: Annotated[str | None, option("Left out: OCTAVO_API_KEY, or none.")] = None,
    users: Annotated[
        str,
        _arrivals(
            "Users who ask again as soon as they are answered; several numbers are measured one "
            "after the other. With --rate: the most that are answered at a time.",
            "-u",
            "--users",
            metavar="N,N,…",
        ),
    ] = "16",
    rate: Annotated[
        float | None,
        _arrivals("Arrivals a second, as a Poisson process, whether answered or not."),
    ] = None,
    requests: Annotated[
        int,
        _arrivals("Requests of each run. 0: four for each user, 32 at least.", "-r", "--requests"),
    ] = 0,
    prompt_len: Annotated[
        str,
        _asked(
            "Words of a prompt, about a token each: 128, 32-512 (uniform), or 200~100 (log-normal: "
            "mean and standard deviation).",
            "-p",
            "--prompt-len",
        ),
    ] = "128",
    answer_len: Annotated[
        str,
        _asked(
            "Tokens of an answer, in the same forms. Answers have exactly this length.",
            "-n",
            "--answer-len",
        ),
    ] = "64",
    shared_prefix: Annotated[int, _asked("Words that all prompts begin with.")] = 0,
    dataset: Annotated[
        Path | None,
        _asked('JSON lines with "prompt" or "messages", instead of random words.'),
    ] = None,
    seed: Annotated[int, _asked("Seed of words, lengths and arrivals.")] = 0,
    slo: Annotated[
        str | None,
        _output(
            "Limits of latency in milliseconds, as in ttft:500,itl:50,e2e:10000; goodput counts "
            "the requests that stayed within them."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, _output("Write all figures here.", "--json", **tried("the figures"))
    ] = None,
    plot_file: Annotated[
        Path | None,
        _output(
            "Draw the distributions here, as SVG; needs matplotlib.", "--plot", **tried("the plot")
        ),
    ] = None,
    timeout: Annotated[float, option("Seconds after which a request counts as failed.")] = 600.0,
) -> int:
    """Measure a server under load: time to first token, between tokens, to the end; throughput.

    It may be octavo's (`octavo serve`) or any other with OpenAI's API. Exit code: 0 every request was answered, 1 not.

    [bold]octavo bench serve --users 1,4,16,64 --prompt-len 32-512 --slo ttft:1000,itl:100[/bold]
    """  # noqa: E501  (typer takes a line break for one)
    import asyncio

    from octavo.bench.serve_client import Client
    from octavo.bench.serve_report import make_table, parse_slo, summarize
    from octavo.config import read_environment

    if plot_file is not None:
        from octavo.bench.serve_plot import need_matplotlib

        need_matplotlib()  # before anything is measured
    limits = None if slo is None else parse_slo(slo)
    loads = _loads(users, rate, requests)
    jobs = _jobs(prompt_len, answer_len, shared_prefix, dataset, seed)
    client = Client(url, api_key or read_environment().api_key, timeout)
    measured, served = asyncio.run(_measure(client, model, jobs, loads, seed))
    summaries = [summarize(found, limits) for found in measured]
    from rich.console import Console

    Console().print(make_table(summaries))
    for summary in summaries:
        for reason, count in summary["errors"].items():
            print_error(f"{summary['load']}: {count} failed: {reason}")
    asked: dict[str, Any] = {
        "url": url,
        "model": served,
        "prompt_len": prompt_len,
        "answer_len": answer_len,
    }
    asked |= {"shared_prefix": shared_prefix, "dataset": dataset and str(dataset), "seed": seed}
    _write(json_file, plot_file, asked, measured, summaries)
    return FAILED if any(summary["failed"] for summary in summaries) else 0


def _loads(users: str, rate: float | None, requests: int) -> list[Load]:
    from octavo.bench.serve_run import Load

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


def _jobs(
    prompt_len: str, answer_len: str, shared_prefix: int, dataset: Path | None, seed: int
) -> Iterator[Job]:
    from octavo.bench.serve_workload import jobs_of_file, parse_lengths, random_jobs

    answers = parse_lengths("--answer-len", answer_len)
    if dataset is not None:
        return jobs_of_file(dataset, answers, seed)
    prompts = parse_lengths("--prompt-len", prompt_len)
    return random_jobs(prompts, answers, shared_prefix, seed)


async def _measure(
    client: Client, model: str | None, jobs: Iterator[Job], loads: list[Load], seed: int
) -> tuple[list[Measured], str]:
    from octavo.bench.serve_run import run_load

    served = model or await client.model()
    warm_up = await client.ask(next(jobs), served)
    if not warm_up.ok:
        reason = warm_up.error or f"status {warm_up.status}, and no text"
        raise InvalidArgumentError(f"the server does not answer a first request: {reason}")
    note(f"measuring {served} at {client.url}")
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
    json_file: Path | None,
    plot_file: Path | None,
    asked: dict[str, Any],
    measured: list[Measured],
    summaries: list[dict[str, Any]],
) -> None:
    if json_file is not None:
        from octavo import __version__
        from octavo.machine import processor

        stamp = {"octavo": __version__, "client": processor(), "asked": asked, "loads": summaries}
        write_text(json_file, "the figures", json.dumps(stamp, indent=2) + "\n")
    if plot_file is not None:
        from octavo.bench.serve_plot import plot

        title = f"{asked['model']}: prompts {asked['prompt_len']}, answers {asked['answer_len']}"
        write_text(plot_file, "the plot", plot(measured, summaries, title))
