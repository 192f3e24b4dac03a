"""`octavo explain`: where a request's time went, in sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

LogOption = Annotated[
    Path,
    typer.Option(
        "--log",
        help="An event log, from `--event-log` or the server.",
        metavar="FILE",
        readable=False,
        show_default=False,
    ),
]


def explain(
    log: LogOption,
    request_id: Annotated[
        str | None,
        typer.Argument(
            metavar="REQUEST_ID",
            help="Which request. Left out: all of them, one a line.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Tell where a request's time went, from an event log.

    How long it waited and for what, what of its prompt was cached, who preempted it, which step was slow and why.

    [bold]octavo batch prompts.txt answers.jsonl --event-log events.jsonl[/bold]

    [bold]octavo explain 17 --log events.jsonl[/bold]
    """  # noqa: E501  (typer takes a line break for one)
    from octavo.trace.explain import explain as sentences_about
    from octavo.trace.explain import one_line
    from octavo.trace.log_file import read_log

    recorded = read_log(log)
    if request_id is None:
        for known in recorded.request_ids:
            print(one_line(recorded, known))
    else:
        for sentence in sentences_about(recorded, request_id):
            print(sentence)
    return 0
