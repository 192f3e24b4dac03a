"""Drawing on the CUDA device beside the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
from cuda_helpers import DEVICE
from reference_helpers import same_bits

from octavo import _native_ops
from octavo.reference import sampling


def cuda(row_gap: int = 0) -> _native_ops.Ops:
    return _native_ops.Ops(DEVICE, dtype="bf16", row_gap=row_gap)


def requests(logits: np.ndarray, **parameters: Any) -> dict[str, Any]:
    """Arguments of `sample`: what is not given is the same for every row and changes nothing."""
    options = {"temperature": 1, "seed": 7, "position": 5, **parameters}
    return {"logits": logits, "rows": sampling.sampling_rows(len(logits), **options)}


def check(arguments: dict[str, Any], masks: np.ndarray | None = None) -> np.ndarray:
    expected = sampling.sample(**arguments, masks=masks)
    actual = cuda().sample(**arguments, masks=masks)[0]
    assert same_bits(actual, expected)
    return expected
