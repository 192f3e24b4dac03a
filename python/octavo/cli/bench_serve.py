"""`octavo bench serve`: a server under load, octavo's or any with OpenAI's API."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.bench import parse_numbers
from octavo.cli.common import FAILED, note, print_error, stderr_console
from octavo.errors import InvalidArgumentError
from octavo.files import check_writable, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from octavo.bench.serve_client import Client
    from octavo.bench.serve_run import Load, Measured
    from octavo.bench.serve_workload import Job

_ARRIVALS, _REQUESTS, _OUT = "How requests come", "What they ask", "Output"


def bench_serve(
    url: Annotated[
        str, typer.Argument(help="Where the server is, with or without /v1.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None,
        typer.Option(help="Model to name. Left out: the first one served.", show_default=False),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Left out: OCTAVO_API_KEY, or none.", show_default=False)
    ] = None,
    users: Annotated[
        str,
        typer.Option(
            "-u",
            "--users",
            help="Users who ask again as soon as they are answered; several numbers are measured "
            "one after the other. With --rate: the most that are answered at a time.",
            metavar="N,N,…",
            rich_help_panel=_ARRIVALS,
        ),
    ] = "16",
    rate: Annotated[
        float | None,
        typer.Option(
            help="Arrivals a second, as a Poisson process, whether answered or not.",
            show_default=False,
            rich_help_panel=_ARRIVALS,
        ),
    ] = None,
    requests: Annotated[
        int,
        typer.Option(
            "-r",
            "--requests",
            help="Requests of each run. 0: four for each user, 32 at least.",
            rich_help_panel=_ARRIVALS,
        ),
    ] = 0,
    prompt_len: Annotated[
        str,
        typer.Option(
            "-p",
            "--prompt-len",
            help="Words of a prompt, about a token each: 128, 32-512 (uniform), or 200~100 "
            "(log-normal: mean and standard deviation).",
            rich_help_panel=_REQUESTS,
        ),
    ] = "128",
    answer_len: Annotated[
        str,
        typer.Option(
            "-n",
            "--answer-len",
            help="Tokens of an answer, in the same forms. Answers do not end before.",
            rich_help_panel=_REQUESTS,
        ),
    ] = "64",
    shared_prefix: Annotated[
        int,
        typer.Option(help="Words that all prompts begin with.", rich_help_panel=_REQUESTS),
    ] = 0,
    dataset: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines with "prompt" or "messages", instead of random words.',
            readable=False,
            show_default=False,
            rich_help_panel=_REQUESTS,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of words, lengths and arrivals.", rich_help_panel=_REQUESTS)
    ] = 0,
    slo: Annotated[
        str | None,
        typer.Option(
            help="Milliseconds that users can rely on, as in ttft:500,itl:50,e2e:10000; goodput "
            "counts the requests that kept to it.",
            show_default=False,
            rich_help_panel=_OUT,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write all figures here.", readable=False, rich_help_panel=_OUT
        ),
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            help="Draw the distributions here, as SVG.",
            readable=False,
            rich_help_panel=_OUT,
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds after which a request counts as failed.")
    ] = 600.0,
) -> int:
    """Measure a server under load: time to first token, between tokens, to the end; throughput.

    It may be octavo's (`octavo serve`) or any other with OpenAI's API. Exit code: 0 every request was answered, 1 not.

    [bold]octavo bench serve --users 1,4,16,64 --prompt-len 32-512 --slo ttft:1000,itl:100[/bold]
    """  # noqa: E501  (typer takes a line break for one)
    import asyncio

    from octavo.bench.serve_client import Client
    from octavo.bench.serve_report import make_table, parse_slo, summarize
    from octavo.config import read_environment

    for path, what in ((json_file, "the figures"), (plot_file, "the plot")):
        if path is not None:
            check_writable(path, what)
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
    from functools import partial

    from octavo.bench.serve_run import run_load
    from octavo.weights.progress import LogLines

    served = model or await client.model()
    warm_up = await client.ask(next(jobs), served)
    if not warm_up.ok:
        reason = warm_up.error or f"status {warm_up.status}, and no text"
        raise InvalidArgumentError(f"the server does not answer a first request: {reason}")
    console = stderr_console()
    if not console.is_terminal:
        note(f"measuring {served} at {client.url}")
        lines = LogLines(console.print)

        def log(load: Load, done: int, running: int, _tokens: int) -> None:
            lines.offer(lambda: f"{load.name}: {done} of {load.num_requests}, {running} run")

        found = [
            await run_load(client, served, jobs, load, seed, partial(log, load)) for load in loads
        ]
        return found, served

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Remaining())
    found = []
    with Progress(*columns, TextColumn("{task.fields[facts]}"), console=console) as bar:
        for load in loads:
            task = bar.add_task(load.name, total=load.num_requests, facts="")
            start = bar.get_time()

            def advance(done: int, running: int, tokens: int, task: Any = task) -> None:
                speed = tokens / max(1e-9, bar.get_time() - start)  # noqa: B023
                bar.update(task, completed=done, facts=f"{running} run · {speed:,.0f} tokens/s")

            found.append(await run_load(client, served, jobs, load, seed, advance))
    return found, served


def _write(
    json_file: Path | None,
    plot_file: Path | None,
    asked: dict[str, Any],
    measured: list[Measured],
    summaries: list[dict[str, Any]],
) -> None:
    import json

    if json_file is not None:
        from octavo import __version__
        from octavo.machine import processor

        stamp = {"octavo": __version__, "client": processor(), "asked": asked, "loads": summaries}
        write_text(json_file, "the figures", json.dumps(stamp, indent=2) + "\n")
    if plot_file is not None:
        from octavo.bench.serve_plot import plot

        title = f"{asked['model']}: prompts {asked['prompt_len']}, answers {asked['answer_len']}"
        write_text(plot_file, "the plot", plot(measured, summaries, title))
