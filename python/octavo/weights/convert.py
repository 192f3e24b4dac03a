"""Writing a GGUF model as an ordinary Hugging Face directory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.errors import InvalidArgumentError
from octavo.files import open_durably, write_durably
from octavo.progress import NO_PROGRESS, Progress
from octavo.weights.checkpoint import check_weights
from octavo.weights.gguf_folder import GgufFolder
from octavo.weights.gguf_llama import GgufLlamaSource, OutputDType
from octavo.weights.model_files import read_folder
from octavo.weights.safetensors import make_header


def convert_gguf(
    path: Path, directory: Path, dtype: OutputDType = "auto", progress: Progress = NO_PROGRESS
) -> None:
    """Write config.json, model.safetensors, tokenizer and generation config into `directory`.

    path: the file, or any part of a split one. dtype: of the weights, see `GgufLlamaSource`.

    Raises WeightsError, UnsupportedModelError or TokenizerError before anything is written.
    """
    if dtype not in ("auto", "f32", "bf16"):
        raise InvalidArgumentError(f"dtype is {dtype!r}; expected one of auto, f32, bf16")
    folder = GgufFolder(path, dtype)
    check_weights(folder.source, read_folder(folder))
    texts = {file.name: file.read_bytes() for file in folder.iterdir()}
    for name, text in texts.items():
        write_durably(directory / name, text)
    _write_safetensors(directory / "model.safetensors", folder.source, progress)


def _write_safetensors(path: Path, source: GgufLlamaSource, progress: Progress) -> None:
    """Tensor by tensor and in runs of rows, so memory stays small however big the model is."""
    infos = {name: source.infos[name] for name in sorted(source.infos)}
    header, num_bytes = make_header(
        {name: (info.dtype.upper(), info.shape) for name, info in infos.items()}
    )
    progress.start("Converting", num_bytes)
    with open_durably(path) as file:
        file.write(header)
        for content in _contents(source, infos):
            file.write(content.data)
            progress.advance(content.nbytes)
    progress.finish()


def _contents(source: GgufLlamaSource, names: Iterable[str]) -> Iterator[npt.NDArray[Any]]:
    for name in names:
        for part in source.read_parts(name):
            yield np.ascontiguousarray(part.data)
