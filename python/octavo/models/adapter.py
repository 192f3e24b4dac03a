"""A LoRA adapter in numbers (Hu et al. 2021, arXiv 2106.09685): what it adds to which product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class LowRank:
    """What is added to the product W x of one matrix W (outputs, inputs): scale * B (A x).

    a: (rank, inputs). b: (outputs, rank). Parts of a fused matrix share one `a`. Of the embedding
    table (tokens, hidden), which is read by rows, x is the row of a one: the row of token t gets
    scale * B A[:, t], so a is (rank, tokens) and b is (hidden, rank).
    """

    a: Float32
    b: Float32
    scale: float

    @property
    def scaled_b(self) -> Float32:
        """scale * B, in float32."""
        scaled: Float32 = np.float32(self.scale) * self.b
        return scaled

    @property
    def rank(self) -> int:
        """How many numbers lie between the two products."""
        return int(self.a.shape[0])


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter: by the name of octavo's matrix ("layers.3.q"), what it adds.

    "embed" is the table that tokens are read from, "lm_head" the matrix of the logits, also where a
    model ties the two: an adapter of one leaves the other as it is.
    source: where it was read from, for messages.
    """

    source: str
    matrices: Mapping[str, LowRank]

    @property
    def rank(self) -> int:
        """The largest rank of its matrices."""
        return max(part.rank for part in self.matrices.values())

    def native(self) -> dict[str, tuple[Float32, Float32]]:
        """As the native core takes it: by matrix, A and scale * B."""
        return {name: (part.a, part.scaled_b) for name, part in self.matrices.items()}

    @property
    def num_parameters(self) -> int:
        """How many numbers it has, those shared by fused matrices counted once."""
        arrays = {id(array): array.size for p in self.matrices.values() for array in (p.a, p.b)}
        return sum(arrays.values())
