"""What can go wrong with a job, looked at before the queue is spent."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from octavo.config import Environment
from octavo.errors import OctavoError
from octavo.machine import format_bytes
from octavo.plan.devices import Device
from octavo.plan.plan import ModelToPlan, as_options
from octavo.slurm.build import sources_hash
from octavo.slurm.estimate import Estimate, Sizes, estimate, sizes_of
from octavo.slurm.job import SIGNAL_SECONDS, JobRequest, make_rows
from octavo.slurm.node import find_gpu
from octavo.slurm.render import render, request_of, shell_path, time_limit
from octavo.slurm.site import NodeType, Site, format_time
from octavo.slurm.stage import find_model, model_bytes

_BUILD_BYTES = 1 << 30
_OLDEST_NVCC = (12, 4)
_BUILD_PACKAGES = ("scikit_build_core", "nanobind", "cmake", "ninja")
Status = Literal["ok", "warning", "failed", "unknown"]


@dataclass(frozen=True)
class Check:
    """One line of the table. unknown: it cannot be seen from this machine."""

    name: str
    status: Status
    said: str


@dataclass(frozen=True)
class Shell:
    """A login shell, as a job has one, with the site's modules. run: its script -> code, output."""

    modules: Sequence[str]

    def run(self, script: str) -> tuple[int, str]:
        """The exit code of a script behind `module load`, and what it printed."""
        lines = [f"module load {shlex.quote(name)} || exit 90" for name in self.modules]
        command = ["bash", "-lc", "\n".join([*lines, script])]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return 91, str(error)
        return done.returncode, (done.stdout + done.stderr).strip()


