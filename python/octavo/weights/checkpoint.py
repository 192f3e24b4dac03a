"""The weights of a model under octavo's names, checked to be complete before any is read."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from octavo.errors import WeightsError
from octavo.models.family import WeightSource
from octavo.models.fields import printable
from octavo.models.layer import weight_shapes
from octavo.models.spec import WeightFormat
from octavo.reference.quantization import round_to_int8
from octavo.weights.dummy import DummySource
from octavo.weights.gguf_codes import GgufCodes, stored_kinds
from octavo.weights.gguf_folder import GgufFolder
from octavo.weights.model_files import ModelFiles
from octavo.weights.reader import read_runs, read_weight, rows_at_once, weight_info
from octavo.weights.safetensors import SafetensorsFile, open_weight_files
from octavo.weights.stored import FLOATS, Entry, StoredMatrix, StoredSource, with_alike_experts
from octavo.weights.tensor import (
    ITEM_SIZE,
    Stored,
    Tensor,
    TensorDType,
    TensorInfo,
    TensorSource,
)

_CHUNK = 1 << 20  # elements searched for NaN in one go: the scratch stays in cache


class NonFiniteWeightsWarning(UserWarning):
    """Weights hold a NaN or an infinity: all results that depend on them will too."""


class Checkpoint(Mapping[str, Tensor]):
    """Every weight a model needs, by octavo's name; memory-mapped, read when asked for.

    infos: name -> shape, dtype and bytes, from headers alone.
    formats: of the matrices that are, or will be, quantized, by name without ".weight". Codes
        ("int8", "int4") have "NAME.scale" and, if asymmetric, "NAME.zero" beside them.
    dtype: the format of most elements that are not codes.
    total_bytes: of all weights as they are read.
    num_parameters: of the model, scales and zero points not counted.
    places: where in the files each weight lies.
    stored: how the files hold matrices in formats that are not octavo's, by name without ".weight".
    """

    def __init__(
        self,
        source: TensorSource,
        weight_map: Mapping[str, WeightSource] | None = None,
        formats: Mapping[str, WeightFormat] | None = None,
        dtype: TensorDType | None = None,
        stored: Mapping[str, Stored] | None = None,
    ) -> None:
        """weight_map: where in `source` each weight lies; None: under octavo's names."""
        self._source = source
        self.places: Mapping[str, WeightSource] = weight_map or {
            name: WeightSource(name, info.shape) for name, info in source.infos.items()
        }
        self.formats: Mapping[str, WeightFormat] = dict(formats or {})
        self.stored: Mapping[str, Stored] = dict(stored or {})
        self.infos: Mapping[str, TensorInfo] = {
            name: weight_info(source, wanted) for name, wanted in self.places.items()
        }
        self.total_bytes = sum(info.num_bytes for info in self.infos.values())
        self.num_parameters = sum(
            info.num_elements
            for name, info in self.infos.items()
            if not name.endswith((".scale", ".zero"))
        )
        counts: Counter[str] = Counter()
        for info in self.infos.values():
            counts[info.dtype] += info.num_elements
        most = max(ITEM_SIZE, key=lambda kind: counts[kind])
        self.dtype: TensorDType = most if dtype is None else dtype

    def __getitem__(self, name: str) -> Tensor:
        return read_weight(self._source, self.places[name])

    def runs(self, name: str) -> Iterator[Tensor]:
        """A weight in runs of rows, at least one, so that a big table needs little memory."""
        return read_runs(self._source, self.places[name])

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first to last - 1 of a weight; whole heads of one whose rows are permuted."""
        place = self.places[name]
        begin, of = place.rows or (0, place.shape[0])
        shape = (last - first, *place.shape[1:])
        return read_weight(self._source, replace(place, shape=shape, rows=(begin + first, of)))

    def rows_at_once(self, name: str) -> int:
        """How many rows to read in one go, so that little memory is needed besides the result."""
        return rows_at_once(self._source, self.places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def first_layers(self, count: int) -> Checkpoint:
        """The weights of the same model without its layers from `count` on."""

        def is_kept(name: str) -> bool:
            parts = name.split(".")
            return parts[0] != "layers" or int(parts[1]) < count

        kept = {name: source for name, source in self.places.items() if is_kept(name)}
        formats = {name: each for name, each in self.formats.items() if is_kept(name)}
        stored = {name: each for name, each in self.stored.items() if is_kept(name)}
        return Checkpoint(self._source, kept, formats, self.dtype, stored)

    def bytes_by_dtype(self) -> dict[str, int]:
        """Bytes as stored, by format, largest first."""
        sizes: Counter[str] = Counter()
        for name, info in self.infos.items():
            base, _, part = name.rpartition(".")
            if base not in self.stored or part == "bias":
                sizes[info.dtype] += info.num_bytes
            elif part == "weight":
                sizes[self.stored[base].kind] += self.stored[base].num_bytes
        return dict(sizes.most_common())

    def checked_runs(self) -> Iterator[tuple[str, int, Tensor]]:
        """All weights in order, for a loader, each in runs of rows: its name, first row, numbers.

        Of numbers that the native core would round to int8 a run with a NaN is rounded here, with
        a NaN for its row's scale: no code stands for one.
        Warns of weights that hold a NaN or an infinity: one warning (NonFiniteWeightsWarning) names
        all of them, after the last weight.
        """
        damaged: dict[str, None] = {}
        for name in self:
            row = 0
            base = name.removesuffix(".weight")
            is_int8 = base in self.formats and self.formats[base].dtype == "int8"
            for tensor in self.runs(name):
                is_damaged = has_non_finite(tensor)
                if is_damaged:
                    damaged[self.places[name].tensor] = None
                if is_damaged and is_int8:
                    codes, scales = round_to_int8(tensor.to_float32())
                    yield name, row, Tensor(codes, "int8")
                    yield f"{base}.scale", row, Tensor(scales, "f32")
                else:
                    yield name, row, tensor
                row += len(tensor.data)
        if damaged:
            shown = ", ".join(list(damaged)[:8]) + (", ..." if len(damaged) > 8 else "")
            warnings.warn(
                f"{len(damaged)} of {len(self)} weights hold a NaN or an infinity ({shown}); the "
                "model will answer nonsense. Fetch or convert it again",
                NonFiniteWeightsWarning,
                stacklevel=2,
            )


def open_checkpoint(files: ModelFiles, load_format: str = "auto", seed: int = 0) -> Checkpoint:
    """Open the weights of a model and check them against its configuration.

    load_format "auto" reads the GGUF file, or the files that `open_weight_files` finds in the
    directory; "dummy" makes seeded random weights and opens no file. Only headers are read here.

    Raises WeightsError that lists every weight that is missing, left over, of the wrong shape or
    in an unsupported format, or says what is wrong with a damaged file.
    """
    if load_format == "dummy":
        return Checkpoint(DummySource(weight_shapes(files.spec), seed))
    weight_map, ignored = files.weight_map, files.family.ignored
    source: TensorSource
    if isinstance(files.folder, GgufFolder):
        family, source = files.folder.family, files.folder.parts
        weight_map = family.tensors.weight_map(files.spec)
        needless = (family.tensors.tensor("lm_head"),) * files.spec.tie_word_embeddings
        ignored = tuple(map(re.escape, (*family.constants, *needless)))
    else:
        source = open_weight_files(files.path)
        weight_map = _without_prefix(weight_map, source, files.family.base_prefix)
        if files.spec.tie_word_embeddings:
            # Either name may be there: `save_model` of safetensors keeps lm_head, transformers
            # writes the embedding. If both are there they are equal: `read_model` compared them.
            head, table = files.family.tensors.tensor("lm_head"), weight_map["embed.weight"]
            if head in source.infos and table.tensor not in source.infos:
                weight_map = weight_map | {"embed.weight": replace(table, tensor=head)}
            ignored = (*ignored, re.escape(head))
    named = {
        name: replace(matrix, module=weight_map[name + ".weight"].module)
        for name, matrix in files.quantized.items()
    }
    quantized = {name: each for name, each in named.items() if not each.is_plain(source.infos)}
    ignored = (*ignored, *map(re.escape, _zero_biases(source, weight_map, quantized.values())))
    problems = _find_problems(source, weight_map, quantized, ignored)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise WeightsError(
            f"The weights in {files.path} do not fit its configuration ({count}):", problems
        )
    if isinstance(files.folder, GgufFolder):
        return _gguf_checkpoint(files.folder, weight_map)
    if not isinstance(source, SafetensorsFile) or not quantized:
        return Checkpoint(source, weight_map)
    return _open_stored(source, weight_map, quantized)


def _open_stored(
    source: SafetensorsFile,
    weight_map: Mapping[str, WeightSource],
    quantized: Mapping[str, StoredMatrix],
) -> Checkpoint:
    """The checkpoint of files whose tensors fit."""
    each = {name: matrix.settled(source) for name, matrix in quantized.items()}
    settled = with_alike_experts(each)
    formats = {name: each.format for name, each in settled.items() if not each.converted}
    turned, stored = dict(weight_map), {}
    for name, matrix in settled.items():
        wanted = weight_map[name + ".weight"]
        # They are (outputs, inputs) in every family.
        turned[name + ".weight"] = replace(wanted, transform="plain")
        if not matrix.is_own:
            share = math.prod(wanted.shape) / math.prod(matrix.shape)
            stored[name] = matrix.described(source.infos, share)
    codes = StoredSource(source, settled.values())
    return Checkpoint(codes, _with_scales(turned, formats), formats, stored=stored)


def _zero_biases(
    source: TensorSource,
    weight_map: Mapping[str, WeightSource],
    matrices: Iterable[StoredMatrix],
) -> Iterator[str]:
    """Biases that the family does not have, and that hold zeros: early AutoGPTQ wrote them."""
    known = {wanted.tensor for wanted in weight_map.values()}
    for matrix in matrices:
        name = matrix.module + ".bias"
        info = source.infos.get(name)
        if name in known or info is None or info.dtype not in ITEM_SIZE:
            continue
        if info.shape == (matrix.shape[0],) and not np.any(source.read(name).to_float32()):
            yield name


def _without_prefix(
    weight_map: dict[str, WeightSource], source: TensorSource, prefix: str
) -> dict[str, WeightSource]:
    """The map for the checkpoint of a model without its head, whose names lack the prefix."""
    table = weight_map["embed.weight"].tensor
    if table in source.infos or table.removeprefix(prefix) not in source.infos:
        return weight_map
    return {
        name: replace(wanted, tensor=wanted.tensor.removeprefix(prefix))
        for name, wanted in weight_map.items()
    }


def _gguf_checkpoint(folder: GgufFolder, weight_map: Mapping[str, WeightSource]) -> Checkpoint:
    """The weights of a GGUF model, as codes where the folder says so and octavo has such."""
    stored = stored_kinds(folder.parts, weight_map)
    formats = {name: held.format for name, held in stored.items() if held.format is not None}
    decoded = Checkpoint(folder.parts, weight_map, stored=stored)
    if not folder.as_codes or not formats:
        return decoded
    modules = {weight_map[name + ".weight"].module: each for name, each in formats.items()}
    codes, with_scales = GgufCodes(folder.parts, modules), _with_scales(weight_map, formats)
    return Checkpoint(codes, with_scales, formats, decoded.dtype, stored)


def _with_scales(
    weight_map: Mapping[str, WeightSource], formats: Mapping[str, WeightFormat]
) -> dict[str, WeightSource]:
    """The map with scales and zero points after their codes, for a loader that reads in order."""
    with_scales = {}
    for name, wanted in weight_map.items():
        with_scales[name] = wanted
        base = name.removesuffix(".weight")
        if base in formats and base != name:
            shape = wanted.shape[0], formats[base].num_groups(wanted.shape[1])
            scale = replace(wanted, tensor=wanted.module + ".weight_scale", shape=shape)
            with_scales[base + ".scale"] = scale
            if formats[base].has_zeros:
                zero = replace(scale, tensor=wanted.module + ".weight_zero_point")
                with_scales[base + ".zero"] = zero
    return with_scales


def has_non_finite(tensor: Tensor) -> bool:
    """Whether a NaN or an infinity is among the values (all exponent bits are set)."""
    if tensor.dtype not in ITEM_SIZE:
        return False  # codes are whole numbers
    bits = tensor.data.reshape(-1).view(np.uint32 if tensor.dtype == "f32" else np.uint16)
    exponent = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}[tensor.dtype]
    mask = bits.dtype.type(exponent)
    scratch = np.empty(min(_CHUNK, bits.size), dtype=bits.dtype)
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        if np.bitwise_and(chunk, mask, out=scratch[: chunk.size]).max() == exponent:
            return True
    return False


def _find_problems(
    source: TensorSource,
    weight_map: Mapping[str, WeightSource],
    quantized: Mapping[str, StoredMatrix],
    ignored: Sequence[str],
) -> list[str]:
    """Every difference between the tensors of `source` and those of the map."""
    problems = []
    expected: dict[str, Entry] = {}
    for matrix in quantized.values():
        expected |= matrix.entries(source.infos)
    for name, wanted in weight_map.items():
        if name.removesuffix(".weight") not in quantized or not name.endswith(".weight"):
            expected[wanted.tensor] = Entry(FLOATS, (wanted.stored_shape,))
    for name, (dtypes, shapes, optional) in expected.items():
        info = source.infos.get(name)
        shape = " or ".join(map(str, shapes)) or "any"
        if info is None:
            if not optional:
                problems.append(f"{name} is missing; expected shape {shape}")
        elif shapes and info.shape not in shapes:
            problems.append(f"{name} has shape {info.shape}; expected {shape}")
        elif info.dtype not in dtypes:
            supported = ", ".join(dtype.upper() for dtype in dtypes)
            problems.append(f"{name} is stored as {info.dtype}; supported: {supported}")
    patterns = [re.compile(pattern) for pattern in ignored]
    for name, info in source.infos.items():
        if name not in expected and not any(pattern.fullmatch(name) for pattern in patterns):
            problems.append(
                f"{printable(name)} (shape {info.shape}) is left over: the configuration has no "
                "place for it"
            )
    return problems
