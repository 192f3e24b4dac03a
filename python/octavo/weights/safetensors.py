"""Reading safetensors files: the header checked strictly, the data memory-mapped.

The format (https://github.com/huggingface/safetensors): 8 bytes with the length of the header,
little-endian; the header, a JSON object `{name: {dtype, shape, data_offsets}}` with an optional
`__metadata__`; then the data, which the tensors tile without gap or overlap. NumPy has no
bfloat16, so tensors are views of the mapped bytes as float32, float16, or uint16 (bf16).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.errors import WeightsError
from octavo.files import check_is_no_pointer, map_file
from octavo.models.fields import describe, printable
from octavo.weights.tensor import Tensor, TensorDType, TensorInfo, TensorSource

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library too

# Bits of an element, for every type a header may name; only three of them can be loaded.
ELEMENT_BITS: Mapping[str, int] = MappingProxyType(
    {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
    | dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8)
    | dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("U16", "I16", "F16", "BF16"), 16)
    | dict.fromkeys(("U32", "I32", "F32"), 32)
    | dict.fromkeys(("U64", "I64", "F64", "C64"), 64)
)
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_NUMBERED_SHARD = re.compile(r"([^/]+)-(\d{5})-of-(\d{5})\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,200}\.safetensors")
# Types that can be read: octavo's names, or the file's own, and NumPy's.
_FLOATS: Mapping[str, TensorDType] = MappingProxyType({"F32": "f32", "F16": "f16", "BF16": "bf16"})
_NUMPY_TYPES: Mapping[str, str] = MappingProxyType(
    {"f32": "<f4", "f16": "<f2", "bf16": "<u2", "I8": "<i1", "I32": "<i4", "I64": "<i8"}
    | dict.fromkeys(("U8", "F8_E4M3", "F8_E8M0"), "<u1")
)


class SafetensorsFile(TensorSource):
    """One file. Opening it reads and checks the header; data is paged in when it is used."""

    def __init__(self, path: Path) -> None:
        """Raises WeightsError for anything that is not a whole, consistent safetensors file."""
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                header, self._data_start = _read_header(path, file.read(8), file, size)
                self._offsets = _check_header(path, header, size - self._data_start)
            self._mapping = map_file(path)
            # The array, and so every slice of it, keeps the mapping alive.
            self._bytes: npt.NDArray[np.uint8] = np.frombuffer(self._mapping, np.uint8)
        except OSError as error:
            raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
        self.infos = {
            name: TensorInfo(
                _FLOATS.get(kind := header[name]["dtype"], kind),
                tuple(header[name]["shape"]),
                end - begin,
            )
            for name, (begin, end) in self._offsets.items()
        }

    def read(self, name: str) -> Tensor:
        """A view of the mapped file; a copy only where an old file left the data unaligned."""
        stored = self.infos[name].dtype
        for dtype in _FLOATS.values():
            if dtype == stored:
                return Tensor(self.read_array(name), dtype)
        raise WeightsError(f"{self.path}: {name} is stored as {stored}; supported: F32, F16, BF16")

    def read_array(self, name: str) -> npt.NDArray[Any]:
        """As `read`, for I8, I32, I64 tensors too, and the bytes of U8 and two kinds of F8."""
        info = self.infos[name]
        data = self.read_bytes(name).view(_NUMPY_TYPES[info.dtype]).reshape(info.shape)
        return data if data.flags.aligned else data.copy()

    def read_bytes(self, name: str) -> npt.NDArray[np.uint8]:
        """A tensor of any type as it is stored: a view of the mapped file."""
        # Pages read before leave this process's memory (the system keeps them, and brings them back
        # if needed): otherwise a loader would hold the file beside the packed weights.
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)
        begin, end = self._offsets[name]
        return self._bytes[self._data_start + begin : self._data_start + end]


class ShardedSafetensors(SafetensorsFile):
    """Several files that hold a model together."""

    def __init__(self, index_path: Path, shards: Sequence[str] | None = None) -> None:
        """index_path: the file with the shard of each tensor. shards: the files, without an index.

        Raises WeightsError with all shards that are missing, contradict the index, or hold a
        tensor that another one holds too.
        """
        self.path = index_path
        places = read_index(index_path) if shards is None else {}
        names = sorted(set(places.values())) if shards is None else shards
        missing = [
            f"{file} is missing; fetch it again"
            for file in names
            if not (index_path.parent / file).is_file()
        ]
        if missing:
            raise WeightsError(f"{index_path} names files that are not there:", missing)
        files = {name: SafetensorsFile(index_path.parent / name) for name in names}
        problems = [
            f"{printable(name)} should be in {file}, which does not hold it"
            for name, file in places.items()
            if name not in files[file].infos
        ]
        self._files: dict[str, SafetensorsFile] = {}
        for file_name in names:
            for name in files[file_name].infos:
                if name in self._files:
                    problems.append(f"{printable(name)} is in {file_name} and in another file")
                self._files.setdefault(name, files[places.get(name, file_name)])
        if problems:
            told = f"{index_path} does not fit its files:"
            if shards is not None:
                told = f"The shards in {index_path.parent} do not fit each other:"
            raise WeightsError(told, problems)
        self.infos = {name: file.infos[name] for name, file in self._files.items()}

    def read_bytes(self, name: str) -> npt.NDArray[np.uint8]:
        """As `SafetensorsFile.read_bytes`."""
        return self._files[name].read_bytes(name)


def _read_header(path: Path, first: bytes, file: Any, size: int) -> tuple[dict[str, Any], int]:
    """The header's JSON object and where the data starts; `file` is positioned after `first`."""
    if len(first) < 8:
        raise WeightsError(
            f"{path} has {size} bytes, too few for a safetensors file: it is truncated. "
            "Fetch it again"
        )
    check_is_no_pointer(path, first, WeightsError)
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES:
        raise WeightsError(
            f"{path} announces a header of {length} bytes; expected at most {MAX_HEADER_BYTES}. "
            "It is damaged, or no safetensors file"
        )
    if length > size - 8:
        raise WeightsError(
            f"{path} announces a header of {length} bytes, but only {size - 8} follow: it is "
            "truncated. Fetch it again"
        )
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} has a header that is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path} has a header that is not a JSON object: {describe(header)}")
    return header, 8 + length


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{describe(twice)} appears twice")
    return values


