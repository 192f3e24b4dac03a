"""Reading GGUF files: header checked strictly here, quantized blocks decoded by `gguf`.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), version 2 and 3, all
little-endian: magic "GGUF", version, counts of tensors and of metadata entries; the entries (key,
type, value); for each tensor its name, dimensions (innermost first), type and offset; padding;
the data. The header is parsed here and not by `gguf.GGUFReader`, whose loops take their length
from the file: with a damaged count they would hardly end.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.errors import WeightsError
from octavo.files import check_is_no_pointer, map_file
from octavo.models.fields import describe
from octavo.weights.tensor import Tensor, TensorDType

_STRING, _ARRAY = 8, 9
_SCALARS: Mapping[int, struct.Struct] = MappingProxyType(
    {
        kind: struct.Struct("<" + code)
        for kind, code in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
    }
)
# What can be decoded: plain numbers, and the block formats for which `gguf` has a decoder.
KINDS = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)
MAX_ARRAY = 1 << 24  # entries of one metadata array; vocabularies have up to a few 100,000
MAX_TENSORS = 1 << 20
MAX_NAME = 1 << 16
PLAIN_KINDS: Mapping[str, tuple[TensorDType, str]] = MappingProxyType(
    {"F32": ("f32", "<f4"), "F16": ("f16", "<f2"), "BF16": ("bf16", "<u2")}
)
_ROWS_AT_ONCE = 1 << 18  # elements decoded in one go: they stay in cache


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the header describes it."""

    name: str
    shape: tuple[int, ...]  # at most 2 axes, the outer first (GGUF itself has the inner first)
    kind: str  # "F32", "F16", "BF16", "Q4_1", ...: a name of gguf.GGMLQuantizationType
    offset: int  # of its data in the file, bytes
    num_bytes: int


