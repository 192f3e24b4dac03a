"""The device that CUDA tests run on: the emulator, or a GPU where one is named."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from reference_helpers import Float32

from octavo import _native
from octavo.machine import open_packaged_libraries
from octavo.reference import ops

# A GPU machine sets this to "cuda" and runs the very same tests on the hardware.
DEVICE = os.environ.get("OCTAVO_TEST_CUDA_DEVICE", "cuda_emulated")

if DEVICE == "cuda":
    open_packaged_libraries()  # as loading a model does
has_cuda = (
    bool(_native.build_info()["cuda_emulated"])
    if DEVICE == "cuda_emulated"
    else DEVICE in _native.available_devices()
)

needs_cuda = pytest.mark.skipif(
    not has_cuda,
    reason=f"this build has no device {DEVICE}: the CUDA headers were not found when it was built"
    if DEVICE == "cuda_emulated"
    else f"this machine has no device {DEVICE}",
)


def emulated(code: str, setting: str, value: int) -> str:
    """What Python code prints where the emulator has another setting, or its error."""
    environment = {**os.environ, f"CUDA_EMULATOR_{setting}": str(value)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    return run.stdout or run.stderr


def rounded(x: np.ndarray, dtype: str) -> Float32:
    """x as activations, weights or a cache of this dtype keep it."""
    if dtype == "f16":
        return x.astype(np.float16).astype(np.float32)
    return np.asarray(ops.to_cache(x, dtype), np.float32)
