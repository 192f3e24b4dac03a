"""Runs a log's arrivals again under other options, on a simulated device.

`arrivals_of` reads from the log when each request came, how long prompt and answers were, and which
prompts began alike; `Simulation` runs them. `summarize` computes the same figures for any log, so
that measured and simulated ones can be compared.

A replay does not know two things: that the next turn of a conversation begins with the last answer
(an answer's tokens are not in the log), and that a client that waits longer sends its next request
later.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from octavo.config import EngineConfig, RuntimeOptions
from octavo.errors import InvalidArgumentError
from octavo.trace.log_file import LogFile, Record, first, num_answers
from octavo.trace.simulation import Arrival, End


def arrivals_of(log: LogFile, speed: float = 1.0) -> list[Arrival]:
    """The requests of a log, without refused ones; with speed 2 they come twice as fast.

    Each answer ends after as many tokens as it had, and the beams of a search fork as they did. A
    request that ended early (by a client, a deadline, or the log's end) is given as many tokens as
    it was allowed; a client that left does so again, as long after its arrival.
    """
    arrivals = []
    for request_id in log.request_ids:
        records = log.of_request(request_id)
        arrived = first(records, "arrived")
        if arrived is None:  # refused, or its arrival fell out of the ring
            continue
        ends = [r for r in records if r["event"] == "finished"]
        is_whole = len(ends) == num_answers(arrived) and all(
            r["reason"] in ("stop", "length") for r in ends
        )
        answers = {r["sample"]: End(r["num_output_tokens"], r["reason"]) for r in ends}
        aborted = [r["time"] for r in ends if r["reason"] == "abort"]
        arrivals.append(
            Arrival(
                arrived["time"] / speed,
                request_id,
                arrived["num_prompt_tokens"],
                arrived["max_tokens"],
                arrived["n"],
                arrived["priority"],
                arrived["timeout"],
                tuple(arrived["blocks"]),
                aborted[0] - arrived["time"] if aborted else None,
                tuple(answers[i] for i in sorted(answers)) if is_whole else (),
                arrived["num_beams"],
                tuple(tuple(r["parents"]) for r in records if r["event"] == "forked"),
            )
        )
    if not arrivals:
        raise InvalidArgumentError("the log has no arrivals; expected at least one to replay")
    return arrivals


def options_of(log: LogFile, changes: Mapping[str, Any]) -> tuple[RuntimeOptions, int]:
    """(options, number of KV blocks) of the engine that wrote the log, with changes.

    changes: fields of RuntimeOptions, or num_kv_blocks; None keeps the log's value. Raises
    InvalidArgumentError for a value that an engine would not take.
    """
    header = log.header
    try:
        values = {
            name: header[name]
            for name in (
                "block_size",
                "max_num_seqs",
                "max_num_batched_tokens",
                "max_model_len",
                "priority_ageing_seconds",
                "enable_prefix_caching",
                "max_waiting_requests",
                "max_waiting_tokens",
            )
        }
        num_blocks = header["num_blocks"]
    except KeyError as error:
        raise InvalidArgumentError(
            f"the log's first line has no {error.args[0]}; expected what octavo writes there"
        ) from None
    given = {name: value for name, value in changes.items() if value is not None}
    num_blocks = given.pop("num_kv_blocks", num_blocks)
    values.update(given)
    EngineConfig(num_kv_blocks=num_blocks, **values)  # checks them
    # The ring must hold a whole simulation.
    values["rope_switch"] = header.get("rope_switch", 0)
    options = RuntimeOptions(dtype="f32", kv_dtype="f32", event_log_capacity=10**8, **values)
    return options, num_blocks


@dataclass(frozen=True)
class Quantiles:
    """Mean, median, 90th and 99th percentile of some times in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Quantiles | None:
        """By the nearest rank; None of no values."""
        found = sorted(values)
        if not found:
            return None
        ranks = [found[max(0, math.ceil(q * len(found)) - 1)] for q in (0.5, 0.9, 0.99)]
        return cls(math.fsum(found) / len(found), *ranks)


@dataclass(frozen=True)
class Summary:
    """Figures of all requests of a log together; times in seconds.

    waiting: from arrival to being started. time_to_first_token: from arrival. total_time: from
    arrival to the end of the last answer. time_per_token: between two tokens of an answer, each
    answer's mean. tokens_per_second: sampled, over the time from the first arrival to the last end.
    """

    num_requests: int
    num_refused: int
    finished: Mapping[str, int]
    seconds: float
    num_output_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    num_steps: int
    waiting: Quantiles | None
    time_to_first_token: Quantiles | None
    time_per_token: Quantiles | None
    total_time: Quantiles | None

    @property
    def tokens_per_second(self) -> float:
        """Tokens sampled a second, all requests together."""
        return self.num_output_tokens / self.seconds if self.seconds > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def summarize(log: LogFile) -> Summary:
    """The figures of a log, measured or simulated."""
    arrivals: list[Record] = []
    admissions: list[Record] = []
    waiting: list[float] = []
    to_first_token: list[float] = []
    per_token: list[float] = []
    total: list[float] = []
    for request_id in log.request_ids:
        records = log.of_request(request_id)
        arrived, admitted = first(records, "arrived"), first(records, "admitted")
        if arrived is None:  # refused, or its arrival fell out of the ring
            continue
        arrivals.append(arrived)
        if admitted is not None:
            admissions.append(admitted)
            waiting.append(admitted["time"] - arrived["time"])
        firsts = {r["sample"]: r["time"] for r in records if r["event"] == "first_token"}
        if firsts:
            to_first_token.append(min(firsts.values()) - arrived["time"])
        ends = {r["sample"]: r for r in records if r["event"] == "finished"}
        if len(ends) == num_answers(arrived):
            total.append(max(r["time"] for r in ends.values()) - arrived["time"])
        per_token += [
            (ends[sample]["time"] - time) / (ends[sample]["num_output_tokens"] - 1)
            for sample, time in firsts.items()
            if sample in ends and ends[sample]["num_output_tokens"] > 1
        ]
    count = Counter(record["event"] for record in log.records)
    finished = [record for record in log.records if record["event"] == "finished"]
    begin = min((record["time"] for record in arrivals), default=0.0)
    return Summary(
        num_requests=len(arrivals),
        num_refused=count["refused"],
        finished=dict(Counter(record["reason"] for record in finished)),
        seconds=max((record["time"] for record in finished), default=begin) - begin,
        num_output_tokens=sum(record["num_output_tokens"] for record in finished),
        num_prompt_tokens=sum(record["num_prompt_tokens"] for record in arrivals),
        num_cached_tokens=sum(record["num_cached_tokens"] for record in admissions),
        num_preemptions=count["preempted"],
        num_steps=len(log.steps),
        waiting=Quantiles.of(waiting),
        time_to_first_token=Quantiles.of(to_first_token),
        time_per_token=Quantiles.of(per_token),
        total_time=Quantiles.of(total),
    )
