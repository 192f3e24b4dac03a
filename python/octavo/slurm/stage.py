"""Weights on the node's own disk, copied once, before a model is loaded from them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from octavo.config import Environment
from octavo.errors import ModelNotFoundError
from octavo.files import expand_home, writing
from octavo.machine import format_bytes
from octavo.slurm.job import staged_name
from octavo.weights.gguf_parts import GgufParts
from octavo.weights.hub import model_directory, resolve_model
from octavo.weights.huggingface import find_snapshot

_SPARE = 1.1  # times the weights that have to be free on the node's disk


def find_model(name: str, environment: Environment) -> Path:
    """A model that is here already. Raises ModelNotFoundError rather than fetching it."""
    cached = model_directory(name, environment)
    is_here = os.path.exists(expand_home(name)) or (cached is not None and cached.is_dir())
    if not is_here and ("/" not in name or find_snapshot(name) is None):
        raise ModelNotFoundError(
            f"the model {name!r} is neither a folder, a GGUF file, nor pulled into "
            f"{environment.models}: on a login node, `octavo pull {name}`, with OCTAVO_HOME as the "
            "cluster's file has it under `home:`"
        )
    return resolve_model(name, environment)


def model_bytes(model: Path) -> int:
    """Bytes of a model's files. Raises WeightsError for a GGUF file that lacks its other parts."""
    return sum(path.stat().st_size for path in _files(model).values())


def stage(name: str, environment: Environment, local: Path | None) -> tuple[str, Path | None, str]:
    """Copy a model to the node.

    local: a folder of the node; None copies nothing. Returns what commands call the model, the
    OCTAVO_HOME in which they find it (None: as it was), and a sentence about it. A copy is renamed
    when it is whole, so several tasks on one node may stage the same model.
    Raises ModelNotFoundError for a model that is not here, FileError for a disk that cannot be
    written, WeightsError for a GGUF file that lacks its other parts.
    """
    source = find_model(name, environment)
    if local is None:
        return name, None, f"weights are read from {source}"
    files, size = _files(source), model_bytes(source)
    home = local / "octavo-home" / _identity(files)
    called = staged_name(name)
    target = model_directory(called, replace(environment, home=home))
    # Another folder of that name where the job runs would come before the copy.
    hidden = os.path.exists(called) and not os.path.samefile(called, source)
    if target is None or source.is_file() or hidden:
        target = home / "models" / source.name
        called = str(target / source.name if source.is_file() else target)
    if not target.exists():
        with writing(target, "the node's copy of the weights"):
            target.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(target.parent).free
            if free < _SPARE * size:
                return (
                    name,
                    None,
                    f"weights are read from {source}: {local} has {format_bytes(free)} free for "
                    f"their {format_bytes(size)}",
                )
            _copy(files, target)
    return called, home, f"{format_bytes(size)} of weights are on the node, in {target}"


def _files(model: Path) -> dict[str, Path]:
    """A model's files by their names in its folder: all that are in it, or a GGUF's parts."""
    if model.is_file():
        return {part.name: part for part in GgufParts(model).paths}
    walk = os.walk(model, followlinks=True)  # the Hub's cache is links
    found = (Path(place, name) for place, _, names in walk for name in names)
    return {str(path.relative_to(model)): path for path in sorted(found) if path.is_file()}


def _identity(files: Mapping[str, Path]) -> str:
    """Another one once a file lies elsewhere or was written again: names alone may be equal."""
    states = [(name, path.resolve(), path.stat()) for name, path in files.items()]
    told = [f"{name} {path} {stat.st_size} {stat.st_mtime_ns}" for name, path, stat in states]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def _copy(files: Mapping[str, Path], target: Path) -> None:
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        for name, path in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, partial / name)
        try:
            partial.rename(target)
        except OSError:
            if not target.exists():  # another task was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
