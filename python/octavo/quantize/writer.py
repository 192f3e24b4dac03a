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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.errors import InvalidArgumentError
from octavo.files import check_writable, expand_home, open_durably, write_durably, writing
from octavo.folder import Folder
from octavo.models.spec import WeightFormat
from octavo.progress import StageProgress
from octavo.quantization.plan import Scheme, plan_formats
from octavo.quantization.rounding import quantize_matrix
from octavo.quantize.calibration import CalibratedWeights, check_finite
from octavo.weights.checkpoint import Checkpoint, open_checkpoint
from octavo.weights.codes import CompressedMatrix, pack_words, pack_zeros
from octavo.weights.compressed_tensors import choose_layout, make_quantization_config
from octavo.weights.model_files import ModelFiles, read_model
from octavo.weights.safetensors import make_header
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
    calibrated = CalibratedWeights()
    if calibrate is not None:
        calibrated = calibrate(files, checkpoint, formats)
    with new_directory(target, _WHAT) as staging:
        copy_files(files.folder, staging)
        config = {**files.config, "quantization_config": _config(files, formats)}
        write_durably(staging / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        writer = _Writer(files, checkpoint, formats, scheme.method, importance or {}, calibrated)
        num_bytes = writer.write(staging / "model.safetensors", progress)
        open_checkpoint(read_model(staging))  # what takes the name can be loaded
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
    checkpoint = open_checkpoint(files)
    if checkpoint.formats:
        raise InvalidArgumentError(
            f"{source} is quantized already; expected a model with float weights"
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


def _config(files: ModelFiles, formats: Mapping[str, WeightFormat]) -> dict[str, Any]:
    modules = {
        files.weight_map[name + ".weight"].name.removesuffix(".weight"): format
        for name, format in formats.items()
    }
    head = files.family.tensors.tensor("lm_head").removesuffix(".weight")
    return make_quantization_config(modules, head)


class _Writer:
    """Writes the weights one by one; memory holds one matrix and its codes."""

    def __init__(
        self,
        files: ModelFiles,
        checkpoint: Checkpoint,
        formats: Mapping[str, WeightFormat],
        method: str,
        importance: Mapping[str, Float32],
        calibrated: CalibratedWeights,
    ) -> None:
        self._checkpoint = checkpoint
        self._importance = importance
        self._method = method
        self._calibrated = calibrated
        self._matrices: dict[str, CompressedMatrix] = {}
        self._entries: dict[str, Entries] = {}  # by octavo's name of the weight
        # Vectors that the family stores as their difference from 1.
        self._from_one = {
            name for name, place in files.weight_map.items() if place.transform == "plus_one"
        }
        layout = choose_layout(formats.values())
        for name, info in checkpoint.infos.items():
            place = files.weight_map[name]
            theirs = (replace(place, transform="plain") if name in self._from_one else place).name
            base = name.removesuffix(".weight")
            if base in formats and name.endswith(".weight"):
                outputs, inputs = info.shape
                module = theirs.removesuffix(".weight")
                matrix = CompressedMatrix.of(module, (outputs, inputs), formats[base], layout)
                self._matrices[name] = matrix
                self._entries[name] = {
                    entry: (_stored_type(entry, wanted.types), wanted.shapes[0])
                    for entry, wanted in matrix.entries({}).items()
                }
            else:
                dtype = _kept_dtype(info.dtype, info.shape)
                if name in calibrated.vectors:
                    dtype = "f32"
                self._entries[name] = {theirs: (_NAMES[dtype], info.shape)}

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

    def _arrays(self, name: str) -> Iterator[npt.NDArray[Any]]:
        """The contents of a weight's entries, in their order."""
        tensor = self._checkpoint[name]
        check_finite(next(iter(self._entries[name])), tensor)
        vector = self._calibrated.vectors.get(name)
        if vector is None and name not in self._matrices:
            vector = _cast(tensor)
        if vector is not None:
            yield vector - np.float32(1) if name in self._from_one else vector
            return
        matrix = self._matrices[name]
        base = name.removesuffix(".weight")
        rounded = self._calibrated.matrices.get(base)
        if rounded is None:
            values, share = tensor.to_float32(), self._importance.get(base)
            rounded = quantize_matrix(values, matrix.format, self._method, importance=share)
        packed = matrix.layout != "int-quantized"
        codes = pack_words(rounded.codes, matrix.format.dtype) if packed else rounded.codes
        arrays: dict[str, npt.NDArray[Any]] = {
            matrix.words_name.rsplit(".", 1)[1]: codes,
            "weight_shape": np.array(matrix.shape, "<i8"),
            "weight_scale": float32_to_bf16(rounded.scales),
        }
        if rounded.zeros is not None:
            arrays["weight_zero_point"] = pack_zeros(rounded.zeros)
        for entry in self._entries[name]:
            yield arrays[entry.rsplit(".", 1)[1]]


def _stored_type(name: str, dtypes: tuple[str, ...]) -> str:
    """Of the types that an entry may have, the one that is written."""
    part = name.rsplit(".", 1)[1]
    return {"weight_scale": "BF16", "weight_shape": "I64"}.get(part, dtypes[0])


def _kept_dtype(dtype: str, shape: tuple[int, ...]) -> TensorDType:
    """Embedding and head in 16 bits; vectors as they are."""
    if dtype == "f32":
        return "bf16" if len(shape) == 2 else "f32"
    return "f16" if dtype == "f16" else "bf16"


def _cast(tensor: Tensor) -> npt.NDArray[Any]:
    if _kept_dtype(tensor.dtype, tensor.shape) == tensor.dtype:
        return tensor.data
    return float32_to_bf16(tensor.to_float32())
