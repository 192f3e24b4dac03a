"""From a request and a site to the text of a job."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from octavo.errors import InvalidArgumentError
from octavo.slurm.job import DRAIN_SECONDS, KINDS, SIGNAL_SECONDS, JobRequest, make_rows
from octavo.slurm.site import NodeType, Site, format_time, parse_time

REQUEST = "# request: "
_TEMPLATES = Path(__file__).parent / "templates"


def render(request: JobRequest, site: Site) -> str:
    """The job's script. Raises InvalidArgumentError for what the site does not have or allow."""
    node = site.node(request.node)
    if request.kind == "gpu" and not (node.has_gpu and site.source):
        raise InvalidArgumentError(
            f"a gpu job runs benchmarks/gpu.sh of a checkout on a GPU; {request.node} of "
            f"{site.name} has {'no `source:`' if node.has_gpu else 'no GPU'}"
        )
    ranks = request.tensor_parallel_size
    if node.gpus is not None and ranks > node.gpus:
        raise InvalidArgumentError(
            f"--tensor-parallel-size is {ranks}, and a node {request.node} of {site.name} has "
            f"{node.gpus} GPUs; expected no more, since all GPUs of a job are on one node"
        )
    rows = make_rows(request, node.has_gpu)
    limit = time_limit(request, site)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # a shell script: the filters quote
    )
    environment.filters |= {"shell": shell_path, "quote": shlex.quote}
    return environment.get_template("job.sbatch.j2").render(
        request=request,
        request_line=REQUEST + json.dumps(request.to_json()),
        site=site,
        node=node,
        kind=KINDS[request.kind],
        modules=site.of(node, "modules"),
        directives=_directives(request, site, node, len(rows), limit),
        drain=min(DRAIN_SECONDS, limit // 4),
        rows=rows,
    )


def time_limit(request: JobRequest, site: Site) -> int:
    """Seconds that the job asks for; InvalidArgumentError for more than the site's max_time."""
    node = site.node(request.node)
    given = request.time or site.of(node, "time")
    seconds = parse_time(given, "--time")
    most = site.of(node, "max_time")
    if most is not None and seconds > parse_time(most, "max_time"):
        raise InvalidArgumentError(
            f"--time is {given}, and {site.name} gives {request.node} jobs at most {most}: ask for "
            "that, the job goes on where it stopped"
        )
    return seconds


def shell_path(path: str) -> str:
    """A path in double quotes, in which ~ and $NAME mean what they mean in a shell."""
    path = re.sub(r"^~(?=/|$)", "$HOME", path)
    if path.startswith("~"):
        raise InvalidArgumentError(f"the path is {path!r}; expected ~/…, $NAME/… or the whole path")
    return f'"{path}"'


def request_of(script: str) -> JobRequest:
    """What a rendered script was asked for. Raises InvalidArgumentError for another script."""
    for line in script.splitlines():
        if line.startswith(REQUEST):
            try:
                return JobRequest.from_json(json.loads(line.removeprefix(REQUEST)))
            except ValueError as error:
                raise InvalidArgumentError(f"the line {line!r} is damaged: {error}") from error
    raise InvalidArgumentError(
        f"the script has no line {REQUEST!r}; expected one that `octavo slurm render` wrote"
    )


def with_time_of(request: JobRequest, script: str) -> JobRequest:
    """The request with the time limit that the script asks for, which may have been edited."""
    found = re.search(r"^#SBATCH\s+(?:--time[= ]|-t\s*)(\S+)", script, re.M)
    return replace(request, time=found[1]) if found else request


def gres_of(gres: str, gpus: int) -> str:
    """A node's gres for so many GPUs: ("gpu:h100:1", 4) -> "gpu:h100:4".

    Raises InvalidArgumentError where it names no GPU of which there could be more.
    """
    if gpus == 1:
        return gres
    parts = [part.split(":") for part in gres.split(",")]
    if not any(words[0] == "gpu" for words in parts):
        raise InvalidArgumentError(
            f"gres is {gres!r}, from which a job of {gpus} GPUs cannot be made; expected "
            "gpu:TYPE:1 in the cluster's file"
        )
    for words in parts:
        if words[0] == "gpu":
            words[:] = [*(words[:-1] if words[-1].isdecimal() else words), str(gpus)]
    return ",".join(map(":".join, parts))


def _directives(
    request: JobRequest, site: Site, node: NodeType, num_rows: int, limit: int
) -> list[str]:
    """The lines after #SBATCH."""
    is_array = request.array and num_rows > 1
    # The site's figures are those of a job with one GPU. Ranks on the CPU share them.
    gpus = request.tensor_parallel_size if node.has_gpu else 1
    cpus, memory = site.of(node, "cpus"), site.of(node, "memory")
    place: dict[str, Any] = {
        **{name: site.of(node, name) for name in ("account", "partition", "qos")},
        "gres": node.gres and gres_of(node.gres, gpus),
        "constraint": node.constraint,
    }
    lines = [f"--job-name=octavo-{request.kind}"]
    lines += [f"--{name}={value}" for name, value in place.items() if value is not None]
    lines += [
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={gpus * cpus}",
        f"--mem={gpus * int(memory.rstrip('KMGT'))}{memory.lstrip('0123456789')}",
        f"--time={format_time(limit)}",
        f"--signal=B:USR1@{min(SIGNAL_SECONDS, limit // 2)}",
        "--requeue" if KINDS[request.kind].ends else "--no-requeue",
        "--open-mode=append",
        "--output=%x-%A_%a.log" if is_array else "--output=%x-%j.log",
    ]
    if is_array:
        lines.append(f"--array=0-{num_rows - 1}")
    return [*lines, *site.sbatch, *node.sbatch]
