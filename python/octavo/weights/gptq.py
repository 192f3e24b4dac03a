"""Checkpoints of GPTQ (Frantar et al. 2023), as AutoGPTQ and GPTQModel write them.

Of a matrix M of (outputs, inputs), with 4 or 8 bits:

    M.qweight  int32 (inputs * bits / 32, outputs)   8 or 4 inputs in a word, the first lowest
    M.qzeros   int32 (groups, outputs * bits / 32)   8 or 4 outputs in a word, the first lowest
    M.scales   float (groups, outputs)
    M.g_idx    int32 (inputs,)                       the group of each input

A weight is (code - zero) * scale. "gptq", the first format, stores zero - 1, "gptq_v2" zero. The 1
was subtracted from each word as a whole, so it is added to the whole word: a zero point of 0 has
borrowed from its neighbour. With act-order (`desc_act`) the inputs of a group are scattered.
Sources: auto_gptq 0.7.1, auto_gptq/nn_modules/qlinear/qlinear_cuda.py; GPTQModel,
gptqmodel/utils/model.py (`convert_gptq_v1_to_v2_format_module`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.models.fields import Fields
from octavo.weights.awq import read_group_size
from octavo.weights.grouped import Bytes, Float32, GroupedMatrix, nibbles
from octavo.weights.safetensors import SafetensorsFile
from octavo.weights.stored import CONVERTED, FLOATS, Entry, Infos

_ONES = {4: 0x11111111, 8: 0x01010101}  # 1 in every field of a word
_MIDDLES = {4: 0x88888888, 8: 0x80808080}


@dataclass(frozen=True)
class GptqMatrix(GroupedMatrix):
    """A matrix of GPTQ. stores_zero: "gptq_v2", the zero point itself; act_order: desc_act."""

    stores_zero: bool = False
    act_order: bool = False

    @property
    def label(self) -> str:
        """As `StoredMatrix.label`."""
        order = ", act-order" if self.act_order else ""
        return f"GPTQ, {self.bits} bits, {self.grouping}{order}"

    @property
    def scale_name(self) -> str:
        """As `GroupedMatrix.scale_name`."""
        return self.module + ".scales"

    @property
    def order_name(self) -> str:
        """As `GroupedMatrix.order_name`; it is there without act-order too, and says nothing."""
        return self.module + ".g_idx"

    @property
    def codes_names(self) -> tuple[str, ...]:
        """As `StoredMatrix.codes_names`."""
        return (self.module + ".qweight",)

    def entries(self, infos: Infos) -> dict[str, Entry]:
        """As `StoredMatrix.entries`."""
        outputs, inputs = self.shape
        in_word = 32 // self.bits
        return {
            self.module + ".qweight": Entry(("I32",), ((inputs // in_word, outputs),)),
            self.module + ".qzeros": Entry(("I32",), ((self.num_groups, outputs // in_word),)),
            self.scale_name: Entry(FLOATS, ((self.num_groups, outputs),)),
            self.order_name: Entry(("I32", "I64"), ((inputs,),), optional=not self.act_order),
        }

    def has_zero_points(self, files: SafetensorsFile) -> bool:
        """As `GroupedMatrix.has_zero_points`."""
        return bool(np.any(self._zero_words(files) != _MIDDLES[self.bits]))

    def _zero_words(self, files: SafetensorsFile) -> npt.NDArray[np.uint32]:
        words: npt.NDArray[np.uint32] = files.read_array(self.module + ".qzeros").view(np.uint32)
        return words if self.stores_zero else words + np.uint32(_ONES[self.bits])

    def packed(self, files: SafetensorsFile, first: int, last: int) -> Bytes:
        """As `GroupedMatrix.packed`: a column of words is a row of octavo's bytes."""
        words = files.read_array(self.module + ".qweight")[:, first:last]
        return np.ascontiguousarray(words.T).view(np.uint8)

    def stored_scales(self, files: SafetensorsFile, first: int, last: int) -> npt.NDArray[Any]:
        """As `GroupedMatrix.stored_scales`."""
        scales: npt.NDArray[Any] = files.read_array(self.scale_name)
        of_rows: npt.NDArray[Any] = scales[:, first:last].T
        return of_rows

    def stored_zeros(self, files: SafetensorsFile, first: int, last: int) -> Float32:
        """As `GroupedMatrix.stored_zeros`."""
        words = self._zero_words(files)
        fields = nibbles(words) if self.bits == 4 else np.ascontiguousarray(words).view(np.uint8)
        middle = np.float32(1 << (self.bits - 1))
        zeros: Float32 = fields[:, first:last].T.astype(np.float32) - middle
        return zeros


