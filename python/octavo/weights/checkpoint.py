"""The weights of a model under octavo's names, found complete before any of them is read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from octavo.errors import WeightsError
from octavo.models.fields import printable
from octavo.models.registry import ModelFiles
from octavo.models.spec import WeightFormat, weight_shapes
from octavo.quantization.stored import (
    StoredSource,
    find_problems,
    running_formats,
    stored_tensors,
)
from octavo.weights.dummy import DummySource
from octavo.weights.safetensors import SafetensorsFile, ShardedSafetensors
from octavo.weights.source import TensorInfo, TensorSource
from octavo.weights.tensor import ITEM_SIZE, Tensor, TensorDType

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CHUNK = 1 << 20  # elements looked at in one go when searching for NaN: the scratch stays in cache


class NonFiniteWeightsWarning(UserWarning):
    """Weights hold a NaN or an infinity: whatever depends on them will too."""


class Checkpoint(Mapping[str, Tensor]):
    """Every weight a model needs, by octavo's name; memory-mapped, read when asked for.

    infos: name -> shape, dtype and bytes, from headers alone.
    formats: of the matrices that are, or shall be, quantized, by name without ".weight". Codes
        ("int8", "int4") bring along "NAME.scale" and, if asymmetric, "NAME.zero".
    dtype: the format that most of the elements have that are no codes.
    total_bytes: of all weights as stored.
    num_parameters: of the model, scales and zero points not counted.
    """

    def __init__(
        self,
        source: TensorSource,
        names: Mapping[str, str],
        formats: Mapping[str, WeightFormat] | None = None,
        dtype: TensorDType | None = None,
    ) -> None:
        self._source = source
        self._names = dict(names)
        self.formats: Mapping[str, WeightFormat] = dict(formats or {})
        self.infos: Mapping[str, TensorInfo] = {
            ours: source.infos[theirs] for ours, theirs in self._names.items()
        }
        self.total_bytes = sum(info.num_bytes for info in self.infos.values())
        self.num_parameters = sum(
            info.num_elements
            for name, info in self.infos.items()
            if not name.endswith((".scale", ".zero"))
        )
        counts: dict[TensorDType, int] = {
            kind: sum(info.num_elements for info in self.infos.values() if info.dtype == kind)
            for kind in ITEM_SIZE
        }
        most = max(counts, key=lambda kind: counts[kind])
        self.dtype: TensorDType = most if dtype is None else dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._source.read(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def bytes_by_dtype(self) -> dict[str, int]:
        """Bytes as stored, by format, largest first."""
        sizes: dict[str, int] = {}
        for info in self.infos.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.num_bytes
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    def checked_items(self) -> Iterator[tuple[str, Tensor]]:
        """All weights in order, for a loader; warns of those that hold a NaN or an infinity.

        The warning (NonFiniteWeightsWarning) names them all at once, after the last weight.
        """
        damaged = []
        for name in self:
            tensor = self[name]
            if has_non_finite(tensor):
                damaged.append(self._names[name])
            yield name, tensor
        if damaged:
            shown = ", ".join(damaged[:8]) + (", ..." if len(damaged) > 8 else "")
            warnings.warn(
                f"{len(damaged)} of {len(self)} weights hold a NaN or an infinity ({shown}); the "
                "model will answer nonsense. Fetch or convert it again",
                NonFiniteWeightsWarning,
                stacklevel=2,
            )


def open_checkpoint(files: ModelFiles, load_format: str = "auto", seed: int = 0) -> Checkpoint:
    """Open the weights of a model and check them against its configuration.

    load_format "auto" reads model.safetensors, or the shards that model.safetensors.index.json
    names; "dummy" makes seeded random weights and opens no file. Only headers are read here.

    Raises WeightsError listing every weight that is missing, left over, of the wrong shape or in
    an unsupported format; or saying what is wrong with a damaged file.
    """
    expected = weight_shapes(files.spec)
    if load_format == "dummy":
        return Checkpoint(DummySource(expected, seed), {name: name for name in expected})
    source = open_weight_files(files.path)
    check_weights(source, files)
    names = {name: files.weight_map[name] for name in expected}
    if not files.quantized:
        return Checkpoint(source, names)
    # Scales stand behind their codes, for whoever takes the weights in order.
    with_scales = {}
    for name, theirs in names.items():
        with_scales[name] = theirs
        matrix = files.quantized.get(name.removesuffix(".weight"))
        if matrix is not None and name.endswith(".weight"):
            base = name.removesuffix(".weight")
            with_scales[base + ".scale"] = matrix.module + ".weight_scale"
            if matrix.format.has_zeros:
                with_scales[base + ".zero"] = matrix.module + ".weight_zero_point"
    formats = running_formats(source, files.quantized)
    return Checkpoint(StoredSource(source, files.quantized), with_scales, formats)


def check_weights(source: TensorSource, files: ModelFiles) -> None:
    """Raise WeightsError with every way in which `source` does not fit the configuration."""
    problems = _find_problems(source, weight_shapes(files.spec), files)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise WeightsError(
            f"The weights in {files.path} do not fit its configuration ({count}):", problems
        )
    _check_redundant_head(source, files)


def open_weight_files(path: Path) -> SafetensorsFile | ShardedSafetensors:
    """The safetensors of a directory; WeightsError says what to do where there are none."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return SafetensorsFile(single)
    if index.is_file():
        return ShardedSafetensors(index)
    names = sorted(entry.name for entry in path.iterdir())
    wanted = f"{path} holds neither model.safetensors nor model.safetensors.index.json"
    if any(name.endswith(".safetensors") for name in names):
        found = ", ".join(name for name in names if name.endswith(".safetensors"))
        raise WeightsError(f"{wanted}. It holds {found}: shards need their index; fetch it too")
    if any(name.endswith(".gguf") for name in names):
        raise WeightsError(f"{wanted}. It holds a GGUF file: convert it, `octavo pull FILE.gguf`")
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise WeightsError(
            f"{wanted}. It holds {', '.join(pickles[:3])}: pickle files run code when they are "
            "opened, so octavo never opens them. Where you trust the file, convert it: "
            "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW) of transformers "
            "writes safetensors"
        )
    raise WeightsError(f"{wanted}. Fetch the model again")


