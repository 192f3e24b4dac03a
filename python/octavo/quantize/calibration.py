"""`octavo quantize --calibrate FILE`: what a text is taken for, and the windows taken from it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt

from octavo.errors import InvalidArgumentError, WeightsError
from octavo.files import read_text
from octavo.quantization.rounding import QuantizedMatrix
from octavo.text.tokenizer import Tokenizer
from octavo.weights.checkpoint import has_non_finite
from octavo.weights.model_files import ModelFiles
from octavo.weights.tensor import Tensor

Int32 = npt.NDArray[np.int32]

CALIBRATED_METHODS = ("gptq", "awq", "awq+gptq")


@dataclass(frozen=True)
class Calibration:
    """What a user asks for.

    text: a file in UTF-8, like what the model will be used on, and not what it will be judged by.
    method: "gptq", "awq" or both. windows: how many pieces of `window` tokens are taken from the
    text, drawn by `seed` without overlap; all that there are where the text has fewer.
    """

    text: Path
    method: str = "gptq"
    windows: int = 16
    window: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in CALIBRATED_METHODS:
            raise InvalidArgumentError(
                f"method is {self.method!r} with a calibration text; expected one of "
                f"{', '.join(CALIBRATED_METHODS)}, or no text"
            )
        if self.windows < 1:
            raise InvalidArgumentError(f"windows is {self.windows}; expected 1 or more")
        if self.window < 2:
            raise InvalidArgumentError(f"window is {self.window}; expected 2 tokens or more")
        if self.seed < 0:
            raise InvalidArgumentError(f"seed is {self.seed}; expected 0 or more")


@dataclass(frozen=True)
class CalibratedWeights:
    """What calibration made of a model.

    matrices: by octavo's name without ".weight". vectors: norm weights and biases that AWQ's
    factors went into, float32, by octavo's name. notes: what the user should know.
    """

    matrices: Mapping[str, QuantizedMatrix] = field(default_factory=dict)
    vectors: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_windows(calibration: Calibration, files: ModelFiles) -> tuple[Int32, list[str]]:
    """The tokens to calibrate on, int32 (windows, window), and what has to be said about them.

    Raises InvalidArgumentError where the text cannot be read, is empty, is not UTF-8, or is
    shorter than one window.
    """
    window, limit = calibration.window, files.spec.max_position_embeddings
    if window > limit:
        raise InvalidArgumentError(f"window is {window}; the model takes at most {limit} tokens")
    text = read_text(calibration.text, "a text in UTF-8")
    if not text.strip():
        raise InvalidArgumentError(
            f"{calibration.text} is empty; expected text like what the model will be used on"
        )
    tokens = np.array(Tokenizer(files.folder).encode(text), np.int32)
    if tokens.max() >= files.spec.vocab_size:
        raise InvalidArgumentError(
            f"the tokenizer of {files.path} gives token {tokens.max()}; config.json has a "
            f"vocabulary of {files.spec.vocab_size}"
        )
    pieces = len(tokens) // window
    if not pieces:
        raise InvalidArgumentError(
            f"{calibration.text} has {len(tokens)} tokens; expected at least one window of "
            f"{window}. Take a longer text"
            + (f", or a window of {len(tokens)} at most" if len(tokens) > 1 else "")
        )
    notes = []
    if hashlib.sha256(text.encode()).digest() == _evaluation_text():
        notes.append(
            "warning: this is the text that `octavo eval` scores by default; what it says of this "
            "model will be too good. Calibrate on another text, or give eval another one"
        )
    if pieces < calibration.windows:
        notes.append(f"{calibration.text}: {pieces} windows of {window} tokens, all that it has")
    generator = np.random.default_rng(calibration.seed)
    chosen = np.sort(generator.permutation(pieces)[: calibration.windows])
    return tokens[: pieces * window].reshape(pieces, window)[chosen], notes


def _evaluation_text() -> bytes:
    data = resources.files("octavo.eval").joinpath("text.txt").read_bytes()
    return hashlib.sha256(data).digest()


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise a WeightsError for a weight that holds a NaN or an infinity."""
    if has_non_finite(tensor):
        raise WeightsError(
            f"{name} holds a NaN or an infinity, which cannot be rounded. Fetch or convert the "
            "model again"
        )
