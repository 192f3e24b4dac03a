"""`octavo slurm`: jobs for a cluster, from the login node to the report."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.common import FAILED, note, print_error
from octavo.cli.help import ScreenVerbs, screen_command, with_common_options
from octavo.cli.options import argument, option, tried
from octavo.cli.slurm_render import KIND_NAMES, render
from octavo.config import read_environment
from octavo.errors import InvalidArgumentError
from octavo.files import read_text, write_text

if TYPE_CHECKING:
    from octavo.plan.devices import Device
    from octavo.plan.plan import ModelToPlan
    from octavo.slurm.collect import Collected
    from octavo.slurm.preflight import Check
    from octavo.slurm.site import NodeType

slurm = typer.Typer(cls=ScreenVerbs)
_slurm_says = partial(option, panel="Set by Slurm", show_default=False)


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


screen_command(slurm)(render)


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
    kind: Annotated[str, option("What the job does.", "--kind", metavar=KIND_NAMES)],
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
        raise InvalidArgumentError(f"--kind is {kind!r}; expected one of {KIND_NAMES}")
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
