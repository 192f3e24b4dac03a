"""`octavo diff`: where octavo, its reference and Hugging Face differ."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

from octavo.cli.common import FAILED, progress_bar
from octavo.cli.options import ModelArgument, option, tried
from octavo.files import write_text

_what = partial(option, panel="What to compare")
_how = partial(option, panel="How")
_out = partial(option, panel="Output")


def diff(
    model: ModelArgument = None,
    against: Annotated[
        str,
        _what(
            "What to compare octavo with: reference (its NumPy definition, always there) or hf "
            "(Hugging Face transformers: needs torch and transformers).",
            metavar="reference|hf",
        ),
    ] = "reference",
    dtype: Annotated[
        str,
        _what("Number format of both. f32 is the sharper test.", metavar="f32|bf16"),
    ] = "f32",
    quantize: Annotated[
        str | None,
        _what(
            "Round the weights first: octavo's quantized kernels against the reference's quantized "
            "forward (at the tolerance of bf16).",
            metavar="int8|w8a8|int4|int4-nonuniform",
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        _what(
            "Run both with this LoRA adapter, a folder that PEFT's save_pretrained wrote. Against "
            "hf it is PEFT that computes it (needs peft)."
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        _what(
            "The text to run. Left out: a short one with digits, code, Chinese, an emoji.",
            "--prompt",
            "-p",
        ),
    ] = None,
    random: Annotated[int | None, _what("Run this many random tokens instead of a text.")] = None,
    steps: Annotated[int, _how("Greedy tokens to compare after the text. 0: none.")] = 16,
    judge: Annotated[
        bool,
        _how("Also compare both with the reference in float64: who rounds more?", "--judge"),
    ] = False,
    tolerance: Annotated[
        float | None,
        _how("Largest relative error between the two runs, in place of octavo's table."),
    ] = None,
    device: Annotated[str, _how("Where octavo computes.", metavar="auto|cpu|cuda")] = "cpu",
    num_threads: Annotated[
        int, _how("CPU threads. 0: OCTAVO_NUM_THREADS, else one for each physical core.")
    ] = 0,
    load_format: Annotated[
        str,
        _how(
            "dummy: random weights of the model's shape, no weight files needed.",
            metavar="auto|dummy",
        ),
    ] = "auto",
    html: Annotated[
        Path | None,
        _out(
            "Also write one self-contained page with a heat map (layer x position).",
            **tried("the page"),
        ),
    ] = None,
    json: Annotated[bool, _out("Print JSON instead of the table.", "--json")] = False,
    show_all: Annotated[
        bool,
        _out("Show every tap. Left out: a layer within tolerance takes one line.", "--all"),
    ] = False,
) -> int:
    """Run octavo and another implementation on the same tokens, and show where they differ.

    Every intermediate result is compared, in the order in which it is computed, and every op is
    checked by itself on the inputs it had. A quantized model is compared with the reference's
    quantized forward, at the tolerance of bf16. Exit code: 0 no difference, 1 a difference, 2 a
    mistake in what was asked.
    """
    from octavo.config import dtype_name, read_environment
    from octavo.diff.comparison import DiffOptions
    from octavo.diff.html import render
    from octavo.diff.report import print_report, to_json
    from octavo.diff.setup import DiffRequest, compare

    request = DiffRequest(
        model=model,
        against=against,
        dtype=dtype_name(dtype),
        quantize=quantize,
        prompt=prompt,
        random=random,
        adapter=adapter,
        device=device,
        load_format=load_format,
        judge=judge,
        num_threads=num_threads,
        options=DiffOptions(steps=steps, tolerance=tolerance),
    )
    with progress_bar() as status:
        result = compare(request, read_environment(), status.update)
    if html is not None:
        write_text(html, "the page", render(result))
    if json:
        sys.stdout.write(to_json(result) + "\n")
    else:
        print_report(result, show_all=show_all, page=html)
    return 0 if result.ok else FAILED
