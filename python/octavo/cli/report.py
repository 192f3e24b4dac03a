"""`octavo report`: results files as tables, or as one page with plots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.common import note
from octavo.cli.options import argument, option, tried
from octavo.files import write_text


def report(
    results: Annotated[
        list[Path],
        argument(
            "JSON of benchmarks/run.py, or of octavo bench, bench serve, eval.",
            "RESULTS...",
        ),
    ],
    output: Annotated[
        Path | None,
        option(
            "Write one page with plots here. Left out: tables in Markdown.",
            "-o",
            "--output",
            **tried("the page", "FILE.html"),
        ),
    ] = None,
    title: Annotated[
        str | None, option("Title of the page. Left out: the first file's.", metavar="TEXT")
    ] = None,
    png: Annotated[
        Path | None,
        option("Write every plot as a PNG here.", "--png", metavar="FOLDER"),
    ] = None,
    svg: Annotated[
        Path | None,
        option("Write every plot as an SVG here.", "--svg", metavar="FOLDER"),
    ] = None,
) -> None:
    """Show results of benchmarks: tables, or one page with plots, machines and gaps.

    The page needs nothing beside it, is light or dark as the reader's system is, and can be read on
    a phone. Plots: a roofline, throughput against batch, memory against context, distributions of
    the first token and between tokens, latency against offered load, quality against size.
    """
    from octavo.report.markdown import tables
    from octavo.report.page import render, write_pictures
    from octavo.report.plots import need_matplotlib
    from octavo.report.results import read_results

    for value, name in ((output, "--output"), (png, "--png"), (svg, "--svg")):
        if value is not None:
            need_matplotlib(name)
    found = [read_results(file) for file in results]
    if output is None and png is None and svg is None:
        for each in found:
            typer.echo("\n".join(tables(each)) + "\n")
    if output is not None:
        write_text(output, "the page", render(found, title or found[0].title))
        note(f"written: {output}")
    for folder, suffix in ((png, "png"), (svg, "svg")):
        if folder is not None:
            files = write_pictures(found, folder, suffix)
            note(f"written: {len(files)} plots in {folder}")