class GgufFile:
    """An open GGUF file: `metadata` (key -> value), `tensors` (name -> header), and the data."""

    def __init__(self, path: Path) -> None:
        """Raises WeightsError for anything that is not a whole, consistent GGUF file."""
        self.path = path
        try:
            self._map = map_file(path)
        except ValueError as error:  # an empty file cannot be mapped
            raise WeightsError(f"{path} is empty; expected a GGUF file") from error
        except OSError as error:
            raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
        cursor = _Cursor(self._map, path)
        num_tensors, num_entries = _read_preamble(cursor)
        self.metadata: Mapping[str, Any] = _read_metadata(cursor, num_entries)
        self.tensors: Mapping[str, GgufTensor] = _read_tensors(
            cursor, num_tensors, self.metadata.get("general.alignment", 32), len(self._map)
        )

    def decode(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """F32, F16 and BF16 as they are, others as float32. Of a matrix, rows first to last - 1."""
        info = self.tensors[name]
        shape = info.shape if last is None else (last - first, *info.shape[1:])
        raw = self.read_bytes(name, first, last)
        if info.kind in PLAIN_KINDS:
            dtype, numpy_name = PLAIN_KINDS[info.kind]
            return Tensor(raw.view(numpy_name).reshape(shape), dtype)
        return Tensor(_decode_blocks(raw, info.kind, shape), "f32")

    def read_bytes(
        self, name: str, first: int = 0, last: int | None = None
    ) -> npt.NDArray[np.uint8]:
        """The data as stored in the file. Of a matrix, rows first to last - 1."""
        info = self.tensors[name]
        offset, num_bytes = info.offset, info.num_bytes
        if last is not None:
            row_bytes = num_bytes // max(1, info.shape[0])
            offset, num_bytes = offset + first * row_bytes, (last - first) * row_bytes
        # Pages read before leave this process's memory; the system brings them back if needed.
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        return np.frombuffer(self._map, np.uint8, num_bytes, offset)

    def rows_at_once(self, name: str) -> int:
        """How many rows of a matrix to decode in one go."""
        return max(1, _ROWS_AT_ONCE // max(1, math.prod(self.tensors[name].shape[1:])))


def _decode_blocks(
    raw: npt.NDArray[np.uint8], kind: str, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    import gguf

    if raw.size == 0:
        return np.zeros(shape, np.float32)
    num_rows = math.prod(shape[:-1])
    try:
        with np.errstate(all="ignore"):  # scales of a damaged block may be infinite or NaN
            values = gguf.dequantize(raw.reshape((num_rows, -1)), gguf.GGMLQuantizationType[kind])
    except NotImplementedError as error:  # a format that an older gguf package lacks
        raise WeightsError(f"{kind} cannot be decoded: {error}; upgrade gguf") from error
    return np.ascontiguousarray(values, np.float32).reshape(shape)


class _Cursor:
    """Reads little-endian values one after the other; WeightsError at the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0

    def error(self, what: str) -> WeightsError:
        return WeightsError(
            f"{self.path} is no usable GGUF file: {what} (near byte {self.position})"
        )

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise self.error(
                f"{count} bytes are announced, {len(self.data) - self.position} are left; it is "
                "truncated or damaged"
            )
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def scalar(self, kind: int) -> Any:
        layout = _SCALARS[kind]
        return layout.unpack(self.take(layout.size))[0]

    def u32(self) -> int:
        return int(self.scalar(4))

    def u64(self) -> int:
        return int(self.scalar(10))

    def string(self, limit: int | None = None) -> str:
        length = self.u64()
        if limit is not None and length > limit:
            raise self.error(f"a name of {length} bytes; expected at most {limit}")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"a text is not UTF-8: {error}") from error

    def strings(self, count: int) -> list[str]:
        """As `string`, so many times: vocabularies and merges have hundreds of thousands."""
        data, position, size = self.data, self.position, len(self.data)
        unpack, found = _SCALARS[10].unpack_from, []
        for _ in range(count):
            if position + 8 > size:
                break
            start = position + 8
            position = start + unpack(data, position)[0]
            if position > size:
                break
            found.append(data[start:position])
            self.position = position
        if len(found) < count:
            self.string()  # raises
        try:
            return [text.decode("utf-8") for text in found]
        except UnicodeDecodeError as error:
            raise self.error(f"a text is not UTF-8: {error}") from error

    def value(self, kind: int) -> Any:
        """One metadata value: a number, a bool, a str, or a list of them."""
        if kind in _SCALARS:
            return self.scalar(kind)
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.error(f"metadata type {kind} is unknown")
        inner, count = self.u32(), self.u64()
        if count > MAX_ARRAY:
            raise self.error(f"an array of {count} entries; expected at most {MAX_ARRAY}")
        if inner == _STRING:
            return self.strings(count)
        if inner not in _SCALARS:
            raise self.error(f"an array of metadata type {inner} is not supported")
        layout = _SCALARS[inner]
        return [entry for (entry,) in layout.iter_unpack(self.take(layout.size * count))]


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """(number of tensors, number of metadata entries)."""
    magic = cursor.data[:4]
    check_is_no_pointer(cursor.path, cursor.data[:8], WeightsError)
    if magic != b"GGUF":
        raise cursor.error(f"it begins with {magic!r}; expected b'GGUF'")
    cursor.position = 4
    version = cursor.u32()
    if version not in (2, 3):
        big = version & 0xFFFF == 0 and version != 0
        found = "big-endian" if big else f"of version {version}"
        raise cursor.error(f"it is {found}; supported: little-endian, version 2 or 3")
    num_tensors, num_entries = cursor.u64(), cursor.u64()
    if num_tensors > MAX_TENSORS or num_entries > MAX_TENSORS:
        raise cursor.error(
            f"it announces {num_tensors} tensors and {num_entries} metadata entries; expected at "
            f"most {MAX_TENSORS} of each"
        )
    return num_tensors, num_entries


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string(MAX_NAME)
        if key in metadata:
            raise cursor.error(f"metadata {describe(key)} appears twice")
        metadata[key] = cursor.value(cursor.u32())
    return metadata


def _read_tensors(
    cursor: _Cursor, count: int, alignment: object, size: int
) -> dict[str, GgufTensor]:
    """The tensors by name; their data was checked to lie within the file."""
    import gguf

    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {describe(alignment)}; expected a power of two")
    kinds = {kind.value: kind for kind in gguf.GGMLQuantizationType}
    entries = []
    for _ in range(count):
        name, num_dims = cursor.string(MAX_NAME), cursor.u32()
        if num_dims > 4:
            raise cursor.error(f"{describe(name)} has {num_dims} dimensions; expected at most 4")
        shape = tuple(reversed([cursor.u64() for _ in range(num_dims)]))
        if num_dims > 2:  # the matrices of all experts: one matrix with the rows of all of them
            shape = (math.prod(shape[:-1]), shape[-1])
        entries.append((name, shape, cursor.u32(), cursor.u64()))
    start = (cursor.position + alignment - 1) // alignment * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind_value, offset in entries:
        kind = kinds.get(kind_value)
        if kind is None or kind.name not in KINDS:
            found = kind.name if kind is not None else f"number {kind_value}"
            raise cursor.error(f"{describe(name)} has type {found}; supported: {', '.join(KINDS)}")
        block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        width = shape[-1] if shape else 1
        if width % block_elements or offset % alignment or name in tensors:
            raise cursor.error(
                f"{describe(name)} appears twice, or its rows of {width} are not whole blocks of "
                f"{block_elements}, or its offset {offset} is not a multiple of {alignment}"
            )
        num_bytes = math.prod(shape) // block_elements * block_bytes
        if start + offset + num_bytes > size:
            raise cursor.error(
                f"the data of {describe(name)} ends at byte {start + offset + num_bytes}, the "
                f"file at {size}; it is truncated"
            )
        tensors[name] = GgufTensor(name, shape, kind.name, start + offset, num_bytes)
    return tensors
