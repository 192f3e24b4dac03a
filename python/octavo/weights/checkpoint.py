"""The weights of a model under octavo's names, found complete before any of them is read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping

import numpy as np

from octavo.errors import WeightsError
from octavo.models.fields import printable
from octavo.models.layer import weight_shapes
from octavo.models.spec import WeightFormat
from octavo.weights.codes import (
    StoredSource,
    find_problems,
    running_formats,
    stored_tensors,
)
from octavo.weights.dummy import DummySource
from octavo.weights.files import HEAD, open_weight_files
from octavo.weights.gguf_folder import GgufFolder
from octavo.weights.gguf_llama import GgufLlamaSource
from octavo.weights.model_files import ModelFiles
from octavo.weights.source import TensorInfo, TensorSource
from octavo.weights.tensor import ITEM_SIZE, Tensor, TensorDType

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

    load_format "auto" reads the GGUF file, or what `open_weight_files` finds in the directory;
    "dummy" makes seeded random weights and opens no file. Only headers are read here.

    Raises WeightsError listing every weight that is missing, left over, of the wrong shape or in
    an unsupported format; or saying what is wrong with a damaged file.
    """
    expected = weight_shapes(files.spec)
    if load_format == "dummy":
        return Checkpoint(DummySource(expected, seed), {name: name for name in expected})
    folder = files.folder
    source = folder.source if isinstance(folder, GgufFolder) else open_weight_files(files.path)
    check_weights(source, files)
    stored = _stored_names(source, files)
    names = {name: stored[name] for name in expected}
    if not files.quantized or isinstance(source, GgufLlamaSource):
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


def _stored_names(source: TensorSource, files: ModelFiles) -> dict[str, str]:
    """octavo's names -> the checkpoint's; of a tied pair either name may be the one that is there.

    `save_model` of safetensors keeps lm_head; transformers writes the embedding.
    """
    names = dict(files.weight_map)
    if files.spec.tie_word_embeddings and "embed" not in files.quantized:
        alone = HEAD in source.infos and names["embed.weight"] not in source.infos
        names["embed.weight"] = HEAD if alone else names["embed.weight"]
    return names


def _find_problems(
    source: TensorSource, expected: Mapping[str, tuple[int, ...]], files: ModelFiles
) -> list[str]:
    problems = find_problems(source, files.quantized)
    names = _stored_names(source, files)
    for name, shape in expected.items():
        if name.removesuffix(".weight") in files.quantized and name.endswith(".weight"):
            continue
        theirs = names[name]
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
        known.add(HEAD)  # equal to the embedding, as `read_model` found
    ignored = [re.compile(pattern) for pattern in files.ignored_weights]
    for name, info in source.infos.items():
        if name not in known and not any(pattern.fullmatch(name) for pattern in ignored):
            problems.append(
                f"{printable(name)} (shape {info.shape}) is left over: config.json has no place "
                "for it"
            )
    return problems
