"""One answer, token by token, and its part of the output that a user gets."""

from __future__ import annotations

import math
from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

from octavo.engine.adjustments import Adjuster
from octavo.engine.constraints import create_constraints
from octavo.engine.follow_grammar import grammar_constraints
from octavo.engine.logits_processors import FORBIDDEN, LogitsProcessors
from octavo.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprob
from octavo.engine.prompt_logprobs import whole_prompt
from octavo.engine.request import Request, Sequence
from octavo.engine.word_constraints import word_constraints
from octavo.text.stream import StopChecker, StreamDecoder

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer


class Answer:
    """A sequence with what the engine needs to know about its end.

    stop_token_ids: every token that ends it, the model's own included unless they are ignored.
    adjuster: its penalties and biases; None when it has none. constraints: what forbids it tokens.
    processors: its user's own functions on logits; None: there are none.
    failure: why its next token could not be sampled as it was asked for.
    text: everything that may be shown so far. Without a tokenizer it stays empty.
    """

    def __init__(
        self,
        request: Request,
        sequence: Sequence,
        tokenizer: Tokenizer | None,
        eos_token_ids: Collection[int],
    ) -> None:
        params = request.params
        self.request = request
        self.sequence = sequence
        self.adjuster = Adjuster.create(sequence, tokenizer)
        own = () if params.ignore_eos else eos_token_ids
        self.stop_token_ids = frozenset(own).union(params.stop_token_ids)
        self.constraints = [
            *create_constraints(sequence, self.stop_token_ids),
            *word_constraints(request, sequence),
            *grammar_constraints(request, sequence, self.stop_token_ids),
        ]
        if any(constraint.watches_answer for constraint in self.constraints):
            sequence.watches_answer = True
        has_processors = bool(params.logits_processors)
        self.processors = LogitsProcessors(sequence) if has_processors else None
        self.failure: str | None = None
        self._decoder = (
            StreamDecoder(
                tokenizer,
                params.skip_special_tokens,
                continues=request.continues_prompt,
                kept=request.kept_special_ids,
            )
            if tokenizer is not None
            else None
        )
        self._checker = StopChecker(params.stop, params.include_stop_str_in_output)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._pieces)

    @property
    def is_constrained(self) -> bool:
        """Whether its next token must not be just any."""
        return any([constraint.is_active for constraint in self.constraints])

    @property
    def is_steered(self) -> bool:
        """Whether its next logits are changed before they are sampled from."""
        has_own = self.adjuster is not None or self.processors is not None
        return has_own or self.is_constrained

    @property
    def matched_stop(self) -> str | None:
        """The stop string that was found, if any."""
        return self._checker.matched

    def push(self, token_id: int) -> str:
        """Add the text of a sampled token (already in the sequence); returns what is new."""
        decoder, self._decoder = self._decoder, None
        if decoder is None:
            return ""
        text = self._show(decoder.push(token_id), decoder.skipped(token_id))
        self._decoder = decoder  # a decoder that has failed is not used again
        return text

    def flush(self) -> str:
        """The answer has ended: the text that was held back, to be called once."""
        decoder, self._decoder = self._decoder, None
        text = self._show(decoder.flush()) if decoder is not None else ""
        held = self._checker.flush()
        if held:
            self._pieces.append(held)
        return text + held

    def set_answer(self, token_ids: SequenceOf[int], logprob: float) -> None:
        """The whole answer that a search has found, with its log-probability."""
        sequence = self.sequence
        sequence.token_ids[sequence.num_prompt_tokens :] = token_ids
        sequence.cumulative_logprob = logprob
        for token in token_ids:
            if token not in self.stop_token_ids or sequence.params.include_stop_str_in_output:
                self.push(token)
        self.flush()

    def _show(self, text: str, skipped: str = "") -> str:
        """text: of an ordinary token, or of none. skipped: of a special token."""
        params = self.sequence.params
        if params.stop:
            armed = self.sequence.num_output_tokens >= params.min_tokens
            text = self._checker.push(text, armed) + self._checker.push(skipped, armed, hidden=True)
        if text:
            self._pieces.append(text)
        return text


def read_logprobs(sequences: SequenceOf[Sequence], output: Any) -> list[TokenLogprob | None]:
    """For each logit row the log-probabilities that its request asked for; None for none.

    sequences: the sequence of each row. output: a `_native.StepOutput`.
    """
    if all(sequence.params.logprobs is None for sequence in sequences):
        return [None] * len(sequences)
    tokens, logprobs, ranks = (
        getattr(output, name).tolist() for name in ("token_ids", "logprobs", "ranks")
    )
    top_ids, top_logprobs = output.top_token_ids.tolist(), output.top_logprobs.tolist()
    found: list[TokenLogprob | None] = []
    for row, sequence in enumerate(sequences):
        count = sequence.params.logprobs
        if count is None:
            found.append(None)
            continue
        least = FORBIDDEN / 2 if sequence.params.logits_processors else -math.inf
        tops = list(zip(top_ids[row][:count], top_logprobs[row], strict=False))
        tops = [(token, each) for token, each in tops if token >= 0 and each >= least]
        ids, values = (tuple(each[i] for each in tops) for i in (0, 1))
        found.append(TokenLogprob(tokens[row], logprobs[row], ids, values, ranks[row]))
    return found


def not_finite(answer: Answer) -> str:
    """The message about an answer whose logits hold a NaN or an infinity."""
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
        whole_prompt(request.sequences[0]),
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
        sequence.cumulative_logprob if has_logprobs or sequence.num_candidates else None,
    )
