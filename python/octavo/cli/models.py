"""`octavo list` and `octavo remove`: the models in the cache."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from octavo.cli import completion
from octavo.cli.options import argument, option


def list(
    as_json: Annotated[bool, option("Print one JSON object instead of a table.", "--json")] = False,
) -> None:
    """Show the models in the cache, and the disk they take.

    The cache is the folder OCTAVO_HOME, else ~/.cache/octavo.

    Of an incomplete model a pull was interrupted: `octavo pull` goes on, `octavo remove` deletes
    it.
    """
    from octavo.config import read_environment
    from octavo.machine import format_bytes
    from octavo.progress import folder_size
    from octavo.weights.hub import incomplete_models, model_directory, pulled_models

    environment = read_environment()
    folders = {name: model_directory(name, environment) for name in pulled_models(environment)}
    sizes = {name: folder_size(folder) for name, folder in folders.items() if folder is not None}
    parts = {name: folder_size(each) for name, each in incomplete_models(environment).items()}
    if as_json:
        found = {"folder": str(environment.models), "models": sizes, "incomplete": parts}
        typer.echo(json.dumps(found))
        return
    for name, size in sizes.items():
        typer.echo(f"{format_bytes(size):>10}  {name}")
    for name, size in parts.items():
        typer.echo(f"{format_bytes(size):>10}  {name} (incomplete)")
    if not sizes and not parts:
        typer.echo(f"no models in {environment.models}: `octavo pull` fetches one")


def remove(
    model: Annotated[
        str,
        argument("A name that `octavo list` shows.", "MODEL", autocompletion=completion.models),
    ],
) -> None:
    """Delete a model from the cache; it can be pulled again."""
    from octavo.config import read_environment
    from octavo.machine import format_bytes
    from octavo.weights.hub import remove as remove_model

    size = remove_model(model, read_environment())
    typer.echo(f"{model} is deleted: {format_bytes(size)} are free again")
