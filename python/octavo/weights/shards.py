"""A rank's part of the weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from octavo.models.shards import Shard, shard_formats
from octavo.reference.quantization import round_to_int8
from octavo.weights.checkpoint import Checkpoint
from octavo.weights.tensor import ITEM_SIZE, Tensor, TensorInfo, TensorSource


def shard_checkpoint(checkpoint: Checkpoint, shards: Mapping[str, Shard]) -> Checkpoint:
    """The checkpoint with those weights cut, by name as `octavo.models.shards.shards` gives them.

    What is rounded while it is loaded is rounded before it is cut, so that all ranks together have
    the weights of the whole model. Raises InvalidArgumentError where a group of inputs, which has
    one scale, would be cut in two.
    """
    source = _ShardSource(checkpoint, shards)
    stored = checkpoint.stored
    return Checkpoint(source, formats=source.formats, dtype=checkpoint.dtype, stored=stored)


@dataclass(frozen=True)
class _Part:
    """A tensor of the checkpoint, or start .. stop - 1 along an axis. is_rounded: to int8."""

    source: str
    axis: int | None = None
    start: int = 0
    stop: int = 0
    is_rounded: bool = False


class _ShardSource(TensorSource):
    """Tensors of a checkpoint, some of them cut, under its names."""

    def __init__(self, checkpoint: Checkpoint, shards: Mapping[str, Shard]) -> None:
        self._checkpoint = checkpoint
        self.formats = shard_formats(checkpoint.formats, shards)
        self._parts: dict[str, _Part] = {}
        self._latest: tuple[str, dict[str, Tensor]] | None = None
        for name in dict.fromkeys([*checkpoint, *shards]):  # a head that was tied comes last
            if name in shards:
                self._cut(name, shards[name])
            else:
                self._parts.setdefault(name, _Part(name))
        self.infos = {name: self._info(part, name) for name, part in self._parts.items()}

    def _cut(self, name: str, shard: Shard) -> None:
        source, axis, start, stop = shard
        base, _, kind = name.rpartition(".")
        source_base = source.removesuffix(".weight")
        format = self._checkpoint.formats.get(source_base)
        if format is None or kind != "weight":
            self._parts[name] = _Part(source, axis, start, stop)
            return
        is_float = self._checkpoint.infos[source].dtype in ITEM_SIZE
        # The scale of an output is that of all its inputs. (The core rounds what is not cut so.)
        is_rounded = is_float and axis == 1
        self._parts[name] = _Part(source, axis, start, stop, is_rounded)
        if is_rounded:
            self._parts[base + ".scale"] = _Part(source, is_rounded=True)
        for kind in ("scale", "zero"):
            of_groups = f"{source_base}.{kind}"
            if of_groups not in self._checkpoint:
                continue
            part = _Part(of_groups, axis, start, stop)
            if axis == 1:  # scales are of groups, or one of all inputs
                size = format.group_size
                groups = (axis, start // size, stop // size) if size else ()
                part = _Part(of_groups, *groups)
            self._parts[f"{base}.{kind}"] = part

    def _info(self, part: _Part, name: str) -> TensorInfo:
        whole = self._checkpoint.infos[part.source]
        shape, num_bytes = list(whole.shape), whole.num_bytes
        if name.endswith(".scale") and part.is_rounded:
            return TensorInfo("f32", (shape[0], 1), 4 * shape[0])
        if part.axis is not None:
            num_bytes = num_bytes * (part.stop - part.start) // shape[part.axis]
            shape[part.axis] = part.stop - part.start
        if part.is_rounded:
            return TensorInfo("int8", tuple(shape), shape[0] * shape[1])
        return TensorInfo(whole.dtype, tuple(shape), num_bytes)

    def read(self, name: str) -> Tensor:
        """The tensor, or the rank's part of it."""
        part = self._parts[name]
        if part.is_rounded:
            tensor = self._round(part.source)[name.rpartition(".")[2]]
            if name.endswith(".scale"):
                return tensor
        else:
            tensor = self._checkpoint[part.source]
        if part.axis is None:
            return tensor
        if part.axis == 0:
            return Tensor(tensor.data[part.start : part.stop], tensor.dtype)
        at_once = 2 if tensor.dtype == "int4" else 1  # codes a byte
        columns = tensor.data[:, part.start // at_once : part.stop // at_once]
        return Tensor(np.ascontiguousarray(columns), tensor.dtype)

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows of it; where it has rows of a weight, only those are read."""
        part = self._parts[name]
        if part.axis == 1 or part.is_rounded:
            return super().read_rows(name, first, last)
        return self._checkpoint.read_rows(part.source, part.start + first, part.start + last)

    def rows_at_once(self, name: str) -> int:
        """As many as of the whole weight; all of what is cut by columns."""
        part = self._parts[name]
        if part.axis == 1 or part.is_rounded:
            return super().rows_at_once(name)
        return self._checkpoint.rows_at_once(part.source)

    def _round(self, source: str) -> dict[str, Tensor]:
        """The codes and scales of a matrix; the latest one's are kept, since both are read."""
        if self._latest is None or self._latest[0] != source:
            codes, scales = round_to_int8(self._checkpoint[source].to_float32())
            self._latest = source, {"weight": Tensor(codes, "int8"), "scale": Tensor(scales, "f32")}
        return self._latest[1]
