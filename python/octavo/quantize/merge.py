"""`octavo merge`: a model directory and a LoRA adapter in, a directory of the merged model out."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from octavo.errors import InvalidArgumentError, WeightsError
from octavo.files import open_durably, write_durably
from octavo.models.adapter import Adapter, LowRank
from octavo.models.family import WeightSource
from octavo.quantize.writer import (
    check_new_directory,
    copy_files,
    new_directory,
    open_float_model,
)
from octavo.weights.adapter import read_adapter
from octavo.weights.checkpoint import Checkpoint, has_non_finite
from octavo.weights.gguf_folder import GgufFolder
from octavo.weights.model_files import ModelFiles, read_model
from octavo.weights.pooling import open_headless
from octavo.weights.safetensors import SafetensorsFile, make_header, open_weight_files
from octavo.weights.tensor import Tensor, float32_to_bf16

_WHAT = "the merged model"
_NAMES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_RUN = 1 << 22  # elements changed in one go
OnProgress = Callable[[str, int, int], None]  # with what is done, bytes so far, bytes in all


class _Change(NamedTuple):
    """What an adapter adds to rows first to last - 1 of a stored matrix; transposed: columns."""

    part: LowRank
    first: int
    last: int
    transposed: bool


@dataclass(frozen=True)
class MergedDirectory:
    """What was written. num_matrices: that were changed. notes: what else the user should know."""

    path: Path
    num_bytes: int
    num_matrices: int
    notes: tuple[str, ...]


def merge_directory(
    model: Path, adapter: Path, target: Path, progress: OnProgress = lambda *_: None
) -> MergedDirectory:
    """Write the model with the adapter added to its weights to the new directory `target`.

    A weight becomes W + scale * B A, computed in float32 and rounded once to the format it is
    stored in; all others are copied as they are. Where the model ties head and embedding and the
    adapter changes one of them, both are written and config.json says that they are not tied.
    Raises InvalidArgumentError for a quantized model, for one whose matrices that the adapter
    changes are not stored as numbers, for a GGUF file, and for a target that exists; WeightsError
    for sums that are too large for their format; what reading the model and the adapter raises.
    Nothing is left behind then.
    """
    target = check_new_directory(target, _WHAT)
    files, checkpoint = open_float_model(model)
    if isinstance(files.folder, GgufFolder):
        raise InvalidArgumentError(
            f"{model} is a GGUF file; expected a directory. `octavo pull {model}` makes one of it"
        )
    changes = read_adapter(adapter, files, checkpoint, to_merge=True)
    source = open_weight_files(files.path)
    places = _places(files, checkpoint)
    stored, unties = _stored_names(files, source, places, changes)
    added = _stored_changes(places, changes)
    _check_floats(model, source, stored, added)
    with new_directory(target, _WHAT) as staging:
        copy_files(files.folder, staging)
        config = {**files.config, **({"tie_word_embeddings": False} if unties else {})}
        write_durably(staging / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        num_bytes = _write(staging / "model.safetensors", source, stored, added, progress)
        open_headless(read_model(staging))  # what takes the name can be loaded
    note = "head and embedding are no longer tied: the adapter changes one of them"
    return MergedDirectory(target, num_bytes, len(changes.matrices), (note,) if unties else ())


def _places(files: ModelFiles, checkpoint: Checkpoint) -> dict[str, WeightSource]:
    """Where each weight is written: where it lies, and of a tied pair under either name."""
    embed, head = checkpoint.places["embed.weight"], files.family.tensors.tensor("lm_head")
    places = {"lm_head.weight": replace(embed, tensor=head), **checkpoint.places}
    if embed.tensor == head:
        places["embed.weight"] = replace(embed, tensor=files.family.tensors.tensor("embed"))
    return places


def _stored_names(
    files: ModelFiles,
    source: SafetensorsFile,
    places: Mapping[str, WeightSource],
    adapter: Adapter,
) -> tuple[dict[str, str], bool]:
    """The name of each tensor to write -> that of the tensor it is made from; whether it unties."""
    stored = {name: name for name in source.infos}
    unties = files.spec.tie_word_embeddings and bool({"embed", "lm_head"} & adapter.matrices.keys())
    if unties:
        table, head = (places[f"{part}.weight"].tensor for part in ("embed", "lm_head"))
        own = table if table in source.infos else head
        stored |= {table: own, head: own}
    return stored, unties


def _stored_changes(
    places: Mapping[str, WeightSource], adapter: Adapter
) -> Mapping[str, list[_Change]]:
    """By the name of the tensor, what is added to it."""
    changes: defaultdict[str, list[_Change]] = defaultdict(list)
    for name, part in adapter.matrices.items():
        weight = places[name + ".weight"]
        transposed = (weight.transform == "transpose") != (name == "embed")
        first = weight.rows[0] if weight.rows else 0
        changes[weight.tensor].append(_Change(part, first, first + len(part.b), transposed))
    return changes


def _check_floats(
    model: Path, source: SafetensorsFile, stored: Mapping[str, str], changed: Iterable[str]
) -> None:
    """InvalidArgumentError where the files do not hold a tensor to change as plain numbers."""
    for name in changed:
        info = source.infos.get(stored.get(name, name))
        if info is None or info.dtype not in _NAMES:
            raise InvalidArgumentError(
                f"{model}: {name} is stored as {'codes' if info is None else info.dtype}; expected "
                "F32, F16 or BF16, to which an adapter can be added. Merge it with the model that "
                "was quantized, then run `octavo quantize` on the result"
            )


def _write(
    path: Path,
    source: SafetensorsFile,
    stored: Mapping[str, str],
    changes: Mapping[str, list[_Change]],
    progress: OnProgress,
) -> int:
    """Write the file and wait until it is on the disk; returns its size."""
    infos = {name: source.infos[own] for name, own in stored.items()}
    entries = {
        name: (_NAMES.get(info.dtype, info.dtype), info.shape) for name, info in infos.items()
    }
    header, num_bytes = make_header(entries)
    done = 0
    with open_durably(path) as file:
        file.write(header)
        for name, own in stored.items():
            for array in _arrays(source, name, own, changes.get(name, [])):
                file.write(np.ascontiguousarray(array).data)
                done += array.nbytes
                progress("merging", done, num_bytes)
    return len(header) + num_bytes


def _arrays(
    source: SafetensorsFile, name: str, own: str, changes: list[_Change]
) -> Iterator[npt.NDArray[Any]]:
    """What the file holds of a tensor, in runs of rows."""
    if not changes:
        yield source.read_bytes(own)
        return
    tensor = source.read(own)
    step = max(1, _RUN // tensor.shape[1])
    for row in range(0, tensor.shape[0], step):
        run = Tensor(tensor.data[row : row + step], tensor.dtype)
        total = np.array(run.to_float32())
        for change in changes:
            _add(total, row, change)
        merged = Tensor(_cast(total, tensor), tensor.dtype)
        if has_non_finite(merged):
            raise WeightsError(
                f"{name}: the merged weight holds a NaN or an infinity in {_NAMES[tensor.dtype]}; "
                "fetch the model and the adapter again, or convert the model to bf16"
            )
        yield merged.data


def _add(run: npt.NDArray[np.float32], row: int, change: _Change) -> None:
    """Add what the change adds to these rows of the stored matrix, the first of which is `row`."""
    a, b, scale, end = change.part.a, change.part.b, np.float32(change.part.scale), row + len(run)
    if change.transposed:
        run[:, change.first : change.last] += scale * (b @ a[:, row:end]).T
    else:
        first, last = max(row, change.first), min(end, change.last)
        if first < last:
            rows = b[first - change.first : last - change.first]
            run[first - row : last - row] += scale * (rows @ a)


def _cast(values: npt.NDArray[np.float32], like: Tensor) -> npt.NDArray[Any]:
    if like.dtype == "bf16":
        return float32_to_bf16(values)
    with np.errstate(over="ignore"):  # the caller looks for infinities
        return values.astype(like.data.dtype)
