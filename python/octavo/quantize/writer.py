"""`octavo quantize`: a float model directory in, a directory of codes out.

What comes out is the model's own directory with its matrices in the `compressed-tensors` layout
(see `octavo.weights.codes`) and a `quantization_config` in config.json. Embedding, head, norms and
biases stay floats: vLLM cannot read a tied embedding in 8 bits; octavo rounds it while loading.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.errors import InvalidArgumentError
from octavo.files import check_writable, expand_home, open_durably, write_durably, writing
from octavo.folder import Folder
from octavo.models.family import group_by_tensor
from octavo.models.spec import WeightFormat
from octavo.progress import StageProgress
from octavo.quantization.plan import Scheme, describe_format, plan_formats
from octavo.quantization.rounding import QuantizedMatrix, quantize_matrix
from octavo.quantize.calibration import CalibratedWeights, check_finite
from octavo.text.chat import NAMED_TEMPLATES
from octavo.weights.checkpoint import Checkpoint, open_checkpoint
from octavo.weights.codes import CompressedMatrix, Layout, pack_words, pack_zeros
from octavo.weights.compressed_tensors import choose_layout, make_quantization_config
from octavo.weights.model_files import ModelFiles, read_model
from octavo.weights.pooling import (
    MODULE_CONFIGS,
    lacks_head,
    open_headless,
    without_head,
    write_modules,
)
from octavo.weights.reader import whole_tensor
from octavo.weights.safetensors import make_header
from octavo.weights.stored import stack_of
from octavo.weights.tensor import Tensor, TensorDType, float32_to_bf16

_NAMES: dict[TensorDType, str] = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_WEIGHT_FILES = (
    *(".safetensors", ".safetensors.index.json", ".gguf"),
    *(".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".pkl"),
)
_NOT_COPIED = ("config.json", "octavo.json")  # written anew; the note of where the source came from
Float32 = npt.NDArray[np.float32]
_WHAT = "the quantized model"
Entries = dict[str, tuple[str, tuple[int, ...]]]
Calibrate = Callable[[ModelFiles, Checkpoint, Mapping[str, WeightFormat]], CalibratedWeights]


@dataclass(frozen=True)
class QuantizedDirectory:
    """What was written.

    num_bytes: of the weights file. bits_per_weight: of the matrices that were quantized, scales
    and zero points included. notes: what the user should know of the formats.
    """

    path: Path
    formats: Mapping[str, WeightFormat]
    num_bytes: int
    source_bytes: int
    bits_per_weight: float
    notes: tuple[str, ...]


def quantize_directory(
    source: Path,
    target: Path,
    scheme: Scheme,
    progress: StageProgress = lambda *_: None,
    importance: Mapping[str, Float32] | None = None,
    calibrate: Calibrate | None = None,
) -> QuantizedDirectory:
    """Write the model in `source` to the new directory `target`, quantized by `scheme`.

    importance: for method "weighted", what `measure_importance` returned.
    calibrate rounds the matrices with a text at hand (`calibrate.calibrate`); without it each is
    rounded by itself. The directory is filled under a hidden name beside its place, and renamed
    when it is whole and on the disk. Raises InvalidArgumentError where `target` exists, its parent
    does not, the model is quantized already, or the scheme is no way to store weights; FileError
    where it cannot be written; WeightsError for weights that hold a NaN or an infinity; and what
    reading the model raises. Nothing is left behind then.
    """
    target = check_new_directory(target)
    files, checkpoint = open_float_model(source)
    formats, notes = plan_formats(files.spec, scheme)
    _check_alike(files, formats)
    calibrated = CalibratedWeights()
    if calibrate is not None:
        calibrated = calibrate(files, checkpoint, formats)
    with new_directory(target, _WHAT) as staging:
        copy_files(files.folder, staging)
        write_modules(files, staging)
        config = {**files.config, "quantization_config": _config(files, formats)}
        write_durably(staging / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        writer = _Writer(files, checkpoint, formats, scheme.method, importance or {}, calibrated)
        num_bytes = writer.write(staging / "model.safetensors", progress)
        open_headless(read_model(staging))  # what takes the name can be loaded
    return QuantizedDirectory(
        path=target,
        formats=formats,
        num_bytes=num_bytes,
        source_bytes=checkpoint.total_bytes,
        bits_per_weight=writer.bits_per_weight(),
        notes=(*notes, *calibrated.notes),
    )


def check_new_directory(target: Path, what: str = _WHAT) -> Path:
    """The absolute path of a directory that can be made; InvalidArgumentError or FileError else.

    what: goes there, for messages.
    """
    # Whichever way it is spelled, with a slash at the end or dots inside.
    with writing(target, what):
        target = Path(os.path.abspath(expand_home(target)))
        if target.exists():
            raise InvalidArgumentError(f"{target} exists; expected the name of a new directory")
    if not target.parent.is_dir():
        raise InvalidArgumentError(f"{target.parent} is not a directory; make it first")
    check_writable(target, what)
    return target


@contextmanager
def new_directory(target: Path, what: str) -> Iterator[Path]:
    """A directory to fill, which takes the name `target` when the block has ended well."""
    staging = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # what a killed run left
    try:
        with writing(target, what):
            staging.mkdir()
            yield staging
            staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def open_float_model(source: Path) -> tuple[ModelFiles, Checkpoint]:
    """A model that can be quantized, of floats or FP8; InvalidArgumentError if it has codes."""
    files = read_model(source, "auto")
    files = without_head(files) if lacks_head(files) else files
    checkpoint = open_checkpoint(files)
    if checkpoint.formats:
        raise InvalidArgumentError(
            f"{source} is quantized already; expected a model with float weights, such as the one "
            "that it was made from"
        )
    return files, checkpoint


def copy_files(source: Folder, target: Path) -> None:
    """Tokenizer, generation config, license, whatever else lies there; no weights."""
    for entry in source.iterdir():
        hidden = entry.name.startswith(".")
        if not entry.is_file() or hidden or entry.name.lower().endswith(_WEIGHT_FILES):
            continue
        if entry.name not in _NOT_COPIED:
            (target / entry.name).write_bytes(entry.read_bytes())
    for entry in (source / NAMED_TEMPLATES).glob("*.jinja"):
        (target / NAMED_TEMPLATES).mkdir(exist_ok=True)
        (target / NAMED_TEMPLATES / entry.name).write_bytes(entry.read_bytes())
    for module in source.glob(MODULE_CONFIGS) if isinstance(source, Path) else ():
        (target / module.parent.name).mkdir(exist_ok=True)
        (target / module.parent.name / module.name).write_bytes(module.read_bytes())


def _layout(files: ModelFiles, formats: Mapping[str, WeightFormat]) -> Layout:
    places = (files.weight_map[f"{name}.weight"] for name in formats)
    is_turned = any(place.transform == "transpose" for place in places)
    return choose_layout(formats.values(), is_turned)


def _config(files: ModelFiles, formats: Mapping[str, WeightFormat]) -> dict[str, Any]:
    modules = {files.weight_map[f"{name}.weight"].module: each for name, each in formats.items()}
    routers = [name for name in files.weight_map if _is_router(name)]
    head = files.family.tensors.tensor("lm_head").removesuffix(".weight")
    left_out = [head, *(files.weight_map[name].module for name in routers)]
    return make_quantization_config(modules, left_out, _layout(files, formats))


def _check_alike(files: ModelFiles, formats: Mapping[str, WeightFormat]) -> None:
    """InvalidArgumentError where matrices that have to share a format do not."""
    places = {name: files.weight_map[f"{name}.weight"].module for name in formats}
    stacks = {name: stack_of(name) for name in formats}
    for owner, why in ((places, "are one matrix of the checkpoint"), (stacks, "run as one")):
        groups: dict[str, list[str]] = {}
        for name in formats:
            groups.setdefault(owner[name], []).append(name)
        for names in groups.values():
            other = next((name for name in names if formats[name] != formats[names[0]]), None)
            if other is not None:
                raise InvalidArgumentError(
                    f"{names[0]} takes {describe_format(formats[names[0]])}, {other} "
                    f"{describe_format(formats[other])}; expected one format for "
                    f"{', '.join(names[:6])}{', ...' if len(names) > 6 else ''}, which {why}"
                )


class _Writer:
    """Writes the tensors one by one; memory holds one and its codes."""

    def __init__(
        self,
        files: ModelFiles,
        checkpoint: Checkpoint,
        formats: Mapping[str, WeightFormat],
        method: str,
        importance: Mapping[str, Float32],
        calibrated: CalibratedWeights,
    ) -> None:
        self._places = files.weight_map
        self._checkpoint = checkpoint
        self._importance = importance
        self._method = method
        self._calibrated = calibrated
        self._weights = group_by_tensor(files.weight_map)
        # By the checkpoint's name of the tensor: those that become codes, and all with their parts.
        self._matrices: dict[str, CompressedMatrix] = {}
        self._entries: dict[str, Entries] = {}
        self._dtypes: dict[str, TensorDType] = {}
        layout = _layout(files, formats)
        for tensor, names in self._weights.items():
            place, base = self._places[names[0]], names[0].removesuffix(".weight")
            if base in formats and base != names[0]:
                outputs = place.rows[1] if place.rows else place.shape[0]
                shape = (outputs, place.shape[1])
                matrix = CompressedMatrix.of(place.module, shape, formats[base], layout)
                self._matrices[tensor] = matrix
                self._entries[tensor] = {
                    entry: (_stored_type(entry, wanted.types), wanted.shapes[0])
                    for entry, wanted in matrix.entries({}).items()
                }
            else:
                kept = {self._kept_dtype(name) for name in names}
                dtype = kept.pop() if len(kept) == 1 else "f32"
                self._dtypes[tensor] = dtype
                self._entries[tensor] = {tensor: (_NAMES[dtype], place.stored_shape)}

    def _kept_dtype(self, name: str) -> TensorDType:
        """Embedding and head in 16 bits; routers and vectors as they are."""
        info = self._checkpoint.infos[name]
        is_table = len(info.shape) == 2 and not _is_router(name)
        if name in self._calibrated.vectors or (info.dtype == "f32" and not is_table):
            return "f32"
        return "f16" if info.dtype == "f16" else "bf16"

    def write(self, path: Path, progress: StageProgress) -> int:
        """Write the file and wait until it is on the disk; returns its size."""
        flat = {key: value for entries in self._entries.values() for key, value in entries.items()}
        header, num_bytes = make_header(flat)
        num_written = 0
        with open_durably(path) as file:
            file.write(header)
            for name in self._entries:
                for array in self._arrays(name):
                    progress("quantizing", num_written, num_bytes)
                    file.write(np.ascontiguousarray(array).data)
                    num_written += array.nbytes
        progress("quantizing", num_bytes, num_bytes)
        return len(header) + num_bytes

    def bits_per_weight(self) -> float:
        """Of the quantized matrices, all that is stored of them."""
        weights = sum(matrix.shape[0] * matrix.shape[1] for matrix in self._matrices.values())
        entries = dict(item for name in self._matrices for item in self._entries[name].items())
        return 8 * make_header(entries)[1] / weights

    def _arrays(self, tensor: str) -> Iterator[npt.NDArray[Any]]:
        """The contents of a tensor's entries, in their order."""
        names, matrix = self._weights[tensor], self._matrices.get(tensor)
        if matrix is None:
            dtype = self._dtypes[tensor]
            yield whole_tensor([(self._places[name], self._kept(name, dtype)) for name in names])
            return
        parts = [self._rounded(name, matrix.format) for name in names]
        codes = np.concatenate([part.codes for part in parts])
        packed = matrix.layout != "int-quantized"
        arrays: dict[str, npt.NDArray[Any]] = {
            matrix.words_name.rsplit(".", 1)[1]: (
                pack_words(codes, matrix.format.dtype) if packed else codes
            ),
            "weight_shape": np.array(matrix.shape, "<i8"),
            "weight_scale": float32_to_bf16(np.concatenate([part.scales for part in parts])),
        }
        zeros = [part.zeros for part in parts if part.zeros is not None]
        if zeros:
            arrays["weight_zero_point"] = pack_zeros(np.concatenate(zeros))
        for entry in self._entries[tensor]:
            yield arrays[entry.rsplit(".", 1)[1]]

    def _read(self, name: str) -> Tensor:
        tensor = self._checkpoint[name]
        check_finite(self._places[name].tensor, tensor)
        return tensor

    def _kept(self, name: str, dtype: TensorDType) -> npt.NDArray[Any]:
        """A weight that stays numbers, in the type that is written."""
        tensor = self._read(name)
        values = self._calibrated.vectors.get(name)
        if values is None:
            if tensor.dtype == dtype:
                return tensor.data
            values = tensor.to_float32()
        return values if dtype == "f32" else float32_to_bf16(values)

    def _rounded(self, name: str, format: WeightFormat) -> QuantizedMatrix:
        """The codes of a weight that is a matrix, or rows of one."""
        base, tensor = name.removesuffix(".weight"), self._read(name)
        found = self._calibrated.matrices.get(base)
        if found is not None:
            return found
        share = self._importance.get(base)
        return quantize_matrix(tensor.to_float32(), format, self._method, importance=share)


def _is_router(name: str) -> bool:
    return name.endswith(".router.weight")


def _stored_type(name: str, dtypes: tuple[str, ...]) -> str:
    """Of the types that an entry may have, the one that is written."""
    part = name.rsplit(".", 1)[1]
    return {"weight_scale": "BF16", "weight_shape": "I64"}.get(part, dtypes[0])
