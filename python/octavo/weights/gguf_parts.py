"""A model in one GGUF file or in several, as llama.cpp's gguf-split writes them.

Each part is a GGUF file, named NAME-0000K-of-0000N.gguf. Its metadata has the number of the part
(split.no, from 0), the number of parts (split.count) and of tensors in all of them
(split.tensors.count). The model's own metadata is in the first part.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from octavo.errors import ModelNotFoundError, WeightsError
from octavo.models.fields import Fields, describe
from octavo.weights.gguf import PLAIN_KINDS, GgufFile, GgufTensor
from octavo.weights.tensor import (
    ITEM_SIZE,
    Tensor,
    TensorDType,
    TensorInfo,
    TensorSource,
    float32_to_bf16,
)

OutputDType = Literal["codes", "auto", "f32", "bf16"]

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
_MAX_PARTS = 99_999  # what five digits hold


class GgufParts(TensorSource):
    """All parts of a GGUF model (usually one), read as one file.

    path: of the first part. paths: of all. metadata: of the first part. tensors: of all parts.
    """

    def __init__(self, path: Path, dtype: OutputDType = "auto") -> None:
        """path: any of the parts. dtype: of the tensors that are read.

        "auto" keeps F32, F16 and BF16 as they are and rounds decoded block formats to bf16 (to
        nearest, so each weight by at most one part in 512); so does "codes", which is for what is
        read as floats. "f32" keeps the decoded values exactly.
        Raises WeightsError for parts that are missing, damaged, or not of one model.
        """
        given = GgufFile(path)
        count = _number(given, "split.count", _MAX_PARTS)
        self.paths = [path] if count <= 1 else _find_parts(given, count)
        files = [given if part == path else GgufFile(part) for part in self.paths]
        self.path = self.paths[0]
        self.metadata: Mapping[str, Any] = files[0].metadata
        self._files: dict[str, GgufFile] = {}
        problems = []
        for number, file in enumerate(files):
            stated = (_number(file, "split.no", _MAX_PARTS), _number(file, "split.count"))
            if count > 1 and stated != (number, count):
                problems.append(
                    f"{file.path.name} says that it is part {stated[0] + 1} of {stated[1]}; "
                    f"expected part {number + 1} of {count}, as its name has it"
                )
            twice = [name for name in file.tensors if name in self._files]
            problems += [f"{describe(name)} is in {file.path.name} and before" for name in twice]
            self._files.update(dict.fromkeys(file.tensors, file))
        total = _number(given, "split.tensors.count")
        if count > 1 and not problems and total not in (0, len(self._files)):
            problems.append(f"split.tensors.count is {total}; they hold {len(self._files)} tensors")
        if problems:
            raise WeightsError(f"The parts of {self.path} do not fit each other:", problems)

        self.tensors: Mapping[str, GgufTensor] = {
            name: file.tensors[name] for name, file in self._files.items()
        }
        self.infos = {}
        for name, tensor in self.tensors.items():
            plain = PLAIN_KINDS.get(tensor.kind)
            kind: TensorDType = plain[0] if plain else "bf16"
            if dtype == "f32" or dtype == "bf16":
                kind = dtype
            size = ITEM_SIZE[kind] * math.prod(tensor.shape)
            self.infos[name] = TensorInfo(kind, tensor.shape, size)

    def exact(self, name: str) -> Tensor:
        """A small tensor with all its bits, for any `dtype`."""
        return self._files[name].decode(name)

    def read(self, name: str) -> Tensor:
        """A whole tensor, decoded and rounded."""
        return self._rounded(name, self._files[name].decode(name))

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first to last - 1, decoded and rounded."""
        if len(self.infos[name].shape) < 2:  # the blocks of a vector have no rows
            return super().read_rows(name, first, last)
        return self._rounded(name, self._files[name].decode(name, first, last))

    def rows_at_once(self, name: str) -> int:
        """All rows of a tensor that is a view; else as many as `GgufFile` says."""
        info, plain = self.infos[name], PLAIN_KINDS.get(self.tensors[name].kind)
        if len(info.shape) < 2 or (plain is not None and plain[0] == info.dtype):
            return super().rows_at_once(name)
        return self._files[name].rows_at_once(name)

    def read_bytes(
        self, name: str, first: int = 0, last: int | None = None
    ) -> npt.NDArray[np.uint8]:
        """As `GgufFile.read_bytes`."""
        return self._files[name].read_bytes(name, first, last)

    def _rounded(self, name: str, tensor: Tensor) -> Tensor:
        """The values in the type that `infos` announces."""
        dtype = self.infos[name].dtype
        if tensor.dtype == dtype:
            return tensor
        values = tensor.to_float32()
        return Tensor(values, "f32") if dtype == "f32" else Tensor(float32_to_bf16(values), "bf16")


def is_gguf(path: Path) -> bool:
    """Whether a file is named, or begins, like a GGUF file."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def find_gguf(path: Path) -> Path | None:
    """The GGUF file `path`, or the only GGUF model of a directory without config.json; else None.

    Raises ModelNotFoundError for a directory without config.json that holds several GGUF models.
    """
    if is_gguf(path):
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = {
        model_name(entry): entry
        for entry in sorted(path.iterdir(), reverse=True)
        if entry.suffix.lower() == ".gguf" and entry.is_file()
    }
    if len(found) > 1:
        raise ModelNotFoundError(
            f"{path} holds several GGUF models; name one: "
            + ", ".join(str(entry) for entry in sorted(found.values()))
        )
    return next(iter(found.values()), None)


def model_name(path: Path) -> str:
    """The name of a GGUF file without its ending and the number of the part."""
    match = _PART.fullmatch(path.name)
    return match[1] if match else path.stem


def _find_parts(given: GgufFile, count: int) -> list[Path]:
    """The files of all parts, in order, found by the name of one of them."""
    match = _PART.fullmatch(given.path.name)
    if match is None or int(match[3]) != count:
        number = _number(given, "split.no", _MAX_PARTS) + 1
        raise WeightsError(
            f"{given.path} is part {number} of {count} of a model, and the others are found by "
            f"its name: call it NAME-{number:05}-of-{count:05}.gguf, beside the others"
        )
    names = [f"{match[1]}-{k:05}-of-{count:05}{match[4]}" for k in range(1, count + 1)]
    missing = [name for name in names if not given.path.with_name(name).is_file()]
    if missing:
        raise WeightsError(
            f"{given.path} is one of {count} parts of a model; these are missing beside it:",
            missing,
        )
    return [given.path.with_name(name) for name in names]


def _number(file: GgufFile, name: str, high: int = 2**31 - 1) -> int:
    """A whole number of the metadata; 0 where there is none."""
    return Fields(file.metadata, str(file.path)).optional_integer(name, 0, high) or 0
