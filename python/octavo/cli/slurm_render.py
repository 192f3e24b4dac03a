"""`octavo slurm render`: the options of a job, and its script."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from octavo.cli import completion
from octavo.cli.common import note
from octavo.cli.help import with_common_options
from octavo.cli.options import MODEL, argument, grouped, option, tried
from octavo.errors import InvalidArgumentError
from octavo.files import write_text

if TYPE_CHECKING:
    from octavo.slurm.job import JobRequest

KIND_NAMES = "bench|batch|serve|eval|diff|gpu"


@dataclass(frozen=True)
class Place:
    """Where the job runs, and for how long."""

    cluster: Annotated[
        Path,
        option(
            "The cluster's YAML file. slurm/clusters/ has examples.",
            *("--cluster", "-c"),
            metavar="FILE",
        ),
    ] = Path("cluster.yaml")
    gpu: Annotated[
        str,
        option(
            "Nodes to run on, as in h100. A name under `nodes:` of the cluster's file.",
            metavar="NAME",
        ),
    ] = "cpu"
    time: Annotated[
        str,
        option(
            "Time limit, as in 4:00:00. Left out: the file's.", "--time", "-t", metavar="H:MM:SS"
        ),
    ] = ""


@dataclass(frozen=True)
class Rows:
    """The commands that the job runs."""

    model: Annotated[
        str,
        option(
            "A pulled model, ORG/NAME, a folder or a GGUF file.",
            *("--model", "-m"),
            metavar="MODEL",
            autocompletion=completion.models,
        ),
    ] = "smollm2-135m"
    input_file: Annotated[
        str, option("Of a batch: one prompt a line.", "--input", "-i", metavar="FILE")
    ] = ""
    formats: Annotated[
        str,
        option(
            "Number formats, a row each. Of auto, f32, bf16, f16, int8, w8a8, int4, "
            "int4-nonuniform.",
            *("--formats", "-f"),
            metavar="F,F,…",
        ),
    ] = "auto"
    batch_sizes: Annotated[
        str,
        option(
            "Sequences at a time, a row each. For bench and batch.",
            *("--batch-sizes", "-b"),
            metavar="N,N,…",
        ),
    ] = ""
    tensor_parallel_size: Annotated[
        int,
        option(
            "GPUs of one node that a model is divided among. The job asks for as many.",
            *("--tensor-parallel-size", "-tp"),
            metavar="N",
            panel=MODEL,
        ),
    ] = 1
    array: Annotated[
        bool,
        option("Rows as tasks of a job array, or one after the other.", "--array/--no-array"),
    ] = True


@dataclass(frozen=True)
class Written:
    """What is written."""

    results: Annotated[
        str,
        option(
            "Folder for results. Left out: octavo-results/KIND-GPU.",
            *("--results", "-r"),
            metavar="FOLDER",
        ),
    ] = ""
    output: Annotated[
        Path | None,
        option(
            "Write the job to this file. Left out: standard output.",
            *("--output", "-o"),
            **tried("the job"),
        ),
    ] = None


@grouped
def render(
    kind: Annotated[
        str,
        argument(
            f"What the job does: {KIND_NAMES}.",
            "KIND",
            autocompletion=completion.words(KIND_NAMES.split("|")),
        ),
    ],
    extra: Annotated[
        list[str] | None,
        argument("More options of the command that runs.", "-- OPTION…"),
    ] = None,
    *,
    place: Place,
    rows: Rows,
    written: Written,
) -> None:
    """Write a job for a cluster.

    It runs `octavo bench`, `batch`, `serve`, `eval` or `diff`, or benchmarks/gpu.sh. Rows are the
    formats times the batch sizes. A job stops before its time limit, goes back into the queue, and
    goes on at the first row that is not done.

    [bold]octavo slurm render batch -c pace.yaml --gpu a100-40 -i in.jsonl -- -n 99[/bold]
    """
    from octavo.slurm.job import JobRequest
    from octavo.slurm.render import render as render_job
    from octavo.slurm.site import read_site

    request = JobRequest(
        kind=kind,
        cluster=str(place.cluster),
        node=place.gpu,
        model=rows.model,
        input=rows.input_file,
        formats=tuple(part.strip() for part in rows.formats.split(",")),
        batch_sizes=_numbers(rows.batch_sizes),
        time=place.time,
        results=written.results,
        array=rows.array,
        tensor_parallel_size=rows.tensor_parallel_size,
        extra=tuple(extra or ()),
    )
    site = read_site(place.cluster)
    _check_extra(request, site.node(place.gpu).has_gpu)
    text = render_job(request, site)
    if written.output is None:
        typer.echo(text, nl=False)
        return
    write_text(written.output, "the job", text)
    note(f"octavo slurm preflight {written.output} && sbatch {written.output}")


def _numbers(text: str) -> tuple[int, ...]:
    from octavo.cli.bench import parse_numbers

    numbers = tuple(parse_numbers("--batch-sizes", text)) if text else ()
    if 0 in numbers:
        raise InvalidArgumentError(f"--batch-sizes is {text!r}; expected numbers, 1 or more")
    return numbers


def _check_extra(request: JobRequest, has_gpu: bool) -> None:
    """Refuse options that the command does not have, and those that the job sets or forbids."""
    if request.kind == "gpu":
        return
    from octavo.cli.app import VERBS
    from octavo.slurm.job import make_rows

    verb = next(each for each in VERBS if each.name == request.kind)
    app = typer.Typer()
    app.command()(with_common_options(verb.load()))
    parameters = typer.main.get_command(app).params
    known = {name: each.name for each in parameters for name in (*each.opts, *each.secondary_opts)}
    row = make_rows(replace(request, extra=()), has_gpu)[0]
    taken = {known[word]: word for word in row.words if word in known}
    for word in request.extra:
        name = word.partition("=")[0]
        if own := taken.get(known.get(name) or ""):
            raise InvalidArgumentError(
                f"{word} stands behind `--`, but row {row.name} has {own} already, by which its "
                "result is known: leave it out, or choose by the options of render"
            )
        if name == "--overwrite":
            raise InvalidArgumentError(
                "--overwrite would begin the batch anew whenever the job comes back into the "
                "queue: leave it out, and name another folder by --results"
            )
        if name.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise InvalidArgumentError(
                f"`octavo {request.kind}` has no option {name}{hint}; expected one that its "
                "--help-all lists"
            )
