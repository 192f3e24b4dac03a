"""What can be wrong with a request, told before it is queued."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from collections.abc import Sequence as SequenceOf

from octavo.errors import InvalidArgumentError
from octavo.sampling_params import SamplingParams

MAX_PRIORITY = 2**31 - 1


def check_tokens(
    prompt_token_ids: SequenceOf[int],
    params: SamplingParams,
    vocab_size: int,
    eos_token_ids: Collection[int],
) -> None:
    """Raise an InvalidArgumentError for a token id that the model does not have."""
    is_plain = set(map(type, prompt_token_ids)) == {int}  # a long prompt is checked in microseconds
    if not (is_plain and min(prompt_token_ids) >= 0 and max(prompt_token_ids) < vocab_size):
        for position, token in enumerate(prompt_token_ids):
            _check_token(f"token {position} of the prompt", token, vocab_size)
    for token in params.stop_token_ids:
        _check_token("an entry of stop_token_ids", token, vocab_size)
    for token in dict(params.logit_bias):
        _check_token("a token id of logit_bias", token, vocab_size)
    own = () if params.ignore_eos else eos_token_ids
    if params.min_tokens and len(set(params.stop_token_ids).union(own)) >= vocab_size:
        raise InvalidArgumentError(
            f"min_tokens is {params.min_tokens}, but stop_token_ids holds every token of the "
            f"vocabulary: no token is left to draw"
        )


def check_scheduling(priority: int, timeout: float | None) -> None:
    """Raise an InvalidArgumentError for a priority or a timeout that cannot be."""
    is_integer = isinstance(priority, int) and not isinstance(priority, bool)
    if not is_integer or abs(priority) > MAX_PRIORITY:
        raise InvalidArgumentError(
            f"priority is {priority!r}; expected an integer from -{MAX_PRIORITY} to "
            f"{MAX_PRIORITY} (lower is more urgent, 0 is usual)"
        )
    if timeout is not None and not (
        isinstance(timeout, (int, float)) and math.isfinite(timeout) and timeout > 0
    ):
        raise InvalidArgumentError(
            f"timeout is {timeout!r}; expected a number of seconds above 0, or None for no limit"
        )


def _check_token(what: str, token: int, vocab_size: int) -> None:
    try:
        value = operator.index(token)
    except TypeError:
        raise InvalidArgumentError(f"{what} is {token!r}; expected an integer") from None
    if not 0 <= value < vocab_size:
        raise InvalidArgumentError(
            f"{what} is {value}; expected 0 to {vocab_size - 1}, the model's vocabulary"
        )
