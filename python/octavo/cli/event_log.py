"""`octavo explain`, `octavo trace` and `octavo replay`: what an event log tells."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from octavo.cli.common import note
from octavo.cli.log_place import newest_log
from octavo.cli.options import argument, option, tried
from octavo.errors import InvalidArgumentError
from octavo.files import write_text

if TYPE_CHECKING:
    from octavo.trace.replay import Quantiles, Summary

_LOG = "An event log. Left out: the newest that `--event-log auto` wrote."
LogArgument = Annotated[Path | None, argument(_LOG, "LOG")]
_policy = partial(option, panel="Engine (left out: as in the log)")
_cost = partial(option, panel="Device: seconds of a step (left out: fitted to the log's steps)")


def _newest() -> Path:
    """The newest log that nobody gave a name, which the user is told."""
    log = newest_log()
    note(f"reading {log}")
    return log


def explain(
    log: Annotated[Path | None, option(_LOG, metavar="FILE")] = None,
    request_id: Annotated[
        str | None,
        argument("Which request. Left out: all of them, one a line.", "REQUEST_ID"),
    ] = None,
) -> None:
    """Tell where a request's time went, from an event log.

    How long it waited and for what, what of its prompt was cached, who preempted it, which step was
    slow and why.

    [bold]octavo batch prompts.txt answers.jsonl --event-log auto[/bold]

    [bold]octavo explain 17[/bold]

    [bold]octavo explain 17 --log events.jsonl[/bold]
    """
    from octavo.trace.explain import explain as sentences_about
    from octavo.trace.explain import one_line
    from octavo.trace.log_file import read_log

    if log is None and request_id is not None and Path(request_id).is_file():
        raise InvalidArgumentError(
            f"REQUEST_ID is {request_id}, a file; expected one of a log's requests: name the log "
            f"with --log {request_id}"
        )
    recorded = read_log(log or _newest())
    if request_id is None:
        for known in recorded.request_ids:
            print(one_line(recorded, known))
    else:
        for sentence in sentences_about(recorded, request_id):
            print(sentence)


def trace(
    log: LogArgument = None,
    perfetto: Annotated[
        Path | None,
        option(
            "Where to write the trace. It is JSON in the Trace Event Format. Left out: the log's "
            "name with .trace.json at its end, in this folder.",
            **tried("the trace"),
        ),
    ] = None,
) -> None:
    """Turn an event log into a trace for ui.perfetto.dev.

    It shows every step with its tokens, every request with its waiting, prompt and decoding, and
    the KV cache filling. Open https://ui.perfetto.dev and drop the file there; it stays in your
    browser.

    [bold]octavo trace[/bold]

    [bold]octavo trace events.jsonl --perfetto trace.json[/bold]
    """
    from octavo.trace.log_file import read_log
    from octavo.trace.perfetto import perfetto_trace

    log = log or _newest()
    recorded = read_log(log)
    perfetto = perfetto or Path(f"{log.stem}.trace.json")
    write_text(perfetto, "the trace", json.dumps(perfetto_trace(recorded)))
    steps, requests = len(recorded.steps), len(recorded.request_ids)
    note(
        f"{requests:,} requests and {steps:,} steps: {perfetto}; open it in https://ui.perfetto.dev"
    )


def replay(
    log: LogArgument = None,
    *,
    max_num_seqs: Annotated[int | None, _policy("Most answers in a step.")] = None,
    max_num_batched_tokens: Annotated[int | None, _policy("Most tokens in a step.")] = None,
    num_kv_blocks: Annotated[int | None, _policy("Blocks of the KV cache.")] = None,
    enable_prefix_caching: Annotated[
        bool | None,
        _policy("Reuse what prompts have in common.", "--prefix-caching/--no-prefix-caching"),
    ] = None,
    priority_ageing_seconds: Annotated[
        float | None, _policy("What one level of priority is worth, in seconds of waiting.")
    ] = None,
    max_waiting_requests: Annotated[
        int | None, _policy("Most requests in the queue; more are refused.")
    ] = None,
    speed: Annotated[float, option("2: the requests come twice as fast.", metavar="NUMBER")] = 1.0,
    fixed: Annotated[float | None, _cost("For every step: reading the weights.")] = None,
    per_token: Annotated[float | None, _cost("For each token that is computed.")] = None,
    per_attended: Annotated[
        float | None, _cost("For each token that a computed one attends to.")
    ] = None,
    event_log: Annotated[
        Path | None,
        option("Write the simulated run's own event log here.", **tried("the event log")),
    ] = None,
    json_output: Annotated[bool, option("Print one JSON object.", "--json")] = False,
) -> None:
    """Run a log's requests again on a simulated device.

    The scheduler is the real one, device and clock are simulated; the same log and options give the
    same figures on any machine.

    [bold]octavo replay events.jsonl --max-num-seqs 16[/bold]

    [bold]octavo replay events.jsonl --num-kv-blocks 500 --speed 2[/bold]
    """
    from octavo.trace.log_file import log_of, read_log
    from octavo.trace.replay import arrivals_of, options_of, summarize
    from octavo.trace.simulation import CostModel, Simulation, fit_costs

    if not 0 < speed < math.inf:
        raise InvalidArgumentError(f"--speed is {speed}; expected a number above 0")
    recorded = read_log(log or _newest())
    given = {"fixed": fixed, "per_token": per_token, "per_attended": per_attended}
    known = {name: value for name, value in given.items() if value is not None}
    for name, value in known.items():
        if not 0 <= value < math.inf:
            option = name.replace("_", "-")
            raise InvalidArgumentError(f"--{option} is {value}; expected seconds, 0 or more")
    costs = CostModel(**known) if len(known) == 3 else replace(fit_costs(recorded.steps), **known)
    options, num_blocks = options_of(
        recorded,
        {
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "num_kv_blocks": num_kv_blocks,
            "enable_prefix_caching": enable_prefix_caching,
            "priority_ageing_seconds": priority_ageing_seconds,
            "max_waiting_requests": max_waiting_requests,
        },
    )
    if recorded.drafted_steps:
        note("the log's engine checked drafts; the replay has none, so answers take more steps")
    header = recorded.header
    windows = tuple(header.get("kv_windows", (0,)))
    simulation = Simulation(options, num_blocks, costs, header["block_size"], windows)
    simulation.run(arrivals_of(recorded, speed))
    events = simulation.engine.events
    if event_log is not None:
        events.write(event_log)
    before, after = summarize(recorded), summarize(log_of(events))
    if json_output:
        record = {"log": before.as_dict(), "replay": after.as_dict(), "costs": vars(costs)}
        print(json.dumps(record))
    else:
        _print_table(before, after)
        print(
            f"\nA step costs {costs.fixed * 1e3:.3g} ms, {costs.per_token * 1e6:.3g} µs a token "
            f"and {costs.per_attended * 1e9:.3g} ns an attended token."
        )


def _print_table(before: Summary, after: Summary) -> None:
    rows = [("", "log", "replay")]
    rows += [(name, show(before), show(after)) for name, show in _ROWS]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for name, left, right in rows:
        print(f"{name:{widths[0]}}  {left:>{widths[1]}}  {right:>{widths[2]}}")


def _show(quantiles: Quantiles | None) -> str:
    """Mean, median, 90th and 99th percentile in milliseconds."""
    if quantiles is None:
        return "-"
    values = (quantiles.mean, quantiles.p50, quantiles.p90, quantiles.p99)
    return " ".join(f"{value * 1e3:>8,.1f}" for value in values)


def _reasons(summary: Summary) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(summary.finished.items()))


_ROWS = (
    ("requests", lambda s: f"{s.num_requests:,}"),
    ("refused", lambda s: f"{s.num_refused:,}"),
    ("answers ended by", _reasons),
    ("seconds", lambda s: f"{s.seconds:,.3f}"),
    ("tokens/s", lambda s: f"{s.tokens_per_second:,.1f}"),
    ("steps", lambda s: f"{s.num_steps:,}"),
    ("preemptions", lambda s: f"{s.num_preemptions:,}"),
    ("prompt tokens cached", lambda s: f"{s.num_cached_tokens:,} of {s.num_prompt_tokens:,}"),
    ("ms:", lambda s: " ".join(f"{name:>8}" for name in ("mean", "p50", "p90", "p99"))),
    ("  waiting to start", lambda s: _show(s.waiting)),
    ("  time to first token", lambda s: _show(s.time_to_first_token)),
    ("  between tokens", lambda s: _show(s.time_per_token)),
    ("  whole request", lambda s: _show(s.total_time)),
)
