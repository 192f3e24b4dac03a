"""`octavo diff`: where octavo, its reference and Hugging Face differ."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.common import (
    FAILED,
    DeviceOption,
    LoadFormatOption,
    NumThreadsOption,
    QuantizeOption,
)

_what = partial(typer.Option, rich_help_panel="What to compare")
_how = partial(typer.Option, rich_help_panel="How")
_output = partial(typer.Option, rich_help_panel="Output")


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
        _what(
            help="What to compare octavo with: reference (its NumPy definition, always there) or "
            "hf (Hugging Face transformers: needs torch and transformers).",
            metavar="reference|hf",
        ),
    ] = "reference",
    dtype: Annotated[
        str, _what(help="Number format of both. f32 is the sharper test.", metavar="f32|bf16")
    ] = "f32",
    prompt: Annotated[
        str | None,
        _what(
            "--prompt",
            "-p",
            help="The text to run. Left out: a short one with digits, code, Chinese, an emoji.",
            show_default=False,
        ),
    ] = None,
    random: Annotated[
        int | None,
        _what(help="Run this many random tokens instead of a text.", show_default=False),
    ] = None,
    steps: Annotated[int, _how(help="Greedy tokens to compare after the text. 0: none.")] = 16,
    judge: Annotated[
        bool,
        _how("--judge", help="Also compare both with the reference in float64: who rounds more?"),
    ] = False,
    tolerance: Annotated[
        float | None,
        _how(
            help="Largest relative error between the two runs, in place of octavo's table.",
            show_default=False,
        ),
    ] = None,
    quantize: QuantizeOption = None,
    device: DeviceOption = "cpu",
    num_threads: NumThreadsOption = 0,
    load_format: LoadFormatOption = "auto",
    html: Annotated[
        Path | None,
        _output(
            help="Also write one self-contained page with a heat map (layer x position).",
            show_default=False,
            readable=False,
        ),
    ] = None,
    json: Annotated[bool, _output("--json", help="Print JSON instead of the table.")] = False,
    show_all: Annotated[
        bool,
        _output("--all", help="Show every tap. Left out: a layer within tolerance takes one line."),
    ] = False,
) -> int:
    """Run octavo and another implementation on the same tokens, and show where they differ.

    Every intermediate result is compared, in the order in which it is computed, and every op is
    checked by itself on the inputs it had. A quantized model is compared with the reference's
    quantized forward, at the tolerance of bf16. Exit code: 0 no difference, 1 a difference, 2 a
    mistake in what was asked.
    """
    from octavo.cli.stage_bar import StageBar
    from octavo.config import dtype_name, read_environment
    from octavo.diff.comparison import DiffOptions
    from octavo.diff.html import write_html
    from octavo.diff.report import print_report, to_json
    from octavo.diff.setup import DiffRequest, compare
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
        result = compare(request, read_environment(), status.update)
    if html is not None:
        write_html(html, result)
    if json:
        sys.stdout.write(to_json(result) + "\n")
    else:
        print_report(result, show_all=show_all, page=html)
    return 0 if result.ok else FAILED