def _check_header(path: Path, header: dict[str, Any], size: int) -> dict[str, tuple[int, int]]:
    """Where each tensor's data begins and ends; every entry is checked first."""
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WeightsError(f"{path}: __metadata__ is not a JSON object of strings")
    offsets: dict[str, tuple[int, int]] = {}
    problems: list[str] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        problem = _entry_problem(entry)
        if problem:
            problems.append(f"{describe(name)}: {problem}")
        else:
            begin, end = entry["data_offsets"]
            offsets[name] = (begin, end)
    if problems:
        raise WeightsError(f"{path} has a damaged header:", problems)
    position = 0
    for name, (begin, end) in sorted(offsets.items(), key=lambda item: item[1]):
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise WeightsError(
                f"{path}: the data of {describe(name)} begins at {begin}, expected {position}: it "
                f"{what}"
            )
        position = end
    if position != size:
        raise WeightsError(
            f"{path} holds {size} bytes of data, but its header describes {position}: it is "
            f"{'truncated' if position > size else 'damaged'}. Fetch it again"
        )
    return offsets


def _entry_problem(entry: object) -> str:
    """What is wrong with one entry of the header; "" if nothing is."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return f"{describe(entry)} is not an object of dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BITS:
        return f"dtype {describe(dtype)} is not a safetensors type"
    if not _are_sizes(shape):
        return f"shape {describe(shape)} is not a list of sizes"
    if not _are_sizes(offsets) or len(offsets) != 2:
        return f"data_offsets {describe(offsets)} is not a pair of offsets"
    begin, end = offsets
    if begin > end:
        return f"data_offsets {offsets} end before they begin"
    bits = math.prod(shape) * ELEMENT_BITS[dtype]
    if bits != 8 * (end - begin):
        need = describe(-(-bits // 8))
        return f"{dtype} of shape {describe(shape)} takes {need} bytes, not {end - begin}"
    return ""


def _are_sizes(values: object) -> bool:
    """Whether it is a list of at most 64 integers from 0 to 2^63 - 1; true is no integer here."""
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )


def make_header(entries: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, int]:
    """The beginning of a file whose tensors follow each other in the order given.

    entries: name -> (safetensors type, shape). Returns the bytes before the data, padded so that
    the data begins at a multiple of 8, and the number of bytes of data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in entries.items():
        end = offset + math.prod(shape) * ELEMENT_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


