"""`octavo quantize`: write a model with its weights rounded to 8 or 4 bits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli import completion
from octavo.cli.options import argument, grouped, option, refuse_unused
from octavo.errors import InvalidArgumentError

if TYPE_CHECKING:
    from octavo.quantize.model import QuantizeRequest
    from octavo.quantize.writer import QuantizedDirectory

_calibration = partial(option, panel="Calibration")
_int4 = partial(option, panel="int4 and int4-nonuniform")
_bits = partial(option, panel="Mixed precision")


@dataclass(frozen=True)
class Rounding:
    """The number format, and how the weights are rounded to it."""

    scheme: Annotated[
        str,
        option(
            "8 bits: int8, w8a8; 4 bits: int4, int4-nonuniform. int8: a scale for each output, "
            "almost no loss. w8a8: the same, to be run with activations of 8 bits, which loses "
            "more and is faster on CPUs. int4: a scale for each group of inputs. int4-nonuniform: "
            "the same with levels closer together near 0, half the loss; octavo alone reads it.",
            metavar="int8|w8a8|int4|int4-nonuniform",
        ),
    ] = "int8"
    group_size: Annotated[
        int,
        _int4(
            "Weights that share a scale. Smaller groups lose less and take more space. A matrix "
            "whose width is no multiple of it takes the next smaller size that fits.",
            metavar="32|64|128",
        ),
    ] = 32
    asymmetric: Annotated[
        bool,
        _int4(
            "int4 only: a zero point for each group too. Worth its bits with large groups.",
            "--asymmetric",
        ),
    ] = False
    method: Annotated[
        str | None,
        _int4(
            "weighted: scales of least squared error, each error weighted by the size of its input "
            "on a few random tokens; search: the same without weights; rtn: round to nearest. "
            "With --calibrate: gptq, awq or awq+gptq. Left out: weighted, or gptq.",
            metavar="weighted|search|rtn|gptq|awq|awq+gptq",
        ),
    ] = None
    int8: Annotated[
        list[str] | None,
        _bits(
            "A matrix to write in int8: its name in octavo (layers.0.down), or a "
            "pattern (*.down). May be given several times.",
            metavar="PATTERN",
        ),
    ] = None


@dataclass(frozen=True)
class Measuring:
    """Which parts of the model bear 4 bits; fields of QuantizeRequest."""

    sensitivity: Annotated[
        bool,
        _bits("Measure what quantizing each part alone costs, and print it.", "--sensitivity"),
    ] = False
    bits_per_weight: Annotated[
        float | None,
        _bits(
            "Measure which parts lose the most in 4 bits, and write them in int8, up to this many "
            "bits per weight (without embedding and head).",
            metavar="BITS",
        ),
    ] = None
    text: Annotated[
        Path | None,
        _bits(
            "What to measure sensitivity on, a text in UTF-8. Left out: random tokens, a poorer "
            "guide."
        ),
    ] = None
    max_windows: Annotated[
        int, _bits("How many windows of 512 tokens to measure sensitivity on.", min=1)
    ] = 2


@dataclass(frozen=True)
class Calibrating:
    """The text that the rounding is fitted to."""

    calibrate: Annotated[
        Path | None,
        option(
            "A text file to calibrate on: more exact, takes minutes. It is in UTF-8, and like what "
            "the model will be used on. The weights are rounded so that its outputs on this text "
            "change least.",
            metavar="FILE",
        ),
    ] = None
    windows: Annotated[int, _calibration("How many pieces of the text to take.")] = 16
    window: Annotated[int, _calibration("Tokens of a piece.")] = 512
    seed: Annotated[int, _calibration("Chooses the pieces.")] = 0


@grouped
def quantize(
    model: Annotated[
        str,
        argument(
            "A pulled model, a folder, or a GGUF file. Its weights are in f32, f16 or bf16.",
            "MODEL",
            autocompletion=completion.models,
        ),
    ],
    out: Annotated[
        Path | None,
        argument(
            "The new folder, which must not exist. May be left out with --sensitivity.", "OUT"
        ),
    ] = None,
    *,
    rounding: Rounding,
    measuring: Measuring,
    calibrating: Calibrating,
    quiet: Annotated[bool, option("No progress bar.", "--quiet", "-q")] = False,
    as_json: Annotated[
        bool, option("Print one JSON object instead of the summary.", "--json")
    ] = False,
) -> None:
    """Write a model with its weights rounded to 8 or 4 bits.

    The folder is in the layout of compressed-tensors (pack-quantized), which octavo, vLLM and
    transformers load; int4-nonuniform is for octavo alone. Embedding and head stay floats there;
    octavo rounds them to int8 when it loads the folder (--keep-embedding leaves them).

    [bold]octavo quantize smollm2-135m ./smollm2-int8 --scheme int8[/bold]
    """
    from octavo.cli.common import progress_bar
    from octavo.config import read_environment
    from octavo.quantize.model import quantize_model

    request = _request(model, out, rounding, measuring, calibrating)
    with progress_bar(quiet=quiet) as bar:
        result = quantize_model(request, read_environment(), bar.update)
    if as_json:
        typer.echo(json.dumps(result.to_json()))
        return
    if result.sensitivity is not None:
        from octavo.quantize.sensitivity import print_sensitivity

        print_sensitivity(result.sensitivity, result.chosen)
    if result.directory is not None:
        _summarize(result.directory)


def _request(
    model: str, out: Path | None, rounding: Rounding, measuring: Measuring, calibrating: Calibrating
) -> QuantizeRequest:
    """What the options ask for together. Raises InvalidArgumentError."""
    from octavo.quantization.plan import Scheme
    from octavo.quantize.calibration import CALIBRATED_METHODS, Calibration
    from octavo.quantize.model import QuantizeRequest

    method, text = rounding.method, calibrating.calibrate
    if out is None and not measuring.sensitivity:
        raise InvalidArgumentError("OUT is missing; expected the name of a new folder")
    if text is None and method in CALIBRATED_METHODS:
        raise InvalidArgumentError(
            f"method is {method!r}, which needs a calibration text; give it by --calibrate FILE"
        )
    calibration = None
    if text is not None:
        pieces = calibrating.windows, calibrating.window, calibrating.seed
        calibration = Calibration(text, method or "gptq", *pieces)
        method = None  # what is measured beforehand is rounded without the text
    scheme = Scheme(
        rounding.scheme,
        rounding.group_size,
        not rounding.asymmetric,
        method or "weighted",
        tuple(rounding.int8 or ()),
    )
    measures = measuring.sensitivity or measuring.bits_per_weight is not None
    refuse_unused(calibrating, "windows window seed", text is not None, "with --calibrate FILE")
    to_measure = "with --sensitivity or --bits-per-weight (a text to round by is --calibrate FILE)"
    refuse_unused(measuring, "text max_windows", measures, to_measure)
    refuse_unused(rounding, "group_size method", scheme.has_groups, "with a scheme of 4 bits")
    return QuantizeRequest(model, out, scheme, calibration=calibration, **vars(measuring))


def _summarize(written: QuantizedDirectory) -> None:
    for note in written.notes:
        typer.echo(note)
    typer.echo(
        f"{written.path}: {written.num_bytes / 1e6:,.1f} MB of weights, from "
        f"{written.source_bytes / 1e6:,.1f} MB; {written.bits_per_weight:.2f} bits a weight, "
        "embedding and head apart"
    )
