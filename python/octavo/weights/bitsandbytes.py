"""Checkpoints of bitsandbytes (Dettmers et al. 2022 and 2023): NF4, FP4 and LLM.int8().

Of a matrix M of (outputs, inputs) in 4 bits:

    M.weight                                two codes a byte, the first in the high half, row after
                                            row; (bytes, 1), or as many bytes of another type
    M.weight.quant_map                      float32 (16,): the numbers that the codes stand for
    M.weight.absmax                         float32 (blocks,): the factor of each 64 weights
    M.weight.quant_state.bitsandbytes__nf4  the bytes of a JSON object: blocksize, shape and so on

A weight is quant_map[code] * absmax[block]. With double quantization, absmax holds bytes b instead,
and a factor is nested_quant_map[b] * nested_absmax[block of 256 factors] + nested_offset. The 16
numbers are no whole ones, so no kernel of octavo multiplies the codes: the weights become bfloat16.

Of a matrix in 8 bits: M.weight int8 (outputs, inputs) and M.SCB float32 (outputs,); a weight is
code * SCB / 127, which is octavo's int8. The library multiplies outliers of the activations in
float16 and rounds the others to 8 bits; octavo rounds all of them to 16.

Sources: bitsandbytes 0.50.2, bitsandbytes/functional.py (`QuantState`, `dequantize_4bit`) and
bitsandbytes/backends/default/ops.py; transformers 5.24, quantizers/quantizer_bnb_4bit.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.models.fields import Fields
from octavo.models.spec import WeightFormat
from octavo.weights.safetensors import ELEMENT_BITS, SafetensorsFile
from octavo.weights.stored import (
    CONVERTED,
    Entry,
    Infos,
    StoredMatrix,
    contents_error,
    convert_rows,
)
from octavo.weights.tensor import ITEM_SIZE, Tensor

Float32 = npt.NDArray[np.float32]
_KINDS = ("nf4", "fp4")
_STORAGE = ("U8", "I8", "f16", "bf16", "f32")
_MOST_STATE_BYTES = 1 << 16
_BYTE = np.float32(1 / 127)


@dataclass(frozen=True)
class FourBitMatrix(StoredMatrix):
    """A matrix in NF4 or FP4. blocksize, nested_*: of the quant_state, known once it is settled."""

    kind: str = "nf4"
    blocksize: int = 64
    nested_blocksize: int = 0
    nested_offset: float = 0.0

    @property
    def label(self) -> str:
        """As `StoredMatrix.label`."""
        return f"bitsandbytes {self.kind.upper()}"

    @property
    def codes_names(self) -> tuple[str, ...]:
        """As `StoredMatrix.codes_names`: packed codes may have a type of floats."""
        return tuple(self._name(f"quant_state.bitsandbytes__{kind}") for kind in _KINDS)

    def _name(self, part: str) -> str:
        return f"{self.module}.weight.{part}"

    def _state_name(self, infos: Infos) -> str:
        wanted = self._name(f"quant_state.bitsandbytes__{self.kind}")
        return next((name for name in (wanted, *self.codes_names) if name in infos), wanted)

    def entries(self, infos: Infos) -> dict[str, Entry]:
        """As `StoredMatrix.entries`."""
        outputs, inputs = self.shape
        num_bytes = -(-outputs * inputs // 2)
        name = self.module + ".weight"
        stored = infos[name].dtype if name in infos else "U8"
        item = ELEMENT_BITS.get(stored.upper(), 8) // 8
        found = {
            name: Entry(_STORAGE, ((-(-num_bytes // item), 1),)),
            self._name("quant_map"): Entry(("f32",), ((16,),)),
            self._state_name(infos): Entry(("U8",)),
        }
        absmax = self._name("absmax")
        if absmax not in infos or infos[absmax].dtype != "U8":
            return {**found, absmax: Entry(("f32",))}
        return {
            **found,
            absmax: Entry(("U8",)),
            self._name("nested_absmax"): Entry(("f32",)),
            self._name("nested_quant_map"): Entry(("f32",), ((256,),)),
        }

    def settled(self, files: SafetensorsFile) -> FourBitMatrix:
        """As `StoredMatrix.settled`: reads the quant_state and checks all sizes that it implies."""
        name = self._state_name(files.infos)
        state = _read_state(files, name)
        fields = Fields(state, name)
        kind = state.get("quant_type")
        if kind not in _KINDS:
            raise contents_error(name, f"quant_type {kind!r}", "'nf4' or 'fp4'")
        if state.get("shape") != list(self.shape):
            raise contents_error(name, f"shape {state.get('shape')!r:.80}", str(list(self.shape)))
        absmax = files.infos[self._name("absmax")]
        matrix = replace(self, kind=kind, blocksize=fields.integer("blocksize", 2, 2**20))
        expected = {self._name("absmax"): -(-math.prod(self.shape) // matrix.blocksize)}
        if absmax.dtype == "U8":
            nested = fields.integer("nested_blocksize", 1, 2**20)
            offset = fields.number("nested_offset", -3e38, 3e38)
            matrix = replace(matrix, nested_blocksize=nested, nested_offset=offset)
            expected[self._name("nested_absmax")] = -(-expected[self._name("absmax")] // nested)
        for each, count in expected.items():
            if files.infos[each].num_elements != count:
                raise contents_error(each, f"{files.infos[each].num_elements} numbers", str(count))
        return matrix

    def weight(self, files: SafetensorsFile, first: int, last: int) -> Tensor:
        """As `StoredMatrix.weight`."""
        width = self.shape[1]
        numbers = files.read(self._name("quant_map")).to_float32()
        pairs = np.stack([np.repeat(numbers, 16), np.tile(numbers, 16)], axis=1)
        of_byte = pairs.view(np.int64)[:, 0]  # two float32 numbers each
        codes, absmax = files.read_bytes(self.module + ".weight"), self._factors(files)

        def decode(row: int, end: int) -> Float32:
            # Bytes and blocks run on from one row to the next.
            begin, past = row * width, end * width
            values = np.take(of_byte, codes[begin // 2 : -(-past // 2)]).view(np.float32)
            block = begin // self.blocksize
            factors = np.repeat(absmax[block : -(-past // self.blocksize)], self.blocksize)
            factors = factors[begin - block * self.blocksize :]
            count = past - begin
            decoded: Float32 = values[begin % 2 :][:count] * factors[:count]
            return decoded.reshape(end - row, width)

        return convert_rows(first, last, width, decode)

    def _factors(self, files: SafetensorsFile) -> Float32:
        """The factor of each block."""
        name = self._name("absmax")
        if files.infos[name].dtype != "U8":
            return files.read(name).to_float32().reshape(-1)
        codes = files.read_array(name).reshape(-1)
        numbers = files.read(self._name("nested_quant_map")).to_float32()
        outer = files.read(self._name("nested_absmax")).to_float32().reshape(-1)
        places = np.arange(len(codes)) // self.nested_blocksize
        factors: Float32 = numbers[codes] * outer[places] + np.float32(self.nested_offset)
        return factors


def _read_state(files: SafetensorsFile, name: str) -> dict[str, Any]:
    """The JSON object in a tensor of bytes."""
    raw = files.read_bytes(name)
    if len(raw) > _MOST_STATE_BYTES:
        raise contents_error(name, f"{len(raw)} bytes", "a small JSON object")
    try:
        state = json.loads(raw.tobytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise contents_error(name, f"no JSON ({error})", "a JSON object") from error
    if not isinstance(state, dict):
        raise contents_error(name, "something else", "a JSON object")
    return state


@dataclass(frozen=True)
class EightBitMatrix(StoredMatrix):
    """A matrix of LLM.int8()."""

    @property
    def label(self) -> str:
        """As `StoredMatrix.label`."""
        return "bitsandbytes LLM.int8()"

    @property
    def codes_names(self) -> tuple[str, ...]:
        """As `StoredMatrix.codes_names`."""
        return (self.module + ".SCB",)

    def entries(self, infos: Infos) -> dict[str, Entry]:
        """As `StoredMatrix.entries`."""
        return {
            self.module + ".weight": Entry(("I8",), (self.shape,)),
            self.module + ".SCB": Entry(tuple(ITEM_SIZE), ((self.shape[0],),)),
            self.module + ".weight_format": Entry(("U8",), optional=True),
        }

    def settled(self, files: SafetensorsFile) -> EightBitMatrix:
        """As `StoredMatrix.settled`: the codes lie row by row, in no other order."""
        name = self.module + ".weight_format"
        if name in files.infos and np.any(files.read_bytes(name)):
            raise contents_error(name, "another order of the codes", "0, row by row")
        return self

    def weight(self, files: SafetensorsFile, first: int, last: int) -> Tensor:
        """As `StoredMatrix.weight`."""
        return Tensor(files.read_array(self.module + ".weight")[first:last], "int8")

    def scales(self, files: SafetensorsFile, first: int, last: int) -> Tensor:
        """As `StoredMatrix.scales`."""
        scales = files.read(self.module + ".SCB").to_float32()[first:last, None]
        return Tensor(scales * _BYTE, "f32")


def read_bitsandbytes(
    fields: Fields, module: str, shape: tuple[int, int]
) -> FourBitMatrix | EightBitMatrix:
    """The matrix as the configuration says; UnsupportedModelError if it names no bits."""
    four = fields.boolean("load_in_4bit", fields.boolean("_load_in_4bit", False))
    eight = fields.boolean("load_in_8bit", fields.boolean("_load_in_8bit", False))
    if four == eight:
        raise fields.error("load_in_4bit", four, "true, or load_in_8bit true, and not both")
    if eight:
        return EightBitMatrix(module, shape, WeightFormat("int8"))
    kind = fields.values.get("bnb_4bit_quant_type", "fp4")
    if kind not in _KINDS:
        raise fields.error("bnb_4bit_quant_type", kind, "'nf4' or 'fp4'")
    return FourBitMatrix(module, shape, CONVERTED, kind=kind)
