"""`octavo merge`: write a model with a LoRA adapter added to its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from octavo.cli import completion
from octavo.cli.options import argument, option


def merge(
    model: Annotated[
        str,
        argument(
            "A pulled model, or a folder. Its weights are in f32, f16 or bf16.",
            "MODEL",
            autocompletion=completion.models,
        ),
    ],
    adapter: Annotated[
        Path,
        argument(
            "A LoRA adapter, a folder that PEFT wrote.",
            "ADAPTER",
            autocompletion=completion.adapters,
        ),
    ],
    out: Annotated[Path, argument("The new folder, which must not exist.", "OUT")],
    quiet: Annotated[bool, option("No progress bar.", "--quiet", "-q")] = False,
) -> None:
    """Write a model with a LoRA adapter added to its weights.

    Each changed weight is W + scale * B A, computed in float32 and rounded to the format of W. The
    folder is an ordinary model, which every program loads.

    [bold]octavo merge smollm2-135m ./my-adapter ./my-model[/bold]
    """
    from octavo.cli.common import progress_bar
    from octavo.config import read_environment
    from octavo.quantize.merge import merge_directory
    from octavo.weights.hub import resolve_model

    with progress_bar("bytes", quiet=quiet) as bar:
        source = resolve_model(model, read_environment())
        written = merge_directory(source, adapter, out, bar.update)
    for note in written.notes:
        typer.echo(note)
    typer.echo(
        f"{written.path}: {written.num_bytes / 1e6:,.1f} MB of weights, {written.num_matrices} "
        "matrices changed"
    )
