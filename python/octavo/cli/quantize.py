"""`octavo quantize`: write a model with its weights rounded to 8 or 4 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def quantize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Name of a pulled model (smollm2-135m), or a folder with a Hugging Face model, "
            "its weights in f32, f16 or bf16.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The new folder; made whole or not at all."),
    ],
    scheme: Annotated[
        str,
        typer.Option(
            "--scheme",
            help="int8: a scale for each output, next to no loss. int4: a scale for each group "
            "of inputs.",
            metavar="int8|int4",
        ),
    ] = "int8",
    group_size: Annotated[
        int,
        typer.Option(
            "--group-size",
            help="Of int4: weights that share a scale. Smaller is better and larger. A matrix "
            "whose width it does not divide takes the next smaller one that does.",
            metavar="32|64|128",
        ),
    ] = 32,
    asymmetric: Annotated[
        bool,
        typer.Option(
            "--asymmetric",
            help="Of int4: give each group a zero point too. Worth its bits in wide groups.",
        ),
    ] = False,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="Of int4: search finds the scale of least squared error; rtn rounds to nearest.",
            metavar="search|rtn",
        ),
    ] = "search",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the summary.")
    ] = False,
) -> None:
    """Write a model with its weights rounded to 8 or 4 bits.

    The folder is in the layout of compressed-tensors (pack-quantized), which octavo, vLLM and
    transformers load. Embedding and head stay floats there; octavo rounds them to int8 when it
    loads the folder (--keep-embedding leaves them).

    [bold]octavo quantize smollm2-135m ./smollm2-int8 --scheme int8[/bold]
    """
    from octavo.config import read_environment
    from octavo.quantization.directory import quantize_directory
    from octavo.quantization.plan import Scheme
    from octavo.weights.hub import resolve_model
    from octavo.weights.progress import NO_PROGRESS, BarProgress

    wanted = Scheme(scheme, group_size, symmetric=not asymmetric, method=method)
    source = resolve_model(model, read_environment())
    if quiet:
        result = quantize_directory(source, out, wanted, NO_PROGRESS)
    else:
        with BarProgress() as bar:
            result = quantize_directory(source, out, wanted, bar)
    if as_json:
        facts = {
            "path": str(result.path),
            "num_bytes": result.num_bytes,
            "source_bytes": result.source_bytes,
            "bits_per_weight": result.bits_per_weight,
            "notes": list(result.notes),
        }
        typer.echo(json.dumps(facts))
        return
    for note in result.notes:
        typer.echo(note)
    typer.echo(
        f"{result.path}: {result.num_bytes / 1e6:,.1f} MB of weights, from "
        f"{result.source_bytes / 1e6:,.1f} MB; {result.bits_per_weight:.2f} bits a weight, "
        "embedding and head apart"
    )
