"""How an embedding model makes one vector of a text's hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from octavo.errors import InvalidArgumentError

PoolingKind = Literal["last", "mean", "first"]

_TEXTS: dict[PoolingKind, str] = {
    "last": "the state of the last token",
    "mean": "the mean of all tokens' states",
    "first": "the state of the first token",
}


@dataclass(frozen=True)
class Pooling:
    """From the hidden states behind the final norm, (tokens, dimensions), to a text's vector.

    kind: the state of the last token, of the first, or the mean of all. normalize: the vector is
    divided by its length. dimensions: of the vector, the model's hidden size. max_tokens: the
    longest text that the model's authors take; None: as long as the model's positions reach.
    """

    dimensions: int
    kind: PoolingKind = "last"
    normalize: bool = True
    max_tokens: int | None = None

    def check_dimensions(self, wanted: int | None) -> None:
        """InvalidArgumentError for a number of dimensions that the vectors do not have."""
        is_number = isinstance(wanted, int) and not isinstance(wanted, bool)
        if wanted is not None and not (is_number and 1 <= wanted <= self.dimensions):
            raise InvalidArgumentError(
                f"dimensions is {wanted!r}; expected 1 to {self.dimensions}, the model's hidden "
                "size, or none for all"
            )

    def __str__(self) -> str:
        end = ", of length 1" if self.normalize else ""
        return f"{_TEXTS[self.kind]}, {self.dimensions:,} numbers{end}"
