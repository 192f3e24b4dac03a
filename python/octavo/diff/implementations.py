"""What `octavo diff` compares: implementations of the same model, behind one small interface."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from octavo.diff.measure import Float32
from octavo.quantization.plan import describe_dtypes
from octavo.reference.llama import KVCache, ReferenceModel

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class StepResult:
    """What an implementation computed for some tokens.

    logits: float32 (rows, vocab_size), a row for each token, or one row (the last token's).
    next_token: the greedy choice after the last token, by the implementation's own sampler.
    taps: name -> float32 (rows, width), empty if none were asked for.
    """

    logits: Float32
    next_token: int
    taps: Mapping[str, Float32] = field(default_factory=dict)


class Implementation(Protocol):
    """One way to run the model, over one sequence at a time.

    name: short, for column heads. description: what exactly runs. dtype: "f32" or "bf16".
    is_definition: its ops are the definition, so checking them by it would show nothing.
    bit_exact: it promises that prefill and step-by-step decode agree in every bit.
    op_files: where its ops are: "reference", "native" or "cuda" (op_sources.py lists those
        files), or, of code that is not octavo's, the files themselves.
    rounds_output: every op's result is rounded to bf16.
    """

    name: str
    description: str
    dtype: str
    is_definition: bool
    bit_exact: bool
    op_files: str
    rounds_output: bool

    def reset(self) -> None:
        """Forget the sequence; the next token fed is at position 0."""

    def feed(self, token_ids: Int32, *, taps: bool = False, all_logits: bool = True) -> StepResult:
        """Compute the sequence's next tokens, (rows,), on top of those fed before."""


@dataclass
class ReferenceImplementation:
    """The NumPy reference. description: empty takes the usual one."""

    model: ReferenceModel
    name: str = "reference"
    is_definition: bool = True
    description: str = ""
    cache: KVCache = field(default_factory=KVCache)
    op_files: str = "reference"
    bit_exact: bool = False  # NumPy's matrix product sums in another order for one row than many
    rounds_output: bool = False

    def __post_init__(self) -> None:
        self.dtype = self.model.dtype
        if not self.description:
            arithmetic = "float64" if self.model.compute is np.float64 else "float32"
            weights = describe_dtypes(self.model.formats, self.model.dtype)
            self.description = f"NumPy reference, {weights} weights, {arithmetic} arithmetic"

    def reset(self) -> None:
        self.cache = KVCache()

    def feed(self, token_ids: Int32, *, taps: bool = False, all_logits: bool = True) -> StepResult:
        recorded: dict[str, Float32] = {}
        rows = None if all_logits else [len(token_ids) - 1]
        logits = self.model.forward(
            token_ids, self.cache, recorded if taps else None, logit_rows=rows
        ).astype(np.float32)
        return StepResult(logits, int(logits[-1].argmax()), recorded)