def has_non_finite(tensor: Tensor) -> bool:
    """Whether a NaN or an infinity is among the values (all exponent bits are set)."""
    if tensor.dtype not in ITEM_SIZE:
        return False  # codes are whole numbers
    exponents = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}
    magnitude = {"f32": 0x7FFFFFFF, "f16": 0x7FFF, "bf16": 0x7FFF}
    bits = tensor.data.reshape(-1).view(np.uint32 if tensor.dtype == "f32" else np.uint16)
    mask = bits.dtype.type(magnitude[tensor.dtype])
    limit = exponents[tensor.dtype]
    scratch = np.empty(min(_CHUNK, bits.size), dtype=bits.dtype)
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        if np.bitwise_and(chunk, mask, out=scratch[: chunk.size]).max() >= limit:
            return True
    return False


def find_non_finite(checkpoint: Checkpoint) -> list[str]:
    """octavo's names of the weights that hold a NaN or an infinity. Reads all of the data."""
    return [name for name in checkpoint if has_non_finite(checkpoint[name])]


def _find_problems(
    source: TensorSource, expected: Mapping[str, tuple[int, ...]], files: ModelFiles
) -> list[str]:
    problems = find_problems(source, files.quantized)
    for name, shape in expected.items():
        if name.removesuffix(".weight") in files.quantized and name.endswith(".weight"):
            continue
        theirs = files.weight_map[name]
        info = source.infos.get(theirs)
        if info is None:
            problems.append(f"{theirs} is missing; expected shape {shape}")
        elif info.shape != shape:
            problems.append(f"{theirs} has shape {info.shape}; expected {shape}")
        elif info.dtype not in ITEM_SIZE:
            problems.append(f"{theirs} is stored as {info.dtype}; supported: F32, F16, BF16")
    known = set(files.weight_map.values())
    for matrix in files.quantized.values():
        known.discard(matrix.module + ".weight")
        known.update(stored_tensors(matrix))
    if files.spec.tie_word_embeddings:
        known.add(_HEAD)  # compared with the embedding below
    ignored = [re.compile(pattern) for pattern in files.ignored_weights]
    for name, info in source.infos.items():
        if name not in known and not any(pattern.fullmatch(name) for pattern in ignored):
            problems.append(
                f"{printable(name)} (shape {info.shape}) is left over: config.json has no place "
                "for it"
            )
    return problems


_HEAD = "lm_head.weight"


def _check_redundant_head(source: TensorSource, files: ModelFiles) -> None:
    """A tied checkpoint may hold its head a second time, but then it must be the embedding."""
    if not files.spec.tie_word_embeddings or _HEAD not in source.infos:
        return
    table = files.weight_map["embed.weight"]
    head_info, table_info = source.infos[_HEAD], source.infos[table]
    same = (head_info.dtype, head_info.shape) == (table_info.dtype, table_info.shape)
    if not same or not np.array_equal(
        source.read(_HEAD).data.reshape(-1).view(np.uint8),
        source.read(table).data.reshape(-1).view(np.uint8),
    ):
        raise WeightsError(
            f"config.json: tie_word_embeddings is true, but {files.path} holds an {_HEAD} that "
            f"differs from {table}. If the head is meant, set tie_word_embeddings to false"
        )
