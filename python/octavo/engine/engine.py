"""The step loop: schedule, submit, sample, wait, update.

The engine holds the requests and turns drawn tokens into text and finish reasons. It decides
nothing about order and memory (scheduler.py, block_manager.py) and computes nothing (the native
core). It is not thread-safe: one thread adds requests and steps.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from octavo.config import RuntimeOptions
from octavo.engine.answer import Answer
from octavo.engine.batch import Int32, build_batch, build_masks
from octavo.engine.block_manager import BlockManager, IntegrityError
from octavo.engine.interrupts import deferred_interrupt
from octavo.engine.outputs import (
    CompletionOutput,
    OutputChunk,
    RequestMetrics,
    RequestOutput,
    TokenLogprob,
)
from octavo.engine.request import Request, Sequence, derive_seed
from octavo.engine.scheduler import Schedule, Scheduler, SchedulerLimits
from octavo.errors import InvalidArgumentError
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer


class StepRuntime(Protocol):
    """What the engine asks of `_native.Runtime`: one step in three calls."""

    def submit(self, batch: Any) -> int:
        """Queue the forward pass and return a ticket."""

    def sample(self, ticket: int, masks: Int32 | None = None) -> None:
        """Queue the sampling."""

    def wait(self, ticket: int) -> Any:
        """Wait for the ticket and close it; returns a `_native.StepOutput`."""


class Engine:
    """Runs requests in steps.

    runtime: the native runtime with its KV cache allocated. options: what it was built with.
    num_kv_blocks, num_kv_groups: the cache's size and the number of block tables a sequence has.
    tokenizer: None for a model without one; texts are then empty, and stop strings refused.
    eos_token_ids: any of these ends an answer. seed: of requests that name none.
    make_batch: builds what `runtime.submit` takes from the fields of `BatchArrays`.
    """

    def __init__(
        self,
        runtime: StepRuntime,
        options: RuntimeOptions,
        *,
        num_kv_blocks: int,
        vocab_size: int,
        num_kv_groups: int = 1,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Collection[int] = (),
        seed: int = 0,
        make_batch: Callable[..., Any] | None = None,
    ) -> None:
        if make_batch is None:
            from octavo._native import Batch

            make_batch = Batch
        self.runtime = runtime
        self.options = options
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.seed = seed
        self.blocks = BlockManager(num_kv_blocks, options.block_size, num_kv_groups)
        limits = SchedulerLimits(
            options.max_num_seqs, options.max_num_batched_tokens, options.max_model_len
        )
        self.scheduler = Scheduler(limits, self.blocks)
        self.num_steps = 0
        self.num_drawn_tokens = 0
        self._make_batch = make_batch
        self._answers: dict[object, Answer] = {}  # by the key of their sequence
        self._requests: dict[str, list[Answer]] = {}

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether another step has anything to do."""
        return bool(self._requests)

    @property
    def num_unfinished_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def check_request(self, prompt_token_ids: SequenceOf[int], params: SamplingParams) -> None:
        """Raise an InvalidArgumentError, naming value and limit, for what cannot be answered."""
        for position, token in enumerate(prompt_token_ids):
            _check_token(f"token {position} of the prompt", token, self.vocab_size)
        for token in params.stop_token_ids:
            _check_token("an entry of stop_token_ids", token, self.vocab_size)
        if params.stop and self.tokenizer is None:
            raise InvalidArgumentError(
                f"stop is {params.stop!r}, but this model has no tokenizer to make text with: "
                f"use stop_token_ids"
            )
        if params.min_tokens and self._num_stop_tokens(params) >= self.vocab_size:
            raise InvalidArgumentError(
                f"min_tokens is {params.min_tokens}, but stop_token_ids holds every token of the "
                f"vocabulary: no token is left to draw"
            )
        self.scheduler.check_fits(len(prompt_token_ids), params.max_tokens)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        stream: bool = False,
        continues_prompt: bool = True,
    ) -> None:
        """Queue a request; its answers come out of `step`.

        Raises InvalidArgumentError, and changes nothing, for one that cannot be answered. stream
        and continues_prompt are described at `Request`.
        """
        if request_id in self._requests:
            raise InvalidArgumentError(f"request {request_id!r} is already running: name it anew")
        self.check_request(prompt_token_ids, params)
        if params.seed is None:
            params = replace(params, seed=derive_seed(self.seed, request_id))
        request = Request(
            request_id,
            prompt,
            tuple(operator.index(token) for token in prompt_token_ids),
            params,
            stream=stream,
            continues_prompt=continues_prompt,
        )
        length = self.scheduler.max_total_tokens(len(prompt_token_ids), params.max_tokens)
        answers = [
            Answer(request, sequence, self.tokenizer, self.eos_token_ids, length)
            for sequence in request.sequences
        ]
        self._requests[request_id] = answers
        for answer in answers:
            self._answers[answer.sequence.key] = answer
            self.scheduler.add(answer.sequence)

    def step(self) -> list[OutputChunk]:
        """Compute one step. Returns what it added to streamed requests, and finished requests.

        A chunk's `result` is set when its request has ended. Nothing to do gives an empty list.
        An error of the runtime leaves everything as it was before the step.
        """
        with deferred_interrupt():
            started = time.monotonic()
            schedule = self.scheduler.schedule()
            if not schedule.entries:
                return []
            ticket = self.runtime.submit(self._batch_of(schedule))
            try:
                self.runtime.sample(ticket, self._masks_of(schedule))
            finally:
                output = self.runtime.wait(ticket)  # even after an error: a ticket must be closed
            self.num_steps += 1
            return self._update(schedule, output, started)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now and free its blocks; returns what it has so far.

        None for an id that is unknown or has ended: aborting twice does no harm.
        """
        if request_id not in self._requests:
            return None
        with deferred_interrupt():
            for answer in self._requests[request_id]:
                if not answer.sequence.is_finished:
                    answer.flush()
                    self.scheduler.finish(answer.sequence, "abort")
            return self._remove(request_id, time.monotonic())

    def check_integrity(self) -> None:
        """Queues, blocks and requests agree; IntegrityError if not."""
        self.scheduler.check_integrity()
        unfinished = [a for a in self._answers.values() if not a.sequence.is_finished]
        if len(unfinished) != self.scheduler.num_waiting + self.scheduler.num_running:
            raise IntegrityError(
                f"{len(unfinished)} answers are unfinished, but {self.scheduler.num_waiting} "
                f"sequences wait and {self.scheduler.num_running} run"
            )

    def _batch_of(self, schedule: Schedule) -> Any:
        arrays = build_batch(schedule, self.blocks, self.vocab_size)
        return self._make_batch(**arrays._asdict())

    def _masks_of(self, schedule: Schedule) -> Int32 | None:
        drawing = [entry.sequence for entry in schedule.entries if entry.draws_token]
        if not any(sequence.params.min_tokens for sequence in drawing):
            return None
        forbidden = [self._answers[sequence.key].forbidden_token_ids for sequence in drawing]
        return build_masks(forbidden, self.vocab_size)

    def _update(self, schedule: Schedule, output: Any, started: float) -> list[OutputChunk]:
        now = time.monotonic()
        for entry in schedule.entries:
            if entry.start == 0:
                request = self._answers[entry.sequence.key].request
                if request.first_scheduled_time is None:
                    request.first_scheduled_time = started
        self.scheduler.update(schedule)
        drawing = [entry.sequence for entry in schedule.entries if entry.draws_token]
        logprobs = _read_logprobs(drawing, output)
        chunks: list[OutputChunk] = []
        rows = zip(drawing, output.token_ids.tolist(), output.finite.tolist(), strict=True)
        for row, (sequence, token, is_finite) in enumerate(rows):
            if sequence.is_finished:  # another answer of its request failed in this very step
                continue
            answer = self._answers[sequence.key]
            if not is_finite:
                chunks += self._fail(answer, now)
                continue
            text = self._append(answer, token, logprobs[row], now)
            if answer.request.stream or (sequence.is_finished and answer.request.is_finished):
                chunks.append(self._chunk(answer, text, now, token, logprobs[row]))
        return chunks

    def _append(self, answer: Answer, token: int, logprob: TokenLogprob | None, now: float) -> str:
        """Take one drawn token in; finish the answer if it ends here. Returns its new text."""
        sequence = answer.sequence
        if answer.request.first_token_time is None:
            answer.request.first_token_time = now
        sequence.token_ids.append(token)
        self.num_drawn_tokens += 1
        if logprob is not None:
            sequence.logprobs.append(logprob)
            sequence.cumulative_logprob += logprob.logprob
        if token in answer.stop_token_ids:  # before min_tokens they are masked out
            # The text ends before it, as before a stop string.
            shown = answer.push(token) if sequence.params.include_stop_str_in_output else ""
            shown += answer.flush()
            is_own = token in self.eos_token_ids and token not in sequence.params.stop_token_ids
            self.scheduler.finish(sequence, "stop", None if is_own else token)
            return shown
        text = answer.push(token)
        matched = answer.matched_stop
        at_limit = len(sequence.token_ids) >= answer.max_total_tokens
        if at_limit and matched is None:
            text += answer.flush()  # which may complete a stop string
            matched = answer.matched_stop
        if matched is not None:
            self.scheduler.finish(sequence, "stop", matched)
        elif at_limit:
            self.scheduler.finish(sequence, "length")
        return text

    def _fail(self, answer: Answer, now: float) -> list[OutputChunk]:
        """End the answer's whole request: its logits hold a NaN or an infinity."""
        sequence, request = answer.sequence, answer.request
        request.error = (
            f"the model's logits hold a NaN or an infinity at token {sequence.num_tokens} of "
            f"request {request.request_id!r}: its weights may be damaged, or its values exceed "
            f"the dtype; `octavo diff` shows where they first appear"
        )
        chunks = []
        failed = [a for a in self._requests[request.request_id] if not a.sequence.is_finished]
        for other in failed:
            text = other.flush()
            self.scheduler.finish(other.sequence, "error")
            if request.stream or other is failed[-1]:
                chunks.append(self._chunk(other, text, now))
        return chunks

    def _chunk(
        self,
        answer: Answer,
        text: str,
        now: float,
        token: int | None = None,
        logprob: TokenLogprob | None = None,
    ) -> OutputChunk:
        request, sequence = answer.request, answer.sequence
        return OutputChunk(
            request.request_id,
            sequence.sample_index,
            text,
            () if token is None else (token,),
            () if logprob is None else (logprob,),
            sequence.finish_reason,
            sequence.stop_reason,
            self._remove(request.request_id, now) if request.is_finished else None,
        )

    def _remove(self, request_id: str, now: float) -> RequestOutput:
        """Forget an ended request and return its output."""
        answers = self._requests.pop(request_id)
        for answer in answers:
            del self._answers[answer.sequence.key]
        request = answers[0].request
        return RequestOutput(
            request_id,
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
            ),
        )

    def _num_stop_tokens(self, params: SamplingParams) -> int:
        own = () if params.ignore_eos else self.eos_token_ids
        return len(set(params.stop_token_ids).union(own))


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


def _read_logprobs(drawing: list[Sequence], output: Any) -> list[TokenLogprob | None]:
    """For each logit row what its request asked to know; None where it asked nothing."""
    if all(sequence.params.logprobs is None for sequence in drawing):
        return [None] * len(drawing)
    tokens, logprobs = output.token_ids.tolist(), output.logprobs.tolist()
    top_ids, top_logprobs = output.top_token_ids.tolist(), output.top_logprobs.tolist()
    found: list[TokenLogprob | None] = []
    for row, sequence in enumerate(drawing):
        count = sequence.params.logprobs
        if count is None:
            found.append(None)
            continue
        ids = tuple(token for token in top_ids[row][:count] if token >= 0)
        tops = tuple(top_logprobs[row][: len(ids)])
        found.append(TokenLogprob(tokens[row], logprobs[row], ids, tops))
    return found


def _check_token(what: str, token: int, vocab_size: int) -> None:
    try:
        value = operator.index(token)
    except TypeError:
        raise InvalidArgumentError(f"{what} is {token!r}; expected an integer") from None
    if not 0 <= value < vocab_size:
        raise InvalidArgumentError(
            f"{what} is {value}; expected 0 to {vocab_size - 1}, the model's vocabulary"
        )
