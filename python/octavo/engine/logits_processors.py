"""A user's own functions that change the logits of an answer, before anything else does.

The core computes the logits of a step, Python reads those of the rows that have such functions and
puts what they return in their place, and the core samples as ever: masks, penalties, filters and
reported log-probabilities are of the logits that the functions made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.engine.constraints import UInt32
from octavo.engine.request import Sequence
from octavo.sampling_params import takes_prompt

Float32 = NDArray[np.float32]
FORBIDDEN = np.float32(-1e30)
"""The logit of a token that a function has given -inf: finite, since an infinity among the logits
of a step is an error of the model; its probability is 0, and a mask forbids it besides. No logit is
further from 0, so that those divided by a temperature are finite too (from 3e-9 on)."""


class LogitsProcessors:
    """The functions of one answer, in their order."""

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence
        self._prompt = tuple(sequence.token_ids[: sequence.num_prompt_tokens])
        self._calls = [(call, takes_prompt(call)) for call in sequence.params.logits_processors]

    def apply(self, logits: Float32, words: UInt32) -> Float32:
        """The logits that the next token is sampled from; float32 (vocab_size,).

        logits: those of the model, float32 (vocab_size,); they may be overwritten. words: a mask as
        `Constraint.forbid` has it; tokens whose logit is -inf are cleared there.
        Raises what a function raises; TypeError or ValueError where it returns no logits.
        """
        answer = self._sequence.output_token_ids
        for call, has_prompt in self._calls:
            arguments = (self._prompt, answer) if has_prompt else (answer,)
            logits = _checked(call(*arguments, logits), call, len(logits))
        is_allowed = logits > -np.inf
        if not is_allowed.all():
            words &= _bits(is_allowed)
        return np.clip(logits, FORBIDDEN, -FORBIDDEN)


def _checked(returned: Any, call: Any, vocab_size: int) -> Float32:
    """What a function returned as float32 (vocab_size,), with no NaN and no +inf."""
    name = getattr(call, "__name__", type(call).__name__)
    expected = f"expected the logits, numbers of floating point of shape ({vocab_size},)"
    if returned is None:
        raise TypeError(
            f"{name} returned None; {expected}: return the array, even if you changed it in place"
        )
    array = np.asarray(returned)
    if array.dtype.kind != "f" or array.shape != (vocab_size,):
        raise TypeError(f"{name} returned {array.dtype} of shape {array.shape}; {expected}")
    with np.errstate(over="ignore"):  # it becomes an infinity, which is looked for below
        logits: Float32 = np.ascontiguousarray(array, np.float32)
    is_wrong = ~(logits < np.inf)
    if is_wrong.any():
        token = int(is_wrong.argmax())
        raise ValueError(
            f"{name} returned {logits[token]} as the logit of token {token}; expected a finite "
            f"number, or -inf to forbid the token"
        )
    return logits


def _bits(is_allowed: NDArray[np.bool_]) -> UInt32:
    """bool (tokens,) -> uint32 (ceil(tokens / 32),): token t is bit t % 32 of word t // 32."""
    packed = np.packbits(is_allowed, bitorder="little")
    return np.pad(packed, (0, -len(packed) % 4)).view("<u4")
