"""Codes as a `compressed-tensors` directory holds them: reading, checking, packing.

Of a matrix M of (outputs, inputs), layout "pack-quantized" has

    M.weight_packed      int32 (outputs, ceil(inputs * bits / 32)), see `pack_words`
    M.weight_scale       float (outputs, groups)
    M.weight_shape       int (2,): outputs and inputs
    M.weight_zero_point  int32 (ceil(outputs / 8), groups), of asymmetric matrices: packed downwards

"int-quantized" has M.weight int8 (outputs, inputs) with M.weight_scale (outputs, 1), and "octavo"
is "pack-quantized" with M.weight for M.weight_packed.
A weight is (code - zero point) * scale, with codes and zero points from -8 to 7 or -128 to 127.
`octavo.reference.quantization.pack_int32` defines the packing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.errors import WeightsError
from octavo.models.spec import WeightFormat
from octavo.weights.quantization_config import StoredMatrix
from octavo.weights.safetensors import SafetensorsFile
from octavo.weights.tensor import ITEM_SIZE, Tensor, TensorDType, TensorInfo, TensorSource

_BITS: dict[str, int] = {"int8": 8, "int4": 4}


def pack_words(codes: npt.NDArray[Any], format_dtype: str) -> npt.NDArray[np.int32]:
    """Codes as the native core takes them -> weight_packed.

    codes: int8 (outputs, inputs), or uint8 (outputs, inputs / 2) with two int4 codes a byte. The
    little-endian words have the same bytes (int8: plus 128); a row is padded with zero bytes to
    whole words.
    """
    raw = codes.view(np.uint8) ^ np.uint8(0x80) if format_dtype == "int8" else codes
    padded = np.zeros((raw.shape[0], -(-raw.shape[1] // 4) * 4), np.uint8)
    padded[:, : raw.shape[1]] = raw
    return padded.view("<i4")


def unpack_words(words: npt.NDArray[np.int32], format_dtype: str, inputs: int) -> npt.NDArray[Any]:
    """The inverse of `pack_words`; int4 is a view."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    if format_dtype == "int4":
        return np.ascontiguousarray(raw[:, : inputs // 2])
    return np.ascontiguousarray(raw[:, :inputs] ^ np.uint8(0x80)).view(np.int8)


def pack_zeros(zeros: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """Zero points (outputs, groups) -> weight_zero_point (ceil(outputs / 8), groups)."""
    outputs, groups = zeros.shape
    padded = np.zeros((-(-outputs // 8) * 8, groups), np.uint32)
    padded[:outputs] = (zeros + 8).astype(np.uint32)
    words = np.zeros((padded.shape[0] // 8, groups), np.uint32)
    for place in range(8):
        words |= padded[place::8] << np.uint32(4 * place)
    return words.view(np.int32)


def unpack_zeros(words: npt.NDArray[np.int32], outputs: int) -> npt.NDArray[np.float32]:
    """The inverse of `pack_zeros`."""
    zeros = np.empty((words.shape[0] * 8, words.shape[1]), np.float32)
    for place in range(8):
        zeros[place::8] = (words.view(np.uint32) >> np.uint32(4 * place)) & np.uint32(15)
    return np.ascontiguousarray(zeros[:outputs] - 8)


def words_name(matrix: StoredMatrix) -> str:
    """The tensor that holds the codes."""
    return matrix.module + (".weight_packed" if matrix.layout == "pack-quantized" else ".weight")


def stored_tensors(matrix: StoredMatrix) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """The tensors of a matrix: name -> (types it may have, shape)."""
    outputs, inputs = matrix.shape
    floats = tuple(ITEM_SIZE)
    groups = matrix.format.num_groups(inputs)
    name = matrix.module + "."
    scale = {name + "weight_scale": (floats, (outputs, groups))}
    if matrix.layout == "int-quantized":
        return {name + "weight": (("I8",), (outputs, inputs)), **scale}
    words = -(-inputs * _BITS[matrix.format.dtype] // 32)
    tensors = {
        words_name(matrix): (("I32",), (outputs, words)),
        name + "weight_shape": (("I32", "I64"), (2,)),
        **scale,
    }
    if matrix.format.has_zeros:
        tensors[name + "weight_zero_point"] = (("I32",), (-(-outputs // 8), groups))
    return tensors


def running_formats(
    source: TensorSource, stored: Mapping[str, StoredMatrix]
) -> dict[str, WeightFormat]:
    """The formats of the stored matrices, by octavo's name, as they run.

    Scales of int4 stay in bfloat16 if they are stored so; else they become float32, which holds
    every other stored type exactly.
    """
    formats = {}
    for name, matrix in stored.items():
        bf16 = source.infos[matrix.module + ".weight_scale"].dtype == "bf16"
        wide = matrix.format.dtype == "int4" and not bf16
        formats[name] = replace(matrix.format, scale_dtype="f32") if wide else matrix.format
    return formats


class StoredSource(TensorSource):
    """A `TensorSource` in which every stored matrix is codes, scales and zero points.

    Of the matrix M, "M.weight" is int8 or int4, "M.weight_scale" as stored, "M.weight_zero_point"
    float32 (outputs, groups). All other tensors are those of `files`.
    """

    def __init__(self, files: SafetensorsFile, stored: Mapping[str, StoredMatrix]) -> None:
        """files: with shapes already checked. Raises WeightsError for a wrong weight_shape."""
        self._files = files
        self._matrices = {matrix.module: matrix for matrix in stored.values()}
        infos = dict(files.infos)
        for module, matrix in self._matrices.items():
            for name in stored_tensors(matrix):
                if name != module + ".weight_scale":
                    del infos[name]
            if matrix.layout != "int-quantized":
                shape = tuple(int(size) for size in files.read_array(module + ".weight_shape"))
                if shape != matrix.shape:
                    raise WeightsError(
                        f"{module}.weight_shape is {shape}; config.json makes it {matrix.shape}"
                    )
            outputs, inputs = matrix.shape
            num_bytes = outputs * inputs * _BITS[matrix.format.dtype] // 8
            infos[module + ".weight"] = TensorInfo(matrix.format.dtype, matrix.shape, num_bytes)
            if matrix.format.has_zeros:
                shape = (outputs, matrix.format.num_groups(inputs))
                infos[module + ".weight_zero_point"] = TensorInfo(
                    "f32", shape, 4 * math.prod(shape)
                )
        self.infos = infos

    def read(self, name: str) -> Tensor:
        """The tensor, decoded if the file stores it in packed words."""
        module, _, part = name.rpartition(".")
        matrix = self._matrices.get(module)
        if matrix is None or part not in ("weight", "weight_zero_point"):
            return self._files.read(name)
        outputs, inputs = matrix.shape
        if part == "weight_zero_point":
            return Tensor(unpack_zeros(self._files.read_array(name), outputs), "f32")
        kind: TensorDType = "int4" if matrix.format.dtype == "int4" else "int8"
        if matrix.layout == "int-quantized":
            return Tensor(self._files.read_array(name), kind)
        words = self._files.read_array(words_name(matrix))
        return Tensor(unpack_words(words, kind, inputs), kind)