def read_gptq(fields: Fields, module: str, shape: tuple[int, int]) -> GptqMatrix | None:
    """The matrix as the configuration says; None for a module that was left out.

    Raises UnsupportedModelError with the field that octavo does not read.
    """
    values: Mapping[str, Any] = fields.values
    changes = _changes(fields, module)
    if changes is None:
        return None
    fields = Fields({**values, **changes}, fields.source)
    name = "checkpoint_format" if values.get("checkpoint_format") is not None else "format"
    stored_as = values.get(name) or "gptq"
    if stored_as not in ("gptq", "gptq_v2"):
        raise fields.error(name, stored_as, "'gptq' or 'gptq_v2' (GPTQModel converts others)")
    fields.refuse_unless("is_marlin_format", (False,), "false (GPTQModel converts it to 'gptq')")
    fields.refuse_unless("pack_dtype", ("int32",), "'int32'")
    bits = fields.integer("bits", 1, 16)
    if bits not in (4, 8):
        raise fields.error("bits", bits, "4 or 8")
    outputs, inputs = shape
    if outputs % (32 // bits) or inputs % (32 // bits):
        has = f"{module} has {inputs} inputs and {outputs} outputs"
        raise fields.error("bits", bits, f"matrices of whole words of {32 // bits} numbers; {has}")
    size = read_group_size(fields, "group_size", shape)
    act_order = fields.boolean("desc_act", False)
    matrix = GptqMatrix(
        module,
        shape,
        CONVERTED,
        bits=bits,
        group_size=size,
        stores_zero=stored_as == "gptq_v2",
        act_order=act_order and size < inputs,
    )
    if matrix.act_order and not fields.boolean("static_groups", False):
        return matrix  # unless its g_idx says otherwise
    has_zeros = not fields.boolean("sym", True)
    format = matrix.running_format(has_zeros, matrix.groups())
    return GptqMatrix(**{**vars(matrix), "format": format})


def _changes(fields: Fields, module: str) -> Mapping[str, Any] | None:
    """What `dynamic` of GPTQModel changes for a module; None where the module is not quantized.

    Its keys are patterns, "-:" before those of modules that are left out, "+:" or nothing before
    those of modules whose fields are given. `modules_in_block_to_quantize` lists what is quantized.
    """
    dynamic = fields.values.get("dynamic")
    if dynamic is not None and not isinstance(dynamic, dict):
        raise fields.error("dynamic", dynamic, "an object of patterns, or null")
    for pattern, changes in (dynamic or {}).items():
        try:
            matches = re.match(pattern.removeprefix("-:").removeprefix("+:"), module)
        except re.error as error:
            raise fields.error("dynamic", pattern, f"regular expressions ({error})") from error
        if not matches:
            continue
        if pattern.startswith("-:"):
            return None
        if not isinstance(changes, dict):
            raise fields.error("dynamic", changes, "an object for each pattern")
        return changes
    listed = fields.values.get("modules_in_block_to_quantize")
    if listed is not None:
        if not isinstance(listed, list):
            raise fields.error("modules_in_block_to_quantize", listed, "a list of lists of names")
        names = [
            name for entry in listed for name in (entry if isinstance(entry, list) else [entry])
        ]
        if not all(isinstance(name, str) for name in names):
            raise fields.error("modules_in_block_to_quantize", listed, "a list of lists of names")
        return {} if any(module.endswith("." + name) for name in names) else None
    return {}
