"""From a step's arrays and finished answers to what a user gets back."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

from octavo.engine.answer import Answer
from octavo.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprob
from octavo.engine.request import Sequence


def read_logprobs(sequences: SequenceOf[Sequence], output: Any) -> list[TokenLogprob | None]:
    """For each logit row what its request asked to know; None where it asked nothing.

    sequences: the sequence of each row. output: a `_native.StepOutput`.
    """
    if all(sequence.params.logprobs is None for sequence in sequences):
        return [None] * len(sequences)
    tokens, logprobs = output.token_ids.tolist(), output.logprobs.tolist()
    top_ids, top_logprobs = output.top_token_ids.tolist(), output.top_logprobs.tolist()
    found: list[TokenLogprob | None] = []
    for row, sequence in enumerate(sequences):
        count = sequence.params.logprobs
        if count is None:
            found.append(None)
            continue
        ids = tuple(token for token in top_ids[row][:count] if token >= 0)
        tops = tuple(top_logprobs[row][: len(ids)])
        found.append(TokenLogprob(tokens[row], logprobs[row], ids, tops))
    return found


def not_finite(answer: Answer) -> str:
    """What to say of an answer whose logits hold a NaN or an infinity."""
    return (
        f"the model's logits hold a NaN or an infinity at token {answer.sequence.num_tokens} of "
        f"request {answer.request.request_id!r}: its weights may be damaged, or its values exceed "
        f"the dtype; `octavo diff` shows where they first appear"
    )


def request_output(answers: SequenceOf[Answer], now: float) -> RequestOutput:
    """The output of a request that has ended; answers: all of its answers, in order."""
    request = answers[0].request
    return RequestOutput(
        request.request_id,
        request.prompt,
        request.prompt_token_ids,
        tuple(_completion(answer) for answer in answers),
        request.error,
        RequestMetrics(
            request.arrival_time,
            request.first_scheduled_time,
            request.first_token_time,
            now,
            len(request.prompt_token_ids),
            sum(sequence.num_output_tokens for sequence in request.sequences),
            sum(sequence.num_preemptions for sequence in request.sequences),
            request.sequences[0].num_cached_tokens or 0,
        ),
    )


def _completion(answer: Answer) -> CompletionOutput:
    sequence = answer.sequence
    has_logprobs = sequence.params.logprobs is not None
    return CompletionOutput(
        sequence.sample_index,
        answer.text,
        sequence.output_token_ids,
        sequence.finish_reason,
        sequence.stop_reason,
        tuple(sequence.logprobs) if has_logprobs else None,
        sequence.cumulative_logprob if has_logprobs else None,
    )
