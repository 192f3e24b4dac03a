"""What `octavo generate --json` prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from octavo.sampling_params import SamplingParams
from octavo.text.places import TokenPlaces

if TYPE_CHECKING:
    from octavo.engine.outputs import CompletionOutput, RequestOutput, TokenLogprob
    from octavo.llm import LLM

Split = Callable[[str], tuple[str, str]]
"""From the text of an answer to what was thought, and the rest of it."""


def record_of(
    llm: LLM,
    result: RequestOutput,
    params: SamplingParams,
    is_chat: bool,
    load_seconds: float,
    split: Split,
) -> dict[str, Any]:
    """What --json prints. The first answer stands at the top; all of them under "answers"."""
    metrics = result.metrics
    answers = [
        _answer(
            TokenPlaces(llm.tokenizer, params.skip_special_tokens, continues=not is_chat),
            answer,
            split,
        )
        for answer in result.outputs
    ]
    return {
        "prompt": result.prompt,
        "prompt_token_ids": list(result.prompt_token_ids),
        **{key: value for key, value in answers[0].items() if key != "index"},
        **({"answers": answers} if len(result.outputs) > 1 else {}),
        **({} if result.prompt_logprobs is None else {"prompt_logprobs": _of_prompt(llm, result)}),
        "seed": params.seed,
        "error": result.error,
        "usage": {
            "prompt_tokens": metrics.num_prompt_tokens,
            "completion_tokens": metrics.num_output_tokens,
            "total_tokens": metrics.num_prompt_tokens + metrics.num_output_tokens,
        },
        "timings": {
            "load_seconds": round(load_seconds, 4),
            "time_to_first_token_seconds": _rounded(metrics.time_to_first_token),
            "total_seconds": _rounded(metrics.total_time),
            "tokens_per_second": _rounded(metrics.tokens_per_second),
        },
    }


def print_json(record: dict[str, Any]) -> None:
    """On standard output, a line."""
    line = json.dumps(record, ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding)
    except UnicodeEncodeError:  # the locale lacks these characters: written as \\uXXXX none is lost
        line = json.dumps(record)
    print(line)


def _answer(places: TokenPlaces, answer: CompletionOutput, split: Split) -> dict[str, Any]:
    thought, text = split(answer.text)
    record: dict[str, Any] = {
        "index": answer.index,
        "text": text,
        **({"reasoning": thought} if thought else {}),
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    if answer.logprobs is not None:
        record["cumulative_logprob"] = answer.cumulative_logprob
        record["logprobs"] = [_logprob(places, entry) for entry in answer.logprobs]
    return record


def _of_prompt(llm: LLM, result: RequestOutput) -> list[dict[str, Any] | None]:
    """An entry for each token of the prompt; None for the first, which has nothing before it."""
    places = TokenPlaces(llm.tokenizer, False, continues=False)
    found: list[dict[str, Any] | None] = []
    for token, entry in zip(result.prompt_token_ids, result.prompt_logprobs or (), strict=True):
        if entry is None:
            places.advance(token)
            found.append(None)
        else:
            found.append(_logprob(places, entry) | {"rank": entry.rank})
    return found


def _logprob(places: TokenPlaces, entry: TokenLogprob) -> dict[str, Any]:
    record = {
        "token_id": entry.token_id,
        "token": places.name(entry.token_id),
        "logprob": entry.logprob,
        "top": [
            {"token_id": token, "token": places.name(token), "logprob": logprob}
            for token, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True)
        ],
    }
    places.advance(entry.token_id)
    return record


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
