"""How to choose the next token: the options of one request."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from octavo.errors import InvalidArgumentError

MAX_LOGPROBS = 20
MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class SamplingParams:
    """Options of one request. Every field is checked on construction.

    What vLLM's users write is understood: -1 for "all" (top_k), for "as many as fit" (max_tokens)
    and for "draw one" (seed); None for the default of a field (but of max_tokens, where it is as
    many as fit); one stop string without a list; numbers of NumPy.

    temperature: 0 takes the most probable token (greedy); higher is more random.
    top_k: keep the k most probable tokens; 0 keeps all.
    top_p: keep the smallest set of tokens whose probability reaches top_p; 1 keeps all, 0 the most
        probable one.
    min_p: drop tokens less probable than min_p times the most probable one; 0 keeps all.
    seed: the same seed gives the same text, whoever shares the batch; None draws one. 64 bits; a
        negative number stands for itself plus 2**64.
    max_tokens: stop after so many new tokens; None: where the context or the KV cache ends.
    min_tokens: no stop string, stop token or end of text before so many new tokens.
    stop: stop when one of these strings appears; the text ends before it. Empty ones ask for
        nothing. The text of special tokens counts, also where it is left out of the answer.
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
    max_tokens: int | None = 256
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
        for each in fields(self):
            if getattr(self, each.name) is None and each.name != "max_tokens":
                object.__setattr__(self, each.name, each.default)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        for text in stop:
            if not isinstance(text, str):
                raise InvalidArgumentError(f"stop holds {text!r}; expected strings")
        max_tokens = None if self.max_tokens == -1 else self.max_tokens
        seed = None if self.seed == -1 else self.seed
        seed = _optional("seed", seed, -(2**63), MAX_SEED, "None for a random seed")
        checked: dict[str, Any] = {
            "stop": tuple(text for text in stop if text),
            "stop_token_ids": _check_token_ids(self.stop_token_ids),
            "logit_bias": _check_bias(self.logit_bias or {}),
            "temperature": _number("temperature", self.temperature, 0.0, math.inf, "0 for greedy"),
            "top_k": _integer("top_k", self.top_k, -1, None, "0 or -1 to keep all tokens"),
            "top_p": _number("top_p", self.top_p, 0.0, 1.0, "1 to keep all tokens"),
            "min_p": _number("min_p", self.min_p, 0.0, 1.0, "0 to keep all tokens"),
            "max_tokens": _optional("max_tokens", max_tokens, 1, None, "None for as many as fit"),
            "min_tokens": _integer("min_tokens", self.min_tokens, 0, max_tokens, "0 for any"),
            "n": _integer("n", self.n, 1, None, "ask for at least one answer"),
            "seed": None if seed is None else seed & MAX_SEED,
            "logprobs": _optional("logprobs", self.logprobs, 0, MAX_LOGPROBS, "None for none"),
        }
        for name, low, high, none in _PENALTIES:
            checked[name] = _number(name, getattr(self, name), low, high, none)
        for name in _SWITCHES:
            checked[name] = _switch(name, getattr(self, name))
        if checked["top_k"] == -1:
            checked["top_k"] = 0
        for name, value in checked.items():
            object.__setattr__(self, name, value)


_PENALTIES = (
    ("repetition_penalty", 0.01, 100.0, "1 for none"),
    ("frequency_penalty", -2.0, 2.0, "0 for none"),
    ("presence_penalty", -2.0, 2.0, "0 for none"),
)
_SWITCHES = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")


def _switch(name: str, value: Any) -> bool:
    if value not in (False, True):
        raise InvalidArgumentError(f"{name} is {value!r}; expected True or False")
    return bool(value)


def _check_token_ids(token_ids: Sequence[int] | None) -> tuple[int, ...]:
    advice = "token ids are not negative"
    token_ids = () if token_ids is None else token_ids
    return tuple(_integer("stop_token_ids", token, 0, None, advice) for token in token_ids)


def _check_bias(
    bias: Mapping[int, float] | tuple[tuple[int, float], ...],
) -> tuple[tuple[int, float], ...]:
    """The pairs in ascending order of token ids."""
    pairs = {}
    for token, value in dict(bias).items():
        name = "a token id of logit_bias"
        number = _integer(name, token, 0, None, "token ids are not negative")
        pairs[number] = _number(f"logit_bias of token {token}", value, -100.0, 100.0, "0 for none")
    return tuple(sorted(pairs.items()))


def _number(name: str, value: Any, low: float, high: float, advice: str) -> float:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        end = "" if math.isinf(high) else f", at most {high:g}"
        raise InvalidArgumentError(f"{name} is {value!r}; expected {low:g} or more{end} ({advice})")
    return float(value)


def _integer(name: str, value: Any, low: int, high: int | None, advice: str) -> int:
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        end = "or more" if high is None else f"to {high}"
        raise InvalidArgumentError(
            f"{name} is {value!r}; expected an integer, {low} {end} ({advice})"
        )
    return int(value)


def _optional(name: str, value: Any, low: int, high: int | None, advice: str) -> int | None:
    return None if value is None else _integer(name, value, low, high, advice)
