"""Drawing on the CUDA device beside the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
from cuda_helpers import DEVICE
from reference_helpers import same_bits

from octavo import _native
from octavo.reference import sampling


def cuda(row_gap: int = 0) -> _native.Ops:
    return _native.Ops(DEVICE, dtype="bf16", row_gap=row_gap)


def requests(logits: np.ndarray, **parameters: Any) -> dict[str, Any]:
    """Arguments of `sample`: what is not given is the same for every row and changes nothing."""
    rows = len(logits)
    defaults = {
        "temperature": (np.float32, 1),
        "top_k": (np.int32, 0),
        "top_p": (np.float32, 1),
        "min_p": (np.float32, 0),
        "seed": (np.uint64, 7),
        "sample_index": (np.int32, 0),
        "positions": (np.int32, 5),
    }
    filled = {
        name: np.broadcast_to(np.asarray(parameters.get(name, value), dtype), rows).copy()
        for name, (dtype, value) in defaults.items()
    }
    return {"logits": logits, **filled}


def check(arguments: dict[str, Any], masks: np.ndarray | None = None) -> np.ndarray:
    expected = sampling.sample(**arguments, masks=masks)
    actual = cuda().sample(**arguments, masks=masks)
    assert same_bits(actual, expected)
    return expected
