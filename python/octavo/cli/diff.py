"""`octavo diff`: where octavo, its reference and Hugging Face differ."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

from octavo.cli import completion
from octavo.cli.common import FAILED, progress_bar
from octavo.cli.options import ModelArgument, grouped, option, tried
from octavo.files import write_text

_how = partial(option, panel="How")


@dataclass(frozen=True)
class Compared:
    """What runs, on which tokens; fields of DiffRequest under the same names."""

    against: Annotated[
        str,
        option(
            "With transformers (hf), or the NumPy reference. The reference is always there; hf "
            "needs torch and transformers.",
            metavar="reference|hf",
        ),
    ] = "reference"
    prompt: Annotated[
        str | None,
        option(
            "The text to run. Left out: a short one with digits, code, Chinese, an emoji.",
            "--prompt",
            "-p",
            metavar="TEXT",
        ),
    ] = None
    random: Annotated[
        int | None, option("Run this many random tokens instead of a text.", metavar="N")
    ] = None
    dtype: Annotated[
        str,
        option("Number format of both. f32 is the sharper test.", metavar="f32|bf16"),
    ] = "f32"
    quantize: Annotated[
        str | None,
        option(
            "Round the weights of both first. octavo's quantized kernels run against the "
            "reference's quantized forward, at the tolerance of bf16.",
            metavar="int8|w8a8|int4|int4-nonuniform",
        ),
    ] = None
    adapter: Annotated[
        Path | None,
        option(
            "Run both with this LoRA adapter. It is a folder that PEFT's save_pretrained wrote; "
            "against hf it is PEFT that computes it (needs peft).",
            metavar="PATH",
            autocompletion=completion.adapters,
        ),
    ] = None
    device: Annotated[str, option("Where octavo computes.", metavar="auto|cpu|cuda")] = "cpu"
    judge: Annotated[
        bool,
        _how("Also compare both with the reference in float64: who rounds more?", "--judge"),
    ] = False
    num_threads: Annotated[
        int, _how("CPU threads. 0: OCTAVO_NUM_THREADS, else one for each physical core.")
    ] = 0
    load_format: Annotated[
        str,
        _how(
            "dummy: random weights of the model's shape, no weight files needed.",
            metavar="auto|dummy",
        ),
    ] = "auto"


@dataclass(frozen=True)
class Shown:
    """What becomes of the result."""

    html: Annotated[
        Path | None,
        option("Also write a page: a heat map of layer by position.", **tried("the page")),
    ] = None
    json: Annotated[bool, option("Print JSON instead of the table.", "--json")] = False
    show_all: Annotated[
        bool,
        option("Show every tap. Left out: a layer within tolerance takes one line.", "--all"),
    ] = False


@grouped
def diff(
    model: ModelArgument = None,
    *,
    compared: Compared,
    steps: Annotated[int, _how("Greedy tokens to compare after the text. 0: none.")] = 16,
    tolerance: Annotated[
        float | None,
        _how("Largest relative error between the two runs, in place of octavo's table."),
    ] = None,
    shown: Shown,
) -> int:
    """Run octavo and another implementation on the same tokens, and compare all.

    Every intermediate result is compared, in the order in which it is computed, and every op is
    checked by itself on the inputs it had. A quantized model is compared with the reference's
    quantized forward, at the tolerance of bf16. Exit code: 0 no difference, 1 a difference, 2 a
    mistake in what was asked.

    [bold]octavo diff smollm2-135m --against hf[/bold]
    """
    from octavo.config import dtype_name, read_environment
    from octavo.diff.comparison import DiffOptions
    from octavo.diff.html import render
    from octavo.diff.report import print_report, to_json
    from octavo.diff.setup import DiffRequest, compare

    compared = replace(compared, dtype=dtype_name(compared.dtype))
    options = DiffOptions(steps=steps, tolerance=tolerance)
    request = DiffRequest(model=model, options=options, **vars(compared))
    with progress_bar() as status:
        result = compare(request, read_environment(), status.update)
    if shown.html is not None:
        write_text(shown.html, "the page", render(result))
    if shown.json:
        sys.stdout.write(to_json(result) + "\n")
    else:
        print_report(result, show_all=shown.show_all, page=shown.html)
    return 0 if result.ok else FAILED
