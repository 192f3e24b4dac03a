"""The node that a job runs on, as results name it."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from octavo.machine import processor

_GPU = ("name", "compute_cap", "driver_version")


@dataclass(frozen=True)
class Gpu:
    """The first GPU. capability: as in "9.0"."""

    name: str
    capability: str
    driver: str


@dataclass(frozen=True)
class NodeInfo:
    """What a build is for. gpu: None without one, or without its driver."""

    processor: str
    gpu: Gpu | None

    @property
    def type(self) -> str:
        """A name for all nodes that are alike, fit for a file's name."""
        parts = [self.processor, *([self.gpu.name] if self.gpu else [])]
        return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def find_gpu() -> Gpu | None:
    """The GPU that nvidia-smi shows first."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    fields = [field.strip() for field in done.stdout.split("\n")[0].split(",")]
    return Gpu(*fields) if done.returncode == 0 and len(fields) == len(_GPU) else None


def this_node() -> NodeInfo:
    """The node that this runs on."""
    return NodeInfo(processor(), find_gpu())
