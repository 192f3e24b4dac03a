"""What `octavo quantize` does, in order: measure importance and sensitivity, spend bits, write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.config import EngineConfig, Environment
from octavo.errors import InvalidArgumentError
from octavo.eval.evaluation import EvalRequest, read_tokens
from octavo.progress import StageProgress
from octavo.quantization.plan import Scheme
from octavo.quantize.calibrate import calibrate
from octavo.quantize.calibration import Calibration
from octavo.quantize.importance import measure_importance
from octavo.quantize.sensitivity import (
    Sensitivity,
    check_bits,
    measure_sensitivity,
    scheme_bits,
    spend_bits,
)
from octavo.quantize.writer import (
    Calibrate,
    QuantizedDirectory,
    check_new_directory,
    open_float_model,
    quantize_directory,
)
from octavo.weights.hub import resolve_model
from octavo.weights.model_files import ModelFiles

_RANDOM_TOKENS = 1 << 15  # more than anybody will wait for


@dataclass(frozen=True)
class QuantizeRequest:
    """What to do with a model.

    out: the new directory, or None to measure only. sensitivity: measure what each part costs.
    bits_per_weight: give int8 to the parts that gain the most by it, to at most so many bits (this
        measures too). text: what to measure on, a file in UTF-8, or None for random tokens.
    max_windows: how many windows of 512 tokens to measure on.
    calibration: a text by which the weights are rounded, or None to round each by itself.
    """

    model: str | None
    out: Path | None
    scheme: Scheme
    sensitivity: bool = False
    bits_per_weight: float | None = None
    text: Path | None = None
    max_windows: int = 2
    calibration: Calibration | None = None


@dataclass(frozen=True)
class QuantizeResult:
    """What came of it. chosen: the matrices that took int8 for the bits that were granted."""

    directory: QuantizedDirectory | None
    sensitivity: Sensitivity | None
    chosen: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        facts: dict[str, Any] = {}
        if self.directory is not None:
            facts = {
                "path": str(self.directory.path),
                "num_bytes": self.directory.num_bytes,
                "source_bytes": self.directory.source_bytes,
                "bits_per_weight": self.directory.bits_per_weight,
                "notes": list(self.directory.notes),
            }
        if self.sensitivity is not None:
            facts |= {"sensitivity": self.sensitivity.to_json(), "int8": list(self.chosen)}
        return facts


def quantize_model(
    request: QuantizeRequest, environment: Environment, progress: StageProgress = lambda *_: None
) -> QuantizeResult:
    """Measure and write as the request says.

    Raises what `measure_sensitivity`, `spend_bits` and `quantize_directory` raise, and
    InvalidArgumentError for sensitivity of int8, which has nothing to choose between.
    """
    if request.out is not None:
        check_new_directory(request.out)  # before the minutes of work
    source = resolve_model(request.model, environment)
    files, checkpoint = open_float_model(source)
    scheme = request.scheme
    measures = request.sensitivity or request.bits_per_weight is not None
    if measures and not scheme.has_groups:
        raise InvalidArgumentError(
            f"sensitivity of {scheme.name}; expected --scheme int4 or int4-nonuniform: it says "
            "which matrices had better take int8"
        )
    if request.bits_per_weight is not None:  # before the minutes of measuring
        check_bits(scheme_bits(files.spec, scheme), scheme, request.bits_per_weight)
    importance: Mapping[str, npt.NDArray[np.float32]] | None = None
    is_used = scheme.has_groups and (measures or request.calibration is None)
    if scheme.method == "weighted" and is_used:
        importance = measure_importance(files, checkpoint, progress)
    found: Sensitivity | None = None
    if measures:
        found = measure_sensitivity(
            files,
            checkpoint,
            scheme,
            _tokens(request, files),
            environment,
            importance,
            request.max_windows,
            progress,
        )
    chosen: tuple[str, ...] = ()
    if found is not None and request.bits_per_weight is not None:
        scheme = spend_bits(found, scheme, request.bits_per_weight)
        chosen = scheme.int8[len(request.scheme.int8) :]
    written = None
    if request.out is not None:
        work: Calibrate | None = None
        if request.calibration is not None:
            work = partial(calibrate, calibration=request.calibration, progress=progress)
        written = quantize_directory(source, request.out, scheme, progress, importance, work)
    return QuantizeResult(written, found, chosen)


def _tokens(request: QuantizeRequest, files: ModelFiles) -> npt.NDArray[np.int32]:
    """The text to measure on, or random tokens."""
    random = _RANDOM_TOKENS if request.text is None else None
    wanted = EvalRequest(request.model, EngineConfig(), text=request.text, random=random)
    return read_tokens(wanted, files, None).tokens
