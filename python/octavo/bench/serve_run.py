"""Requests sent as they arrive: a fixed number of users, or a Poisson process."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from octavo.bench.serve_client import Client, Record
from octavo.bench.serve_workload import Job, poisson_gaps

Progress = Callable[[int, int, int], None]
"""Called after each request with how many have ended, how many run, and the tokens so far."""


@dataclass(frozen=True)
class Load:
    """When requests are sent.

    concurrency: users; each asks again when answered (closed loop); with a finite rate the
    most that run at a time. rate: arrivals a second, Poisson; infinite for the closed loop.
    """

    num_requests: int
    concurrency: int
    rate: float = math.inf

    @property
    def name(self) -> str:
        """For tables and plots."""
        if math.isinf(self.rate):
            return f"{self.concurrency} user{'s' * (self.concurrency > 1)}"
        return f"{self.rate:g} a second"


@dataclass(frozen=True)
class Measured:
    """One load's records, and the seconds from its first request to its last answer."""

    load: Load
    seconds: float
    records: tuple[Record, ...]


async def run_load(
    client: Client,
    model: str,
    jobs: Iterator[Job],
    load: Load,
    seed: int,
    progress: Progress | None = None,
) -> Measured:
    """Send the load's requests and wait for all of them."""
    records: list[Record] = []
    room = asyncio.Semaphore(load.concurrency)
    running = 0
    num_tokens = 0

    async def ask(job: Job) -> None:
        nonlocal running, num_tokens
        running += 1
        try:
            record = await client.ask(job, model)
        finally:
            running -= 1
            room.release()
        records.append(record)
        num_tokens += record.num_answer_tokens
        if progress is not None:
            progress(len(records), running, num_tokens)

    tasks = []
    gaps = poisson_gaps(load.rate, seed)
    started = due = time.perf_counter()
    for job in islice(jobs, load.num_requests):
        # By the clock and not one after the other, so that waiting for room does not thin them out.
        due += next(gaps)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        await room.acquire()
        tasks.append(asyncio.ensure_future(ask(job)))
    await asyncio.gather(*tasks)
    return Measured(load, time.perf_counter() - started, tuple(records))
