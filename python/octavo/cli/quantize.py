"""`octavo quantize`: write a model with its weights rounded to 8 or 4 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from octavo.quantize.writer import QuantizedDirectory

_CALIBRATION = "With a text at hand"
_INT4, _BITS, _OUTPUT = "Of int4 and int4-nonuniform", "More bits where they are needed", "Output"


def quantize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Name of a pulled model (smollm2-135m), a folder with a Hugging Face model, or a "
            "GGUF file, its weights in f32, f16 or bf16.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="[OUT]",
            help="The new folder; made whole or not at all. May be left out with --sensitivity.",
            readable=False,
            show_default=False,
        ),
    ] = None,
    scheme: Annotated[
        str,
        typer.Option(
            "--scheme",
            help="int8: a scale for each output, next to no loss. w8a8: the same, to be run with "
            "activations of 8 bits, which loses more and is faster on CPUs. int4: a scale for "
            "each group of inputs. int4-nonuniform: the same with levels closer together near 0, "
            "half the loss; octavo alone reads it.",
            metavar="int8|w8a8|int4|int4-nonuniform",
        ),
    ] = "int8",
    group_size: Annotated[
        int,
        typer.Option(
            "--group-size",
            help="Weights that share a scale. Smaller is better and larger. A matrix "
            "whose width it does not divide takes the next smaller one that does.",
            metavar="32|64|128",
            rich_help_panel=_INT4,
        ),
    ] = 32,
    asymmetric: Annotated[
        bool,
        typer.Option(
            "--asymmetric",
            help="Of int4: give each group a zero point too. Worth its bits in wide groups.",
            rich_help_panel=_INT4,
        ),
    ] = False,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="weighted finds the scales of least squared error, errors counting by how large "
            "the inputs are that a few random tokens give; search counts all the same; rtn rounds "
            "to nearest. With --calibrate: gptq, awq or awq+gptq. Left out: weighted, or gptq.",
            metavar="weighted|search|rtn|gptq|awq|awq+gptq",
            show_default=False,
            rich_help_panel=_INT4,
        ),
    ] = None,
    int8: Annotated[
        list[str] | None,
        typer.Option(
            "--int8",
            help="A matrix that takes int8 all the same: its name in octavo (layers.0.down), or a "
            "pattern (*.down). May be given several times.",
            metavar="PATTERN",
            show_default=False,
            rich_help_panel=_BITS,
        ),
    ] = None,
    bits_per_weight: Annotated[
        float | None,
        typer.Option(
            "--bits-per-weight",
            help="Measure which parts lose the most in 4 bits, and give int8 to them, to at most "
            "so many bits a weight (embedding and head apart).",
            metavar="BITS",
            show_default=False,
            rich_help_panel=_BITS,
        ),
    ] = None,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Measure what quantizing each part alone costs, and print it.",
            rich_help_panel=_BITS,
        ),
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            help="What to measure sensitivity on, a text in UTF-8. Left out: random tokens, a "
            "poorer guide.",
            show_default=False,
            readable=False,
            rich_help_panel=_BITS,
        ),
    ] = None,
    max_windows: Annotated[
        int,
        typer.Option(
            "--max-windows",
            help="How many windows of 512 tokens to measure sensitivity on.",
            min=1,
            rich_help_panel=_BITS,
        ),
    ] = 2,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="A text file in UTF-8, like what the model will be used on. The weights are "
            "rounded so that what they make of it comes out right: better, and minutes of work.",
            show_default=False,
            readable=False,
            rich_help_panel=_CALIBRATION,
        ),
    ] = None,
    windows: Annotated[
        int,
        typer.Option(help="How many pieces of the text to take.", rich_help_panel=_CALIBRATION),
    ] = 16,
    window: Annotated[
        int, typer.Option(help="Tokens of a piece.", rich_help_panel=_CALIBRATION)
    ] = 512,
    seed: Annotated[
        int, typer.Option(help="Decides which pieces.", rich_help_panel=_CALIBRATION)
    ] = 0,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress bar.", rich_help_panel=_OUTPUT)
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON object instead of the summary.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
) -> None:
    """Write a model with its weights rounded to 8 or 4 bits.

    The folder is in the layout of compressed-tensors (pack-quantized), which octavo, vLLM and
    transformers load; int4-nonuniform is for octavo alone. Embedding and head stay floats there;
    octavo rounds them to int8 when it loads the folder (--keep-embedding leaves them).

    [bold]octavo quantize smollm2-135m ./smollm2-int8 --scheme int8[/bold]
    """
    from octavo.cli.stage_bar import StageBar
    from octavo.config import read_environment
    from octavo.errors import InvalidArgumentError
    from octavo.quantization.plan import Scheme
    from octavo.quantize.calibration import Calibration, check_method
    from octavo.quantize.model import QuantizeRequest, quantize_model

    if out is None and not sensitivity:
        raise InvalidArgumentError("OUT is missing; expected the name of a new folder")
    check_method(method, calibrated=calibrate is not None)
    calibration = None
    if calibrate is not None:
        calibration = Calibration(calibrate, method or "gptq", windows, window, seed)
        method = None  # what is measured beforehand is rounded without the text
    rounding = method or "weighted"
    request = QuantizeRequest(
        model,
        out,
        Scheme(scheme, group_size, not asymmetric, rounding, tuple(int8 or ())),
        sensitivity=sensitivity,
        bits_per_weight=bits_per_weight,
        text=text,
        max_windows=max_windows,
        calibration=calibration,
    )
    with StageBar.with_time_left(quiet=quiet) as bar:
        result = quantize_model(request, read_environment(), bar.update)
    if as_json:
        typer.echo(json.dumps(result.to_json()))
        return
    if result.sensitivity is not None:
        from octavo.quantize.sensitivity import print_sensitivity

        print_sensitivity(result.sensitivity, result.chosen)
    if result.directory is not None:
        _summarize(result.directory)


def _summarize(written: QuantizedDirectory) -> None:
    for note in written.notes:
        typer.echo(note)
    typer.echo(
        f"{written.path}: {written.num_bytes / 1e6:,.1f} MB of weights, from "
        f"{written.source_bytes / 1e6:,.1f} MB; {written.bits_per_weight:.2f} bits a weight, "
        "embedding and head apart"
    )
