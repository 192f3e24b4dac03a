"""How to choose the next token: the options of one request."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

from octavo.errors import InvalidArgumentError, OctavoError
from octavo.structured_outputs import StructuredOutputs
from octavo.vllm_names import refuse_sampling

LogitsProcessor = Callable[..., Any]
"""(prompt tokens, tokens of the answer, logits) -> logits, or the same without the prompt."""
StructuredOutputsParams = StructuredOutputs  # as vLLM calls it
MAX_LOGPROBS = 20
MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class Limits:
    """What a number may be: `low` to `high` (None: no end), a float or an int as `low` is one."""

    low: float
    high: float | None
    advice: str

    def check(self, name: str, value: Any) -> Any:
        """The value as a plain number; InvalidArgumentError where it is none, or out of bounds."""
        is_float = isinstance(self.low, float)
        kind = numbers.Real if is_float else numbers.Integral
        right = isinstance(value, kind) and not isinstance(value, bool)
        right = right and (not is_float or _is_finite(value)) and value >= self.low
        if right and (self.high is None or value <= self.high):
            return float(value) if is_float else int(value)
        if is_float:
            end = "" if self.high is None else f", at most {self.high:g}"
            expected = f"{self.low:g} or more{end}"
        else:
            end = "or more" if self.high is None else f"to {self.high}"
            expected = f"an integer, {self.low} {end}"
        raise InvalidArgumentError(f"{name} is {value!r}; expected {expected} ({self.advice})")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that is no float64
        return False


def _limited(default: float | None, low: float, high: float | None, advice: str) -> Any:
    return field(default=default, metadata={"limits": Limits(low, high, advice)})


@dataclass(frozen=True)
class SamplingParams:
    """Options of one request. Every field is checked on construction.

    What vLLM's users write is understood: -1 for "all" (top_k), for "as many as fit" (max_tokens)
    and for "none" (seed); None for the default of a field (but of max_tokens, where it is as
    many as fit); one stop string without a list; numbers of NumPy.

    temperature: 0 takes the most probable token (greedy); higher is more random.
    top_k: keep the k most probable tokens; 0 keeps all.
    top_p: keep the smallest set of tokens whose probability reaches top_p; 1 keeps all, 0 the most
        probable one.
    min_p: drop tokens less probable than min_p times the most probable one; 0 keeps all.
    seed: the same seed gives the same text, in any batch. None takes one that follows from the
        engine's seed and the request's id: `LLM` numbers its requests, so a program that is run
        again gives the same texts. 64 bits; a negative number stands for itself plus 2**64.
    max_tokens: stop after so many new tokens; None: where the context or the KV cache ends. 0 with
        prompt_logprobs alone: the prompt is computed, and nothing is sampled.
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
    prompt_logprobs: report the log-probability of each token of the prompt, given the tokens before
        it, and of the most probable n there; None reports none.
    prompt_logprobs_start: the first prompt token that prompt_logprobs is for. The tokens before it
        cost no more than in any other prompt, and come from the prefix cache where it has them.
    skip_special_tokens: leave special tokens out of the text.
    n: how many answers to draw for the prompt.
    top_n_sigma: keep tokens whose logits are within so many standard deviations of the largest; 0
        (or -1) keeps all. This and the next three are explained in docs/sampling.md.
    typical_p: keep the tokens whose surprise is closest to the expected one, until they reach this
        probability; 1 keeps all.
    xtc_probability: how often XTC leaves out the most probable tokens; 0: never. These are the ones
        that have xtc_threshold of the probability or more, except for the least probable of them.
    allowed_token_ids: the answer has none but these tokens; None allows all. The model's own end of
        text is one of those that must be named.
    bad_words: texts that the answer must not have, neither as they are nor after a space. What is
        forbidden are the tokens that the tokenizer makes of them; the same letters in other tokens
        are not found.
    dry_multiplier: DRY takes dry_multiplier * dry_base^(n - dry_allowed_length) off the logit of a
        token that would go on with a repetition of n tokens, n being dry_allowed_length or more;
        0: off.
    dry_penalty_last_n: DRY looks at so many tokens before; -1: at all of prompt and answer.
    dry_sequence_breakers: texts over which no repetition reaches, for DRY.
    structured_outputs: what the text must look like; also its fields as a mapping.
    logits_processors: functions that change the logits before everything else does, each the result
        of the one before it: f(prompt_token_ids, generated_token_ids, logits) -> logits, or
        f(generated_token_ids, logits) if two arguments are all it requires. logits: NumPy, float32
        (vocab_size,), -inf forbids a token. docs/sampling.md says more. Not over HTTP.
    """

    temperature: float = _limited(1.0, 0.0, None, "0 for greedy")
    top_k: int = _limited(0, -1, None, "0 or -1 to keep all tokens")
    top_p: float = _limited(1.0, 0.0, 1.0, "1 to keep all tokens")
    min_p: float = _limited(0.0, 0.0, 1.0, "0 to keep all tokens")
    seed: int | None = _limited(None, -(2**63), MAX_SEED, "None for one from the engine's seed")
    max_tokens: int | None = _limited(256, 0, None, "None for as many as fit")
    min_tokens: int = _limited(0, 0, None, "0 for any")
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    repetition_penalty: float = _limited(1.0, 0.01, 100.0, "1 for none")
    frequency_penalty: float = _limited(0.0, -2.0, 2.0, "0 for none")
    presence_penalty: float = _limited(0.0, -2.0, 2.0, "0 for none")
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    logprobs: int | None = _limited(None, 0, MAX_LOGPROBS, "None for none")
    prompt_logprobs: int | None = _limited(None, 0, MAX_LOGPROBS, "None for none")
    prompt_logprobs_start: int = _limited(0, 0, None, "0 for all of the prompt")
    skip_special_tokens: bool = True
    n: int = _limited(1, 1, None, "ask for at least one answer")
    top_n_sigma: float = _limited(0.0, -1.0, None, "0 to keep all tokens")
    typical_p: float = _limited(1.0, 0.0, 1.0, "1 to keep all tokens")
    xtc_probability: float = _limited(0.0, 0.0, 1.0, "0 for never")
    xtc_threshold: float = _limited(0.1, 0.0, 1.0, "above 0.5 it leaves out nothing")
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    dry_multiplier: float = _limited(0.0, 0.0, 100.0, "0 for none")
    dry_base: float = _limited(1.75, 1.0, 100.0, "1.75 is usual")
    dry_allowed_length: int = _limited(2, 1, 1000, "2 is usual")
    dry_penalty_last_n: int = _limited(-1, -1, None, "-1 for all tokens")
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    logits_processors: tuple[LogitsProcessor, ...] = ()

    def __new__(cls, *_: Any, **given: Any) -> SamplingParams:
        """A field that there is none of is an InvalidArgumentError, as in `LLM`."""
        known = [each.name for each in fields(cls)]
        unknown = sorted(given.keys() - set(known))
        if unknown:
            raise refuse_sampling(unknown, known)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        checked = {each.name: self._readable(each) for each in fields(self)}
        if checked["top_k"] == -1:
            checked["top_k"] = 0
        if checked["top_n_sigma"] < 0:
            checked["top_n_sigma"] = 0.0
        if checked["seed"] is not None:
            checked["seed"] &= MAX_SEED
        if checked["max_tokens"] is not None:
            Limits(0, checked["max_tokens"], "0 for any").check("min_tokens", checked["min_tokens"])
        if checked["max_tokens"] == 0 and checked["prompt_logprobs"] is None:
            raise InvalidArgumentError(
                "max_tokens is 0; expected 1 or more, or prompt_logprobs beside it, since without "
                "either there is nothing to compute"
            )
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @functools.cached_property
    def has_unusual_filters(self) -> bool:
        """Whether one of the filters is on that few requests use; asked before every step."""
        return self.top_n_sigma > 0 or self.typical_p < 1 or self.xtc_probability > 0

    def _readable(self, option: Field[Any]) -> Any:
        """As `_checked`; of what cannot even be compared it makes an InvalidArgumentError, too."""
        try:
            return self._checked(option)
        except (TypeError, ValueError) as error:
            if isinstance(error, OctavoError):
                raise
            value = getattr(self, option.name)
            raise InvalidArgumentError(
                f"{option.name} is {value!r}; expected what `help(SamplingParams)` says: {error}"
            ) from error

    def _checked(self, option: Field[Any]) -> Any:
        """The value of a field as it is kept; InvalidArgumentError names what is wrong with it."""
        name, value = option.name, getattr(self, option.name)
        if value is None and name != "max_tokens":
            value = option.default
        if name in ("stop", "bad_words", "dry_sequence_breakers"):
            return _check_texts(name, value)
        if name == "allowed_token_ids":
            return None if value is None else _check_allowed(value)
        if name == "stop_token_ids":
            return tuple(_TOKEN_ID.check(name, token) for token in _items(name, value, "token ids"))
        if name == "logit_bias":
            return _check_bias(value)
        if name == "logits_processors":
            return _check_processors(value)
        if name == "structured_outputs":
            return None if value is None else StructuredOutputs.of(value)
        if isinstance(option.default, bool):
            if value not in (False, True):
                raise InvalidArgumentError(f"{name} is {value!r}; expected True or False")
            return bool(value)
        is_none = value is None or (name in ("max_tokens", "seed") and value == -1)
        found = None if is_none else option.metadata["limits"].check(name, value)
        # More is as good as that, and logs and metrics take no integers of hundreds of digits.
        return min(found, MAX_SEED) if isinstance(found, int) else found


def _items(name: str, given: Any, kind: str) -> tuple[Any, ...]:
    """What a list holds; InvalidArgumentError for anything but a list, a tuple, an array …"""
    if isinstance(given, (str, bytes, Mapping)) or not hasattr(given, "__iter__"):
        raise InvalidArgumentError(f"{name} is {given!r}; expected a list of {kind}")
    return tuple(given)


def _check_texts(name: str, given: str | Sequence[str]) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else _items(name, given, "strings")
    for text in texts:
        if not isinstance(text, str):
            raise InvalidArgumentError(f"{name} holds {text!r}; expected strings")
    return tuple(text for text in texts if text)


_TOKEN_ID = Limits(0, None, "token ids are not negative")


def _check_bias(
    bias: Mapping[int, float] | tuple[tuple[int, float], ...],
) -> tuple[tuple[int, float], ...]:
    """The pairs in ascending order of token ids."""
    pairs = {}
    if not isinstance(bias, (Mapping, tuple)):
        raise InvalidArgumentError(f"logit_bias is {bias!r}; expected a dict of token id -> number")
    for token, value in dict(bias).items():
        number = _TOKEN_ID.check("a token id of logit_bias", token)
        limits = Limits(-100.0, 100.0, "0 for none")
        pairs[number] = limits.check(f"logit_bias of token {token}", value)
    return tuple(sorted(pairs.items()))


def _check_allowed(token_ids: Sequence[int]) -> tuple[int, ...]:
    given = _items("allowed_token_ids", token_ids, "token ids")
    checked = {_TOKEN_ID.check("an entry of allowed_token_ids", token) for token in given}
    if not checked:
        raise InvalidArgumentError(
            "allowed_token_ids is empty; expected at least one token, or None for all of them"
        )
    return tuple(sorted(checked))


def takes_prompt(processor: LogitsProcessor) -> bool:
    """Whether a logits processor is called with three arguments, the prompt's tokens first.

    As in vLLM, one of two arguments gets the answer's tokens and the logits. Raises
    InvalidArgumentError for what can be called with neither.
    """
    if not callable(processor):
        raise InvalidArgumentError(
            f"logits_processors holds {processor!r}; expected functions of (prompt_token_ids, "
            f"generated_token_ids, logits)"
        )
    try:
        signature = inspect.signature(processor)
    except (TypeError, ValueError):  # of some functions that are written in C
        return True
    if _fits(signature, 3) and not _requires_two(signature):
        return True
    if _fits(signature, 2):
        return False
    raise InvalidArgumentError(
        f"logits_processors holds a function of {signature}; expected (prompt_token_ids, "
        f"generated_token_ids, logits) or (generated_token_ids, logits)"
    )


def _fits(signature: inspect.Signature, num_arguments: int) -> bool:
    try:
        signature.bind(*range(num_arguments))
    except TypeError:
        return False
    return True


def _requires_two(signature: inspect.Signature) -> bool:
    return _fits(signature, 2) and not _fits(signature, 1)


def _check_processors(
    given: LogitsProcessor | Iterable[LogitsProcessor],
) -> tuple[LogitsProcessor, ...]:
    processors = (given,) if callable(given) else tuple(given)
    for processor in processors:
        takes_prompt(processor)
    return processors
