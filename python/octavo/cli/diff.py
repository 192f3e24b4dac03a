"""`octavo diff`: where octavo, its reference and Hugging Face differ."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.common import FAILED, NumThreadsOption

_WHAT, _HOW, _OUT = "What to compare", "How", "Output"


def diff(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Name of a pulled model (smollm2-135m), a folder with a Hugging Face model, or a "
            "GGUF file. Left out: smollm2-135m, fetched on first use.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            help="What to compare octavo with: reference (its NumPy definition, always there) or "
            "hf (Hugging Face transformers: needs torch and transformers).",
            metavar="reference|hf",
            rich_help_panel=_WHAT,
        ),
    ] = "reference",
    dtype: Annotated[
        str,
        typer.Option(
            help="Number format of both sides. f32 is the sharper test.",
            metavar="f32|bf16",
            rich_help_panel=_WHAT,
        ),
    ] = "f32",
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Round the weights first: octavo's quantized kernels against the reference's "
            "quantized forward (at the tolerance of bf16).",
            metavar="int8|w8a8|int4|int4-nonuniform",
            show_default=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="The text to run. Left out: a short one with digits, code, Chinese, an emoji.",
            show_default=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    random: Annotated[
        int | None,
        typer.Option(
            help="Run this many random tokens instead of a text.",
            show_default=False,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(
            help="Greedy tokens to compare after the text. 0: none.", rich_help_panel=_HOW
        ),
    ] = 16,
    judge: Annotated[
        bool,
        typer.Option(
            "--judge",
            help="Also compare both sides with the reference in float64: who rounds more?",
            rich_help_panel=_HOW,
        ),
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest relative error between the two runs, in place of octavo's table.",
            show_default=False,
            rich_help_panel=_HOW,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(help="Where octavo computes.", metavar="auto|cpu|cuda", rich_help_panel=_HOW),
    ] = "cpu",
    num_threads: NumThreadsOption = 0,
    load_format: Annotated[
        str,
        typer.Option(
            help="dummy: random weights of the model's shape, no weight files needed.",
            metavar="auto|dummy",
            rich_help_panel=_HOW,
        ),
    ] = "auto",
    html: Annotated[
        Path | None,
        typer.Option(
            help="Also write one self-contained page with a heat map (layer x position).",
            show_default=False,
            readable=False,
            rich_help_panel=_OUT,
        ),
    ] = None,
    json: Annotated[
        bool,
        typer.Option("--json", help="Print JSON instead of the table.", rich_help_panel=_OUT),
    ] = False,
    show_all: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Show every tap. Left out: a layer within tolerance takes one line.",
            rich_help_panel=_OUT,
        ),
    ] = False,
) -> int:
    """Run octavo and another implementation on the same tokens, and show where they differ.

    Every intermediate result is compared, in the order in which it is computed, and every op is
    checked by itself on the inputs it had. Exit code: 0 no difference, 1 a difference, 2 a mistake
    in what was asked.
    """
    from octavo.cli.stage_bar import StageBar
    from octavo.config import dtype_name, read_environment
    from octavo.diff.comparison import DiffOptions
    from octavo.diff.html import write_html
    from octavo.diff.report import print_report, to_json
    from octavo.diff.setup import DiffRequest, prepare
    from octavo.files import check_writable

    if html is not None:
        check_writable(html, "the page")
    request = DiffRequest(
        model=model,
        against=against,
        dtype=dtype_name(dtype),
        quantize=quantize,
        prompt=prompt,
        random=random,
        device=device,
        load_format=load_format,
        judge=judge,
        num_threads=num_threads,
        options=DiffOptions(steps=steps, tolerance=tolerance),
    )
    with StageBar.with_counts() as status:
        prepared = prepare(request, read_environment(), status.update)
        result = prepared.comparison.run(
            prepared.title, prepared.token_texts, prepared.decode, judged=judge
        )
    if html is not None:
        write_html(html, result)
    if json:
        sys.stdout.write(to_json(result) + "\n")
    else:
        print_report(result, show_all=show_all, page=html)
    return 0 if result.ok else FAILED