@dataclass(frozen=True)
class Preflight:
    """Checks of one job. script: its file. device: what the plan is for.

    read_model: what the plan has to know of a model in a folder.
    """

    request: JobRequest
    site: Site
    script: Path
    environment: Environment
    device: Callable[[ModelToPlan | None], Device]
    read_model: Callable[[Path], ModelToPlan]

    def run(self) -> Iterator[Check]:
        """Every check, also after one that failed; a failure that stops several is told once."""
        told: set[str] = set()
        for name, check in (
            ("script", self._script),
            ("queue", self._queue),
            ("modules", self._modules),
            ("environment", self._environment),
            ("source", self._source),
            ("nvcc", self._nvcc),
            ("driver", self._driver),
            ("weights", self._weights),
            ("input", self._input),
            ("disk", self._disk),
            ("memory", self._memory),
            ("time", self._time),
        ):
            try:
                found = check()
            except (OctavoError, OSError) as error:
                found = "failed", str(error)
                if str(error) in told:
                    found = "unknown", "not worked out, for a reason that stands above"
                told.add(str(error))
            if found is not None:
                yield Check(name, *found)

    @cached_property
    def _node(self) -> NodeType:
        return self.site.node(self.request.node)

    @cached_property
    def _shell(self) -> Shell:
        return Shell(self.site.of(self._node, "modules"))

    @cached_property
    def _model(self) -> Path:
        home = self.site.home and _expanded(self.site.home)
        environment = replace(self.environment, home=home) if home else self.environment
        return find_model(self.request.model, environment)

    @cached_property
    def _sizes(self) -> Sizes | None:
        return sizes_of(Path(self.request.input)) if self.request.input else None

    @cached_property
    def _estimate(self) -> Estimate:
        request, model, num_bytes = self.request, None, 0
        if request.kind != "gpu":
            model, num_bytes = self.read_model(self._model), model_bytes(self._model)
        device = self.device(model)
        rows = make_rows(request, self._node.has_gpu)
        return estimate(
            *(request, rows, model, num_bytes, device, self.environment),
            builds=self._builds_first,
            sizes=self._sizes,
        )

    @cached_property
    def _sources(self) -> str:
        return sources_hash(_expanded(self.site.source or ""))

    @property
    def _builds_first(self) -> bool:
        """Whether no build of these sources is there yet, of any type of node."""
        if self.site.source is None or self.request.kind == "gpu":
            return False
        try:
            known = self._sources
        except OctavoError:  # which `_source` reports
            return True
        return not list((_expanded(self.site.scratch) / "builds").glob(f"{known}-*/"))

    def _script(self) -> tuple[Status, str]:
        text = self.script.read_text(encoding="utf-8")
        if text == render(request_of(text), self.site):
            return "ok", f"{self.script} is as rendered"
        return "warning", f"{self.script} was edited, or the cluster's file has changed since"

    def _queue(self) -> tuple[Status, str]:
        if shutil.which("sbatch") is None:
            return "unknown", "there is no sbatch here; on a login node Slurm is asked"
        command = ["sbatch", "--test-only", str(self.script)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        said = " ".join((done.stdout + done.stderr).replace("sbatch: ", "").split())
        return ("ok" if done.returncode == 0 else "failed"), said

    def _modules(self) -> tuple[Status, str] | None:
        if not self._shell.modules:
            return None
        code, said = self._shell.run("exit 0")
        names = " ".join(self._shell.modules)
        if code == 0:
            return "ok", names
        return "failed", f"`module load {names}` fails: {_last(said)}; see `module spider`"

    def _environment(self) -> tuple[Status, str]:
        python = shell_path(self.site.environment + "/bin/python")
        needed = ", ".join(("octavo", *(_BUILD_PACKAGES if self._compiles else ())))
        script = f"{python} -c 'import {needed}; print(octavo.__version__)'"
        code, said = self._shell.run(script)
        if code == 90:
            return "unknown", "not tried, since modules are missing"
        if code != 0:
            advice = "slurm/README.md says how it is made"
            return "failed", f"{self.site.environment}: {_last(said)}; {advice}"
        return "ok", f"octavo {_last(said)} in {self.site.environment}"

    @property
    def _compiles(self) -> bool:
        return self.site.source is not None

    def _source(self) -> tuple[Status, str] | None:
        if self.site.source is None:
            return None
        sources = self._sources
        built = "not built yet" if self._builds_first else "built for a type of node"
        return "ok", f"{self.site.source}, sources {sources}, {built}"

    def _nvcc(self) -> tuple[Status, str] | None:
        if not (self._compiles and self._node.has_gpu):
            return None
        code, said = self._shell.run("nvcc --version")
        found = re.search(r"release (\d+)\.(\d+)", said)
        if code == 90:
            return "unknown", "not tried, since modules are missing"
        wanted = "{}.{}".format(*_OLDEST_NVCC)
        if found is None:
            return "failed", f"no nvcc with these modules: add a CUDA of {wanted} or newer to them"
        version = int(found[1]), int(found[2])
        said = f"nvcc {found[1]}.{found[2]}"
        if version < _OLDEST_NVCC:
            return "failed", f"{said}; expected {wanted} or newer: name another CUDA module"
        return "ok", said

    def _driver(self) -> tuple[Status, str] | None:
        if not self._node.has_gpu:
            return None
        gpu = find_gpu()
        if gpu is None:
            return "unknown", f"no GPU here; the nodes {self.request.node} have to have it"
        return "ok", f"{gpu.name}, driver {gpu.driver}"

    def _weights(self) -> tuple[Status, str] | None:
        if self.request.kind == "gpu":
            return None
        self.read_model(self._model)
        return "ok", f"{format_bytes(model_bytes(self._model))} in {self._model}"

    def _input(self) -> tuple[Status, str] | None:
        if self._sizes is None:
            return None
        if not self._sizes.prompts:
            return "failed", f"{self.request.input} is empty; expected one prompt a line"
        return "ok", f"{self._sizes.prompts:,} prompts, about {self._sizes.tokens:,} tokens"

    def _disk(self) -> tuple[Status, str]:
        path = _expanded(self.site.scratch)
        place = next(folder for folder in (path, *path.parents) if folder.exists())
        if not os.access(place, os.W_OK):
            return "failed", f"{place} cannot be written by you; name another `scratch:`"
        free = shutil.disk_usage(place).free
        needed = _BUILD_BYTES if self._builds_first else 1 << 27
        said = f"{format_bytes(free)} free in {place}, {format_bytes(needed)} wanted"
        return ("ok" if free >= needed else "failed"), said

    def _memory(self) -> tuple[Status, str] | None:
        plan = self._estimate.plan
        if plan is None:
            return None
        needed, usable = format_bytes(plan.memory.total), format_bytes(plan.usable)
        sequences = f"{plan.request.concurrency} x {plan.request.context:,} tokens"
        ranks = plan.request.ranks
        each = "" if ranks == 1 else f" on each of {ranks}" if plan.device.is_gpu else " each rank"
        said = f"{needed} of {usable} of {plan.device.title}{each}, for {sequences}"
        if plan.fits:
            return "ok", said
        changes = ", or ".join(map(as_options, plan.remedies)) or "a smaller model"
        for option, of_job in (("concurrency", "batch-sizes"), ("quantize", "formats")):
            changes = changes.replace(f"--{option}", f"--{of_job}")
        return "failed", f"{said}: it does not fit; it would with {changes}"

    def _time(self) -> tuple[Status, str]:
        limit = time_limit(self.request, self.site)
        most, rows = limit - min(SIGNAL_SECONDS, limit // 2), self._estimate.seconds
        is_array = self.request.array and len(rows) > 1
        needed = max(rows.values()) if is_array else sum(rows.values())
        said = f"about {format_time(max(60, needed))} of {format_time(limit)}"
        if self.request.kind == "serve":
            return "ok", f"the server runs for {format_time(most)}"
        if needed <= most:
            return "ok", said
        if self.request.kind == "batch" or max(rows.values()) <= most:
            return "warning", f"{said}: the job comes back about {needed / most:.0f} times"
        return "failed", f"{said}: it would never end; ask for --time {format_time(1.2 * needed)}"


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(path)))


def _last(text: str) -> str:
    lines = text.splitlines()
    return lines[-1].strip() if lines else "it says nothing"


def passed(checks: Sequence[Check]) -> bool:
    """Whether nothing stands in the way."""
    return all(check.status != "failed" for check in checks)
