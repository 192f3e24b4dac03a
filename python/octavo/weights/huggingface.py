"""Fetching a model repository from the Hugging Face Hub: safetensors and JSON, never pickles."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from octavo.errors import DownloadError, OctavoError, UnsupportedModelError
from octavo.files import expand_home
from octavo.progress import Progress, folder_size, watch_folder
from octavo.text.chat import NAMED_TEMPLATES
from octavo.weights.model_files import read_model
from octavo.weights.pooling import MODULE_CONFIGS, open_headless
from octavo.weights.safetensors import INDEX, SINGLE, numbered_shards, read_index

_Result = TypeVar("_Result")


def is_offline() -> bool:
    """Whether the Hub must not be asked: HF_HUB_OFFLINE, or transformers' own name of it."""
    given = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in given)


def find_snapshot(repository: str) -> Path | None:
    """A whole model in the Hub's own cache, where transformers and vLLM put theirs; None: none."""
    if not _hub_cache().is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json")
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    try:
        open_headless(read_model(folder))  # not one of which a part was fetched
    except UnsupportedModelError:
        raise
    except OctavoError:
        return None
    return folder


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or expand_home("~/.cache/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def fetch_repository(
    repository: str, revision: str | None, staging: Path, progress: Progress
) -> str:
    """Fill `staging` with a repository's model; returns the commit it came from.

    The configuration is fetched and read first, so that an unsupported model costs one small file.
    A later call with the same `staging` goes on where this one was interrupted.
    Raises DownloadError; UnsupportedModelError or WeightsError as `read_model`.
    """
    from huggingface_hub import HfApi

    info = _ask(
        repository, lambda: HfApi().model_info(repository, revision=revision, files_metadata=True)
    )
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    commit = str(info.sha or revision or "main")
    _check_files(repository, sizes)

    def fetch(name: str) -> None:
        from huggingface_hub import hf_hub_download

        _ask(
            repository,
            lambda: hf_hub_download(repository, name, revision=commit, local_dir=staging),
        )

    with _quiet_hub():
        fetch("config.json")
        read_model(staging)
        if SINGLE in sizes:
            weights = [SINGLE]
        elif INDEX not in sizes:
            weights = numbered_shards(sizes, repository)
        else:
            fetch(INDEX)
            weights = sorted(set(read_index(staging / INDEX).values()))
        small = [name for name in sizes if _is_small_file(name) and name != INDEX]
        wanted = [*small, *weights]
        _remove_others(staging, {*wanted, INDEX} & sizes.keys())
        total = sum(sizes.get(name, 0) for name in wanted)
        done = folder_size(staging)
        _check_disk(staging, total - done)
        progress.start("Downloading", total)
        progress.advance(done)
        with watch_folder(progress, staging, done):
            for name in wanted:
                fetch(name)
        progress.finish()
    shutil.rmtree(staging / ".cache", ignore_errors=True)  # the hub's notes for resuming
    return commit


def _is_small_file(name: str) -> bool:
    """Whether a repository's file is configuration, tokenizer or chat template."""
    if fnmatch(name, MODULE_CONFIGS):
        return name.count("/") == 1
    folder, _, file = name.rpartition("/")
    endings = {"": (".json", ".jinja"), NAMED_TEMPLATES: (".jinja",)}
    return file.endswith(endings.get(folder, ()))


def _check_files(repository: str, sizes: dict[str, int]) -> None:
    """Refuse a repository that lacks a file octavo needs, before anything is fetched."""
    if "config.json" not in sizes:
        found = ", ".join(sorted(sizes)[:6]) or "nothing"
        hint = ""
        if any(name.endswith(".gguf") for name in sizes):
            hint = ". It offers GGUF files: download one and `octavo pull FILE.gguf`"
        raise DownloadError(
            f"{repository} holds no config.json (it holds {found}); expected a model in Hugging "
            f"Face form{hint}"
        )
    if not {SINGLE, INDEX} & sizes.keys() and not numbered_shards(sizes, repository):
        raise DownloadError(
            f"{repository} holds neither {SINGLE} nor {INDEX}. octavo reads safetensors only: "
            "pickle files (.bin, .pth) run code when they are opened. Look for a converted copy, "
            "or convert it with save_pretrained of transformers"
        )
    if "tokenizer.json" not in sizes:
        raise DownloadError(
            f"{repository} holds no tokenizer.json; expected one, since octavo reads no other "
            "form of tokenizer. AutoTokenizer.from_pretrained(...).save_pretrained(...) of "
            "transformers writes it"
        )


def _remove_others(staging: Path, wanted: set[str]) -> None:
    """Delete files of an interrupted pull of another revision that this one does not have."""
    for entry in [*staging.iterdir(), *(staging / NAMED_TEMPLATES).glob("*")]:
        if entry.is_file() and entry.relative_to(staging).as_posix() not in wanted:
            entry.unlink()


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"the model takes {needed / 1e9:.1f} GB more and {folder} has {free / 1e9:.1f} GB "
            "left; free some, or set OCTAVO_HOME to a bigger disk"
        )


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Turn the hub's own progress bars off: octavo's is drawn instead."""
    utils = _hub_utils()
    were_disabled = utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            utils.enable_progress_bars()


def _hub_utils() -> Any:
    """huggingface_hub.utils, which has the errors in every version; their types differ."""
    return importlib.import_module("huggingface_hub.utils")


def _ask(repository: str, call: Callable[[], _Result]) -> _Result:
    """Run one request to the hub; a DownloadError says what failed and what to do next."""
    utils = _hub_utils()
    page = f"https://huggingface.co/{repository}"
    try:
        return call()
    except utils.HFValidationError as error:
        raise DownloadError(f"{repository!r} is no repository name; expected ORG/NAME") from error
    except utils.GatedRepoError as error:
        raise DownloadError(
            f"{repository} is gated: open {page}, accept its terms, then log in with a token of "
            "the same account (`hf auth login`, or the variable HF_TOKEN) and try again"
        ) from error
    except utils.RepositoryNotFoundError as error:
        raise DownloadError(
            f"{repository} does not exist on the hub, or is private. Check the name at {page}; "
            "for a private model log in first (`hf auth login`, or the variable HF_TOKEN)"
        ) from error
    except utils.RevisionNotFoundError as error:
        raise DownloadError(
            f"{repository} has no such revision; its branches and tags are at {page}/tree/main"
        ) from error
    except utils.EntryNotFoundError as error:
        raise DownloadError(f"{repository} lacks a file it should have: {error}") from error
    except Exception as error:  # their types depend on the HTTP library that the hub's uses
        status = _status(error)
        if status == 401 or status == 403:
            raise DownloadError(
                f"the hub refuses {repository} (HTTP {status}): log in with a token that may "
                f"read it (`hf auth login`, or the variable HF_TOKEN); its page is {page}"
            ) from error
        reason = f"HTTP {status}" if status else f"{type(error).__name__}: {error}"
        raise DownloadError(
            f"{repository} could not be fetched ({reason}). Check the network (HF_ENDPOINT, "
            "HTTPS_PROXY, HF_HUB_OFFLINE); on a machine without one, copy a model directory here "
            "and give its path instead"
        ) from error


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error or its causes."""
    seen: Any = error
    while seen is not None:
        status = getattr(getattr(seen, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        seen = seen.__cause__
    return None
