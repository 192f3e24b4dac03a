"""Writing a GGUF model as an ordinary Hugging Face directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.errors import InvalidArgumentError
from octavo.files import open_durably, write_durably
from octavo.models.family import WeightSource, group_by_tensor
from octavo.progress import NO_PROGRESS, Progress
from octavo.weights.checkpoint import Checkpoint, open_checkpoint
from octavo.weights.gguf_folder import GgufFolder
from octavo.weights.gguf_parts import OutputDType
from octavo.weights.model_files import read_folder
from octavo.weights.pooling import write_modules
from octavo.weights.reader import whole_tensor
from octavo.weights.safetensors import make_header
from octavo.weights.tensor import float32_to_bf16


def convert_gguf(
    path: Path, directory: Path, dtype: OutputDType = "auto", progress: Progress = NO_PROGRESS
) -> None:
    """Write config.json, model.safetensors, tokenizer and generation config into `directory`.

    Of an embedding model also the files that say how its vectors are made.

    path: the file, or any part of a split one. dtype: of the weights, see `GgufParts`.

    Raises WeightsError, UnsupportedModelError or TokenizerError before anything is written.
    """
    if dtype not in ("auto", "f32", "bf16"):
        raise InvalidArgumentError(f"dtype is {dtype!r}; expected one of auto, f32, bf16")
    folder = GgufFolder(path, dtype)
    files = read_folder(folder)
    checkpoint = open_checkpoint(files)
    texts = {file.name: file.read_bytes() for file in folder.iterdir()}
    write_modules(files, directory)
    for name, text in texts.items():
        write_durably(directory / name, text)
    _write_safetensors(directory / "model.safetensors", checkpoint, files.weight_map, progress)


def _write_safetensors(
    path: Path, checkpoint: Checkpoint, weight_map: Mapping[str, WeightSource], progress: Progress
) -> None:
    """Tensor by tensor, plain ones in runs of rows, so little memory is needed for any model.

    weight_map: octavo's names -> where the file holds them.
    """
    tensors = sorted(group_by_tensor(weight_map).items())
    header, num_bytes = make_header(
        {
            name: (checkpoint.infos[own[0]].dtype.upper(), weight_map[own[0]].stored_shape)
            for name, own in tensors
        }
    )
    progress.start("Converting", num_bytes)
    with open_durably(path) as file:
        file.write(header)
        for _, own in tensors:
            for array in _arrays(checkpoint, weight_map, own):
                file.write(np.ascontiguousarray(array).data)
                progress.advance(array.nbytes)
    progress.finish()


def _arrays(
    checkpoint: Checkpoint, weight_map: Mapping[str, WeightSource], names: list[str]
) -> Iterator[npt.NDArray[Any]]:
    """The contents of the tensor that holds these weights, in the type of the first."""
    if len(names) == 1 and weight_map[names[0]].transform == "plain":
        yield from (run.data for run in checkpoint.runs(names[0]))
        return
    whole = whole_tensor([(weight_map[name], checkpoint[name].to_float32()) for name in names])
    dtype = checkpoint.infos[names[0]].dtype
    yield (
        float32_to_bf16(whole)
        if dtype == "bf16"
        else whole.astype("f2" if dtype == "f16" else "f4")
    )