def open_weight_files(path: Path) -> SafetensorsFile:
    """The safetensors of a directory; WeightsError says what to do where there are none.

    Of several kinds, the first of these is taken, as in transformers: model.safetensors; the shards
    of the index. Without either, NAME-0000K-of-0000N.safetensors if they are all there.
    """
    if (path / SINGLE).is_file():
        return SafetensorsFile(path / SINGLE)
    if (path / INDEX).is_file():
        return ShardedSafetensors(path / INDEX)
    names = sorted(entry.name for entry in path.iterdir())
    shards = numbered_shards(names, str(path))
    if shards:
        return ShardedSafetensors(path / INDEX, shards)
    wanted = f"{path} holds neither {SINGLE} nor {INDEX}"
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        raise WeightsError(
            f"{wanted}, nor shards named NAME-00001-of-0000N.safetensors. It holds "
            f"{', '.join(others[:8])}: fetch the model in its Hugging Face form, or, where that "
            f"file is the whole model in this form, name it {SINGLE}"
        )
    gguf = [name for name in names if name.lower().endswith(".gguf")]
    if gguf:
        raise WeightsError(f"{wanted}. It holds a GGUF file: name that, {path / gguf[0]}")
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise WeightsError(
            f"{wanted}. It holds {', '.join(pickles[:3])}: pickle files run code when they are "
            "opened, so octavo never opens them. Where you trust the file, convert it: "
            "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW) of transformers "
            "writes safetensors"
        )
    raise WeightsError(f"{wanted}. Fetch the model again")


def numbered_shards(names: Iterable[str], place: str) -> list[str]:
    """Of these names, the shards NAME-0000K-of-0000N.safetensors, in order; [] for none.

    NAME is "model", as transformers writes, if there are such; else any one. place: where they lie,
    for the message of the WeightsError about missing shards, or two sets of them.
    """
    sets: dict[str, set[str]] = {}
    for name in names:
        if match := _NUMBERED_SHARD.fullmatch(name):
            sets.setdefault(match[1], set()).add(name)
    if "model" not in sets and len(sets) > 1:
        raise WeightsError(
            f"{place} holds shards named {' and '.join(sorted(sets))}; without {INDEX} nothing "
            "says which are meant: remove the others, or fetch the index"
        )
    stem = "model" if "model" in sets else next(iter(sets), "")
    found = sets.get(stem, set())
    counts = sorted({name.split("-of-")[-1].split(".")[0] for name in found})
    if not counts:
        return []
    if len(counts) > 1:
        raise WeightsError(
            f"{place} holds shards of {' and of '.join(str(int(count)) for count in counts)}; "
            f"without {INDEX} nothing says which are meant: remove the others, or fetch the index"
        )
    wanted = [f"{stem}-{k:05}-of-{counts[0]}.safetensors" for k in range(1, int(counts[0]) + 1)]
    missing = [name for name in wanted if name not in found]
    if missing or len(found) != len(wanted):
        lost = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise WeightsError(
            f"{place} holds {len(found)} of {len(wanted)} shards; missing: {lost or 'none'}, "
            f"left over: {', '.join(sorted(found - set(wanted))) or 'none'}. Fetch the model again"
        )
    return wanted


def read_index(path: Path) -> dict[str, str]:
    """The index's weight_map: tensor name -> name of a file beside the index."""
    try:
        index = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise WeightsError(f"{path} holds no weight_map; expected an object name -> file")
    for name, file in places.items():
        # A plain name only: an index from the network must not reach outside its directory.
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
            raise WeightsError(
                f"{path}: {describe(name)} is placed in {describe(file)}; expected the name of a "
                ".safetensors file in the same directory"
            )
    return places
