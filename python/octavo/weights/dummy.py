"""Seeded random weights from a configuration alone, for benchmarks (`--load-format dummy`).

They are made fast: one tile of random numbers is generated, and every tensor is a copy of it from
an offset that follows from the tensor's name, repeated as needed. So values of different tensors
and of distant rows are not independent. Benchmarks do not depend on that, but the quality of a
model must not be judged with such weights. The same seed gives the same weights on every machine:
raw bits of Philox4x64-10 (Salmon et al. 2011), taken as 16-bit integers, scaled in float32 and
rounded once to bf16.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import cached_property

import numpy as np
import numpy.typing as npt

from octavo.errors import InvalidArgumentError
from octavo.weights.tensor import Tensor, TensorInfo, TensorSource, float32_to_bf16

# A prime: rows of any usual width then start at different places of the tile.
TILE = 1_048_573
_BF16_ONE = 0x3F80


class DummySource(TensorSource):
    """A `TensorSource` in octavo's own names; every tensor is bf16.

    Matrices are uniform with variance 1 / width, so that activations and logits keep their scale;
    norm weights are 1 and biases 0.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        if not 0 <= seed < 2**64:
            raise InvalidArgumentError(f"seed is {seed}; expected an integer from 0 to 2^64 - 1")
        self._seed = seed
        self._tiles: dict[int, npt.NDArray[np.uint16]] = {}
        self.infos = {
            name: TensorInfo("bf16", shape, 2 * math.prod(shape)) for name, shape in shapes.items()
        }

    def read(self, name: str) -> Tensor:
        """The tensor, generated at each call."""
        shape = self.infos[name].shape
        if len(shape) == 1:
            value = _BF16_ONE if name.endswith(".weight") else 0
            return Tensor(np.full(shape, value, np.uint16), "bf16")
        tile = self._tile(shape[1])
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        offset = int.from_bytes(digest[:8], "little") % TILE
        values = np.empty(math.prod(shape), np.uint16)
        filled = 0
        while filled < values.size:
            run = tile[offset : offset + values.size - filled]
            values[filled : filled + run.size] = run
            filled += run.size
            offset = 0
        return Tensor(values.reshape(shape), "bf16")

    def _tile(self, width: int) -> npt.NDArray[np.uint16]:
        """TILE numbers, uniform within +-sqrt(3 / width), as bf16 bits."""
        if width not in self._tiles:
            steps = np.arange(65536, dtype=np.float32)
            centred = steps * np.float32(2.0 / 65535.0) - np.float32(1.0)
            values = float32_to_bf16(centred * np.float32(math.sqrt(3.0 / width)))
            self._tiles[width] = values[self._steps]
        return self._tiles[width]

    @cached_property
    def _steps(self) -> npt.NDArray[np.uint16]:
        """TILE random numbers of 16 bits."""
        raw = np.random.Philox(key=self._seed).random_raw(TILE // 4 + 1)
        return raw.astype("<u8").view("<u2")[:TILE]
