"""`octavo trace`: an event log as a picture of time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.common import note
from octavo.files import write_text


def trace(
    log: Annotated[
        Path,
        typer.Argument(
            metavar="LOG", help="An event log, from `--event-log` or the server.", readable=False
        ),
    ],
    perfetto: Annotated[
        Path,
        typer.Option(
            "--perfetto",
            help="Where to write the trace, JSON in the Trace Event Format.",
            metavar="FILE",
            readable=False,
            show_default=False,
        ),
    ],
) -> int:
    """Turn an event log into a trace for ui.perfetto.dev.

    It shows every step with its tokens, every request with its waiting, prompt and decoding, and the KV cache filling. Open https://ui.perfetto.dev and drop the file there; it stays in your browser.

    [bold]octavo trace events.jsonl --perfetto trace.json[/bold]
    """  # noqa: E501  (typer takes a line break for one)
    from octavo.trace.log_file import read_log
    from octavo.trace.perfetto import perfetto_trace

    recorded = read_log(log)
    write_text(perfetto, "the trace", json.dumps(perfetto_trace(recorded)))
    steps, requests = len(recorded.steps), len(recorded.request_ids)
    note(
        f"{requests:,} requests and {steps:,} steps: {perfetto}; open it in https://ui.perfetto.dev"
    )
    return 0
