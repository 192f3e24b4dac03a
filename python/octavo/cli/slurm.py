"""`octavo slurm`: jobs for a cluster, from the login node to the report."""

from __future__ import annotations

import difflib
import importlib.util
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli import completion
from octavo.cli.common import FAILED, note, print_error
from octavo.cli.help import ScreenVerbs, screen_command, with_common_options
from octavo.cli.options import MODEL, argument, option, tried
from octavo.config import read_environment
from octavo.errors import InvalidArgumentError
from octavo.files import read_text, write_text

if TYPE_CHECKING:
    from octavo.plan.devices import Device
    from octavo.plan.plan import ModelToPlan
    from octavo.slurm.collect import Collected
    from octavo.slurm.job import JobRequest
    from octavo.slurm.preflight import Check
    from octavo.slurm.site import NodeType

slurm = typer.Typer(cls=ScreenVerbs)
_slurm_says = partial(option, panel="Set by Slurm", show_default=False)
_KINDS = "bench|batch|serve|eval|diff|gpu"


@slurm.callback(invoke_without_command=True)
@with_common_options
def _group(context: typer.Context) -> None:
    """Write, check, run and collect jobs for a Slurm cluster.

    [bold]octavo slurm render bench --cluster pace.yaml --gpu h100 -o job.sbatch[/bold]

    [bold]octavo slurm preflight job.sbatch && sbatch job.sbatch[/bold]

    [bold]octavo slurm collect octavo-results[/bold]
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@screen_command(slurm)
def render(
    kind: Annotated[
        str,
        argument(
            f"What the job does: {_KINDS}.",
            "KIND",
            autocompletion=completion.words(_KINDS.split("|")),
        ),
    ],
    extra: Annotated[
        list[str] | None,
        argument("More options of the command that runs.", "-- OPTION…"),
    ] = None,
    cluster: Annotated[
        Path,
        option(
            "The cluster's YAML file. slurm/clusters/ has examples.",
            *("--cluster", "-c"),
            metavar="FILE",
        ),
    ] = Path("cluster.yaml"),
    gpu: Annotated[
        str,
        option(
            "Nodes to run on, as in h100. A name under `nodes:` of the cluster's file.",
            metavar="NAME",
        ),
    ] = "cpu",
    time: Annotated[
        str,
        option(
            "Time limit, as in 4:00:00. Left out: the file's.", "--time", "-t", metavar="H:MM:SS"
        ),
    ] = "",
    model: Annotated[
        str,
        option(
            "A pulled model, ORG/NAME, a folder or a GGUF file.",
            *("--model", "-m"),
            metavar="MODEL",
            autocompletion=completion.models,
        ),
    ] = "smollm2-135m",
    input_file: Annotated[
        str, option("Of a batch: one prompt a line.", "--input", "-i", metavar="FILE")
    ] = "",
    formats: Annotated[
        str,
        option(
            "Number formats, a row each. Of auto, f32, bf16, f16, int8, w8a8, int4, "
            "int4-nonuniform.",
            *("--formats", "-f"),
            metavar="F,F,…",
        ),
    ] = "auto",
    batch_sizes: Annotated[
        str,
        option(
            "Sequences at a time, a row each. For bench and batch.",
            *("--batch-sizes", "-b"),
            metavar="N,N,…",
        ),
    ] = "",
    tensor_parallel_size: Annotated[
        int,
        option(
            "GPUs of one node that a model is divided among. The job asks for as many.",
            *("--tensor-parallel-size", "-tp"),
            metavar="N",
            panel=MODEL,
        ),
    ] = 1,
    array: Annotated[
        bool,
        option("Rows as tasks of a job array, or one after the other.", "--array/--no-array"),
    ] = True,
    results: Annotated[
        str,
        option(
            "Folder for results. Left out: octavo-results/KIND-GPU.",
            *("--results", "-r"),
            metavar="FOLDER",
        ),
    ] = "",
    output: Annotated[
        Path | None,
        option(
            "Write the job to this file. Left out: standard output.",
            *("--output", "-o"),
            **tried("the job"),
        ),
    ] = None,
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
        cluster=str(cluster),
        node=gpu,
        model=model,
        input=input_file,
        formats=tuple(part.strip() for part in formats.split(",")),
        batch_sizes=_numbers(batch_sizes),
        time=time,
        results=results,
        array=array,
        tensor_parallel_size=tensor_parallel_size,
        extra=tuple(extra or ()),
    )
    site = read_site(cluster)
    _check_extra(request, site.node(gpu).has_gpu)
    text = render_job(request, site)
    if output is None:
        typer.echo(text, nl=False)
        return
    write_text(output, "the job", text)
    note(f"octavo slurm preflight {output} && sbatch {output}")


@screen_command(slurm)
def preflight(
    script: Annotated[Path, argument("A job of `octavo slurm render`.", "FILE")],
    as_json: Annotated[bool, option("Print one JSON object instead of a table.", "--json")] = False,
) -> int:
    """Check a job before the queue is spent.

    Asks Slurm whether it would take it, loads its modules, and looks at compiler, driver, weights,
    disk, memory and time limit, the last two by `octavo plan`. Exit code: 0 nothing stands in the
    way, 1 something does.
    """
    from octavo.slurm.preflight import Preflight, passed
    from octavo.slurm.render import request_of, with_time_of
    from octavo.slurm.site import read_site

    text = read_text(script, "a job of `octavo slurm render`")
    request = with_time_of(request_of(text), text)
    site = read_site(Path(request.cluster))
    device = partial(_device, site.node(request.node))
    run = Preflight(request, site, script, read_environment(), device, _read_model)
    checks = list(run.run())
    if as_json:
        found = {"passed": passed(checks), "checks": [vars(check) for check in checks]}
        typer.echo(json.dumps(found, indent=2))
    else:
        _print_checks(checks)
    return 0 if passed(checks) else FAILED


@screen_command(slurm)
def work(
    kind: Annotated[str, option("What the job does.", "--kind", metavar=_KINDS)],
    results: Annotated[Path, option("Folder for results.", "--results", metavar="FOLDER")],
    source: Annotated[
        Path | None,
        option("A checkout of octavo, built for this type of node.", metavar="FOLDER"),
    ] = None,
    builds: Annotated[Path | None, option("Folder of builds.", metavar="FOLDER")] = None,
    model: Annotated[
        str | None, option("The model that rows call {model}.", metavar="MODEL")
    ] = None,
    local: Annotated[
        Path | None,
        option("Folder of this node, to which weights are copied.", metavar="FOLDER"),
    ] = None,
    places: Annotated[
        list[str] | None, option("More {NAME}s of rows.", "--set", metavar="NAME=VALUE")
    ] = None,
    drain: Annotated[
        float, option("For answers under way, after a signal.", metavar="SECONDS")
    ] = 75.0,
    job_id: Annotated[str, _slurm_says("The job.", envvar="SLURM_JOB_ID")] = "",
    array_job: Annotated[str, _slurm_says("The array.", envvar="SLURM_ARRAY_JOB_ID")] = "",
    array_task: Annotated[
        str, _slurm_says("The task, which runs one row.", envvar="SLURM_ARRAY_TASK_ID")
    ] = "",
    node_name: Annotated[str, _slurm_says("The node.", envvar="SLURMD_NODENAME")] = "",
    restarts: Annotated[int, _slurm_says("Requeues so far.", envvar="SLURM_RESTART_COUNT")] = 0,
) -> int:
    """Run a job's rows: standard input has a name and a command for each.

    Rows that are done are left out. SIGUSR1 stops what runs, and puts the job back into the queue.
    """
    from octavo.slurm.job import KINDS, read_rows
    from octavo.slurm.node import this_node
    from octavo.slurm.work import JobId, Preparation, Worker
    from octavo.slurm.work import work as do_work

    if kind not in KINDS:
        raise InvalidArgumentError(f"--kind is {kind!r}; expected one of {_KINDS}")
    rows = read_rows(sys.stdin.read())
    if array_task:
        if not array_task.isdecimal() or int(array_task) >= len(rows):
            raise InvalidArgumentError(
                f"the array's task is {array_task!r}; expected a number below {len(rows)}, the rows"
            )
        rows = [rows[int(array_task)]]
    worker = Worker(
        kind_name=kind,
        kind=KINDS[kind],
        folder=results,
        job=JobId(job_id, array_job, array_task, node_name, restarts),
        node=this_node(),
        drain=drain,
    )
    for entry in places or ():
        name, _, value = entry.partition("=")
        worker.places[name] = value
    return do_work(worker, rows, Preparation(source, builds, model, local))


@screen_command(slurm)
def collect(
    folders: Annotated[list[Path], argument("Folders that jobs have written to.", "FOLDER…")],
    output: Annotated[
        Path | None,
        option(
            "The merged file. Left out: collected.json in the first folder.",
            *("--output", "-o"),
            **tried("the merged results"),
        ),
    ] = None,
    html: Annotated[
        bool, option("Also draw report.html beside it, by `octavo report`.", "--report/--no-report")
    ] = True,
) -> int:
    """Merge the results of jobs into one file and a report.

    Exit code: 0 every row that began is done, 1 some are not.
    """
    from octavo.slurm.collect import COLLECTED
    from octavo.slurm.collect import collect as collect_results

    found = collect_results(folders)
    target = output or folders[0] / COLLECTED
    write_text(target, "the merged results", json.dumps(found.to_json(), indent=1) + "\n")
    _print_collected(found)
    note(f"{len(found.results)} results in {target}")
    if html:
        _report(found, target.with_name("report.html"))
    return FAILED if found.unfinished else 0


def _report(found: Collected, page: Path) -> None:
    """Draw what can be drawn, where `octavo report` is there."""
    from octavo.slurm.collect import REPORTED

    files = [str(each.path) for each in found.results if each.job["kind"] in REPORTED]
    if not files or importlib.util.find_spec("octavo.cli.report") is None:
        return
    from octavo.cli.app import run

    if run(["report", *files, "-o", str(page)]) == 0:
        note(f"drawn in {page}")


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


def _read_model(path: Path) -> ModelToPlan:
    from octavo.plan.plan import ModelToPlan
    from octavo.weights.checkpoint import open_checkpoint
    from octavo.weights.model_files import read_model

    files = read_model(path)
    open_checkpoint(files)
    return ModelToPlan.of(files)


def _device(node: NodeType, model: ModelToPlan | None) -> Device:
    from octavo.config import EngineConfig
    from octavo.plan.devices import find_gpu, this_processor
    from octavo.plan.plan import Request, resolve

    if node.has_gpu or model is None:
        return find_gpu(node.device)
    _, options = resolve(model, EngineConfig(), Request(1, 1), read_environment(), is_gpu=False)
    return this_processor(options, 0)


_MARKS: dict[str, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "warning": ("warning", "yellow"),
    "failed": ("failed", "red"),
    "unknown": ("not seen", "dim"),
}


def _print_checks(checks: list[Check]) -> None:
    from rich.table import Table
    from rich.text import Text

    from octavo.progress import stdout_console

    table = Table("check", "", "what was found", show_lines=False)
    for check in checks:
        word, style = _MARKS[check.status]
        table.add_row(check.name, Text(word, style), check.said)
    stdout_console().print(table)
    failed = [check.name for check in checks if check.status == "failed"]
    if failed:
        print_error(f"not ready: {', '.join(failed)}")


def _print_collected(found: Collected) -> None:
    from rich.table import Table

    from octavo.progress import stdout_console

    table = Table("result", "kind", "node", "job", "runs", "what it gave")
    for result in found.results:
        job = result.job
        last: dict[str, Any] = job["runs"][-1] if job["runs"] else {}
        cells = (job["name"], job["kind"], last.get("node", ""), last.get("job", ""))
        table.add_row(*cells, str(len(job["runs"])), result.figure)
    for name, runs in found.unfinished.items():
        last = runs[-1] if runs else {}
        cells = (Path(name).name, "", last.get("node", ""), last.get("job", ""))
        table.add_row(*cells, str(len(runs)), "not done", style="red")
    stdout_console().print(table)
    if len(found.builds) > 1:
        note(f"the results are of {len(found.builds)} builds: {', '.join(found.builds)}")
