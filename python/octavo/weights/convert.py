"""Writing a GGUF model as an ordinary Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from octavo.errors import InvalidArgumentError
from octavo.files import open_durably, write_durably
from octavo.progress import NO_PROGRESS, Progress
from octavo.weights.checkpoint import Checkpoint, open_checkpoint
from octavo.weights.gguf_folder import GgufFolder
from octavo.weights.gguf_parts import OutputDType
from octavo.weights.model_files import read_folder
from octavo.weights.safetensors import make_header


def convert_gguf(
    path: Path, directory: Path, dtype: OutputDType = "auto", progress: Progress = NO_PROGRESS
) -> None:
    """Write config.json, model.safetensors, tokenizer and generation config into `directory`.

    path: the file, or any part of a split one. dtype: of the weights, see `GgufParts`.

    Raises WeightsError, UnsupportedModelError or TokenizerError before anything is written.
    """
    if dtype not in ("auto", "f32", "bf16"):
        raise InvalidArgumentError(f"dtype is {dtype!r}; expected one of auto, f32, bf16")
    folder = GgufFolder(path, dtype)
    files = read_folder(folder)
    checkpoint = open_checkpoint(files)
    names = {source.name: ours for ours, source in files.weight_map.items()}
    texts = {file.name: file.read_bytes() for file in folder.iterdir()}
    for name, text in texts.items():
        write_durably(directory / name, text)
    _write_safetensors(directory / "model.safetensors", checkpoint, names, progress)


def _write_safetensors(
    path: Path, checkpoint: Checkpoint, names: dict[str, str], progress: Progress
) -> None:
    """Tensor by tensor and in runs of rows, so little memory is needed for any model.

    names: in the file -> octavo's.
    """
    infos = {name: checkpoint.infos[names[name]] for name in sorted(names)}
    header, num_bytes = make_header(
        {name: (info.dtype.upper(), info.shape) for name, info in infos.items()}
    )
    progress.start("Converting", num_bytes)
    with open_durably(path) as file:
        file.write(header)
        for name in infos:
            for run in checkpoint.runs(names[name]):
                file.write(np.ascontiguousarray(run.data).data)
                progress.advance(run.data.nbytes)
    progress.finish()
