"""What a checkpoint reads from: named tensors with known shapes, one at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from octavo.weights.tensor import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """What a header tells of a tensor before any of its data is read."""

    dtype: str  # "f32", "f16" and "bf16" can be loaded; any other name is for messages
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


class TensorSource(Protocol):
    """Tensors under the names of the checkpoint."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> Tensor:
        """The tensor; KeyError for a name that is not in `infos`."""
