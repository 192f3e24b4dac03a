"""How to choose the next token: the options of one request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from octavo.errors import InvalidArgumentError

MAX_LOGPROBS = 20
MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class SamplingParams:
    """Options of one request. Every field is checked on construction.

    temperature: 0 takes the most probable token (greedy); higher is more random.
    top_k: keep the k most probable tokens; 0 keeps all.
    top_p: keep the smallest set of tokens whose probability reaches top_p; 1 keeps all.
    min_p: drop tokens less probable than min_p times the most probable one; 0 keeps all.
    seed: the same seed gives the same text, whoever shares the batch; None draws one.
    max_tokens: stop after so many new tokens.
    min_tokens: no stop string, stop token or end of text before so many new tokens.
    stop: stop when one of these strings appears; the text ends before it.
    stop_token_ids: stop when one of these tokens is drawn, besides the model's own end of text.
    include_stop_str_in_output: keep the stop string at the end of the text.
    ignore_eos: go on past the model's end of text.
    repetition_penalty: divides the positive logits of tokens that the prompt or the answer has
        already, and multiplies their negative ones; 1 changes nothing.
    frequency_penalty: taken off a token's logit as many times as the answer has it already.
    presence_penalty: taken off the logits of all tokens that the answer has already.
    logit_bias: token id -> what is added to its logit, -100 to 100; given as a mapping, kept as
        pairs.
    logprobs: report the log-probability of each token and of the most probable n; None reports
        none. Log-probabilities are of the model's own distribution, before penalties, biases and
        temperature.
    skip_special_tokens: leave special tokens out of the text.
    n: how many answers to draw for the prompt.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 256
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    skip_special_tokens: bool = True
    n: int = 1

    def __post_init__(self) -> None:
        # A single string and any sequence are welcome; a frozen tuple is what is kept.
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _check_number("temperature", self.temperature, 0.0, math.inf, "0 for greedy")
        _check_integer("top_k", self.top_k, 0, None, "0 to keep all tokens")
        _check_number("top_p", self.top_p, 0.0, 1.0, "1 to keep all tokens", exclude_low=True)
        _check_number("min_p", self.min_p, 0.0, 1.0, "0 to keep all tokens")
        _check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0, "1 for none")
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "0 for none")
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0, "0 for none")
        object.__setattr__(self, "logit_bias", _check_bias(self.logit_bias))
        _check_integer("max_tokens", self.max_tokens, 1, None, "ask for at least one token")
        _check_integer("min_tokens", self.min_tokens, 0, self.max_tokens, "at most max_tokens")
        _check_integer("n", self.n, 1, None, "ask for at least one answer")
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, MAX_SEED, "None for a random seed")
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, "None for none")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidArgumentError(
                    f"stop holds {text!r}; expected non-empty strings: leave it out instead"
                )
        for token in self.stop_token_ids:
            _check_integer("stop_token_ids", token, 0, None, "token ids are not negative")


def _check_bias(
    bias: Mapping[int, float] | tuple[tuple[int, float], ...],
) -> tuple[tuple[int, float], ...]:
    """The pairs in ascending order of token ids."""
    pairs = dict(bias)
    for token, value in pairs.items():
        _check_integer("a token id of logit_bias", token, 0, None, "token ids are not negative")
        _check_number(f"logit_bias of token {token}", value, -100.0, 100.0, "0 for none")
    return tuple(sorted(pairs.items()))


def _check_number(
    name: str, value: float, low: float, high: float, advice: str, *, exclude_low: bool = False
) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    in_range = is_number and math.isfinite(value) and low <= value <= high
    if not in_range or (exclude_low and value == low):
        start = f"above {low:g}" if exclude_low else f"{low:g} or more"
        end = "" if math.isinf(high) else f", at most {high:g}"
        raise InvalidArgumentError(f"{name} is {value!r}; expected {start}{end} ({advice})")


def _check_integer(name: str, value: int, low: int, high: int | None, advice: str) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        end = "or more" if high is None else f"to {high}"
        raise InvalidArgumentError(
            f"{name} is {value!r}; expected an integer, {low} {end} ({advice})"
        )
