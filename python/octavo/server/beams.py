"""Beam search as vLLM's API asks for it: `use_beam_search`, with `n` as the number of beams."""

from __future__ import annotations

from dataclasses import Field, fields
from typing import Any

from octavo.sampling_params import SamplingParams
from octavo.search.params import BeamSearchParams
from octavo.server.errors import bad_request
from octavo.server.protocol import ChatBody, SamplingBody

_OPTIONS = ("length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty")
_NEUTRAL = {"length_penalty": 1.0, "early_stopping": False, "num_beam_groups": 1}
_SHARED = ("max_tokens", "ignore_eos", "stop_token_ids", "include_stop_str_in_output")
_ALLOWED = {*_SHARED, "skip_special_tokens", "n", "seed"}


def check_beams(body: SamplingBody) -> None:
    """Raise an ApiError for what does not go with beam search, or needs it."""
    if not body.use_beam_search:
        for name in _OPTIONS:
            value = getattr(body, name)
            if value is not None and value != _NEUTRAL.get(name, 0):
                raise bad_request(
                    f"{name} is given without use_beam_search: set that, or leave {name} out",
                    name,
                )
        return
    if body.stream:
        raise bad_request(
            "stream is true, but which beam wins is known at the end only: leave stream out",
            "stream",
        )
    if isinstance(body, ChatBody) and body.tools:
        raise bad_request("tools do not go with use_beam_search: leave one of them out", "tools")
    for each in fields(SamplingParams):
        if each.name not in _ALLOWED and not _is_neutral(each, getattr(body, each.name, None)):
            raise bad_request(
                f"{each.name} is given, but beam search takes the tokens by the model's own "
                f"probabilities: leave {each.name} or use_beam_search out",
                each.name,
            )


def _is_neutral(option: Field[Any], value: Any) -> bool:
    if option.name in ("logprobs", "prompt_logprobs"):  # 0 asks for something
        return value is None or value is False
    neutral = {"temperature": (0, 1), "top_k": (0, -1)}
    values = (None, False, [], {}, option.default, *neutral.get(option.name, ()))
    return value in values


def beam_params(body: SamplingBody, params: SamplingParams) -> BeamSearchParams:
    """The search that a body asks for; params: where its answers end."""
    given = {name: getattr(body, name) for name in _OPTIONS}
    options = {name: value for name, value in given.items() if value is not None}
    shared = {name: getattr(params, name) for name in _SHARED}
    skips = params.skip_special_tokens
    return BeamSearchParams(body.num_answers, **shared, skip_special_tokens=skips, **options)
