"""The step loop: schedule, submit, sample, wait, update.

The engine holds the requests and turns sampled tokens into text and finish reasons. Order and
memory are decided in scheduler.py and block_manager.py, and the native core computes. Only one
thread at a time may add requests and step (guard.py); shared.py lets many threads share an engine.
"""

from __future__ import annotations

import contextlib
import operator
import time
from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.config import RuntimeOptions
from octavo.engine.adapters import AdapterTable
from octavo.engine.admission import AdmissionLimits, Deadlines, check_scheduling, check_tokens
from octavo.engine.answer import Answer, not_finite, read_logprobs
from octavo.engine.block_manager import BlockManager
from octavo.engine.block_pool import IntegrityError
from octavo.engine.drafter import Drafter
from octavo.engine.endings import Endings
from octavo.engine.event_records import arrival, describe_engine, read_stats, record_step, refusal
from octavo.engine.events import EventLog
from octavo.engine.guard import EngineGuard, deferred_interrupt, guarded
from octavo.engine.outputs import EngineStats, OutputChunk, RequestOutput, TokenLogprob
from octavo.engine.pipeline import InFlightStep, Pipeline, StepRuntime
from octavo.engine.request import Request, SequenceState, derive_seed
from octavo.engine.schedule import SchedulerLimits
from octavo.engine.scheduler import Scheduler
from octavo.engine.search import BeamGroup, Search, check_search
from octavo.engine.steering import Steering
from octavo.engine.word_constraints import tokens_of_words
from octavo.errors import InvalidArgumentError, QueueFullError
from octavo.grammar.compiler import Grammars
from octavo.models.adapter import Adapter
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo.text.tokenizer import Tokenizer


MAX_PROMPT_LOGITS = 1 << 24  # of prompts, in a step that reports their log-probabilities: 64 MiB
IDLE_CHECK_SECONDS = 10.0  # an engine that has run out of work checks its accounting so often


class Engine(Endings):
    """Runs requests in steps.

    runtime: the native runtime with its KV cache allocated. options: what it was built with.
    num_kv_blocks: the cache's size. kv_windows: of each KV group, how many positions a token sees
    there; 0: all. A sequence has a block table in each.
    tokenizer: None for a model without one; texts are then empty, and stop strings refused.
    eos_token_ids: any of these ends an answer. seed: for requests that name none.
    make_batch: builds what `runtime.submit` takes from the fields of `BatchArrays`.
    clock: returns the time in seconds. drafter: proposes tokens; one step checks several of them.
    read_adapter: reads a LoRA adapter for this model; without it there are none.
    """

    def __init__(
        self,
        runtime: StepRuntime,
        options: RuntimeOptions,
        *,
        num_kv_blocks: int,
        vocab_size: int,
        kv_windows: SequenceOf[int] = (0,),
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Collection[int] = (),
        seed: int = 0,
        make_batch: Callable[..., Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
        drafter: Drafter | None = None,
        read_adapter: Callable[[Path], Adapter] | None = None,
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
        self.grammars = Grammars(tokenizer, vocab_size, self.eos_token_ids)
        self._tokens_of = lru_cache(maxsize=16)(partial(tokens_of_words, tokenizer=tokenizer))
        size, num_in_flight = options.block_size, options.num_in_flight_tokens
        self.blocks = BlockManager(num_kv_blocks, size, kv_windows, num_in_flight)
        limits = SchedulerLimits(
            options.max_num_seqs,
            options.max_num_batched_tokens,
            options.max_model_len,
            options.priority_ageing_seconds,
            options.enable_prefix_caching,
            max_prompt_rows=max(16, MAX_PROMPT_LOGITS // vocab_size),
            rope_switch=options.rope_switch,
            num_spare_seqs=options.num_spare_seqs,
        )
        header = describe_engine(options, limits, self.blocks)
        self.events = EventLog(options.event_log_capacity, header)
        self.scheduler = Scheduler(limits, self.blocks, self.events, drafter)
        self.guard = EngineGuard()
        self.adapters = AdapterTable(runtime, options.max_adapters, read_adapter)
        self.failed_request_ids: frozenset[str] = frozenset()  # that were in the step that failed
        self.num_steps = self.num_sampled_tokens = 0
        self._pipeline = Pipeline(
            runtime,
            self.blocks,
            make_batch,
            vocab_size=vocab_size,
            depth=2 if options.overlap_steps else 1,
            states=None if drafter is None else drafter.states,
        )
        self.drafter = drafter
        self._clock = clock
        self._last_step_end = self._last_check = clock()
        self._admission = AdmissionLimits(options, self.scheduler)
        self._deadlines = Deadlines()
        self._undelivered: list[OutputChunk] = []  # of a step that failed before its end
        self._answers: dict[object, Answer] = {}  # by the key of their sequence
        self._requests: dict[str, list[Answer]] = {}
        self._steering = Steering(vocab_size, self._pipeline)
        self._searches: dict[str, BeamGroup] = {}

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether another step has anything to do."""
        return bool(self._requests)

    def check_request(self, prompt_token_ids: SequenceOf[int], params: SamplingParams) -> None:
        """Raise an InvalidArgumentError with value and limit if it cannot be answered."""
        check_tokens(prompt_token_ids, params, self.vocab_size, self.eos_token_ids)
        if params.stop and self.tokenizer is None:
            raise InvalidArgumentError(
                f"stop is {params.stop!r}, but this model has no tokenizer to make text with: "
                f"use stop_token_ids"
            )
        self.scheduler.check_fits(len(prompt_token_ids), params.max_tokens)
        # Made here and kept, so that no step waits for them.
        self._tokens_of(params.bad_words)
        self.grammars.of(params)

    @guarded
    def add_request(
        self,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        stream: bool = False,
        continues_prompt: bool = True,
        kept_special_ids: Collection[int] = (),
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str | None = None,
        adapter: str | None = None,
        search: Search | None = None,
        part_of: str = "",
    ) -> None:
        """Queue a request; its answers come out of `step`.

        stream, continues_prompt and kept_special_ids are described at `Request`. priority: lower is
        more urgent. timeout: seconds from now after which it ends with the finish reason "timeout",
        waiting or running; None lets it run. cache_salt: requests with different salts share no
        cached keys and values, so a client cannot find out by timing what others have asked.
        adapter: the name of a LoRA adapter in `adapters`, which may raise an AdapterNotFoundError,
        an AdaptersInUseError, or what reading it raises. search: chooses the tokens of several
        beams, whose final texts are the answers; params then say only where they end. part_of: see
        `AdmissionLimits.admit`.
        Raises InvalidArgumentError for a request that cannot be answered, QueueFullError when too
        many wait already; both change nothing. This, `step` and `abort` raise the errors of
        `EngineGuard`.
        """
        if request_id in self._requests:
            raise InvalidArgumentError(f"request {request_id!r} is already running: name it anew")
        self.check_request(prompt_token_ids, params)
        check_scheduling(priority, timeout)
        if search is not None:
            check_search(
                search, len(prompt_token_ids), params, stream, self.scheduler, self.vocab_size
            )
        now = self._clock()
        loan = self.adapters.acquire(adapter)
        try:
            self._admission.admit(request_id, len(prompt_token_ids), params.n, part_of)
        except QueueFullError as error:
            self.adapters.release(loan)
            self.events.record(refusal(request_id, len(prompt_token_ids), error, now))
            raise
        if params.seed is None:
            params = replace(params, seed=derive_seed(self.seed, request_id))
        request = Request(
            request_id,
            prompt,
            tuple(operator.index(token) for token in prompt_token_ids),
            params,
            stream=stream,
            continues_prompt=continues_prompt,
            kept_special_ids=kept_special_ids,
            priority=priority,
            deadline=None if timeout is None else now + timeout,
            cache_salt=cache_salt,
            adapter=loan,
            grammar=self.grammars.of(params),
            bad_words=self._tokens_of(params.bad_words),
            num_beams=0 if search is None else search.num_beams,
            num_candidates=0 if search is None else search.num_candidates,
            arrival_time=now,
        )
        if search is not None:
            self._searches[request_id] = BeamGroup(request_id, search, request.sequences)
        if request.deadline is not None:
            self._deadlines.add(request_id, request.deadline)
        answers = [
            Answer(request, sequence, self.tokenizer, self.eos_token_ids)
            for sequence in request.sequences
        ]
        self._requests[request_id] = answers
        for answer in answers:
            self._answers[answer.sequence.key] = answer
            self._steering.add(answer)
            if answer.sequence.state is not SequenceState.IDLE:
                self.scheduler.add(answer.sequence)
        names = self.scheduler.prefix_cache.names_of(request.sequences[0])
        self.events.record(arrival(request, timeout, tuple(names)))

    @guarded
    def step(self) -> list[OutputChunk]:
        """Compute one step. Returns what it added to streamed requests, and finished requests.

        A chunk's `result` is set when its request has ended. Requests past their deadline end
        first, and their blocks are free for this step. With nothing to do the list is empty.
        An error of the runtime leaves everything as it was before the step, and
        `failed_request_ids` names the requests that were in it. With `overlap_steps` the next step
        is in flight while this one's output is processed.
        """
        with deferred_interrupt():
            now = self._clock()
            for request_id in self._deadlines.expired(now):
                self._undelivered += self._end_all(request_id, "timeout", now)
            with self._undone_after_error():
                while self._pipeline.has_room and self._submit_next():
                    pass
                ended = self._pipeline.wait() if len(self._pipeline) else None
            if ended is not None:
                self.num_steps += 1
                self._undelivered += self._update(*ended)
                if not self._requests:
                    self._abandon_steps()  # no request needs the steps still in flight
                    if self._last_step_end - self._last_check >= IDLE_CHECK_SECONDS:
                        self._last_check = self._last_step_end
                        self.check_integrity()
                elif (waiting := self._pipeline.unsampled) is not None:
                    with self._undone_after_error():
                        self._pipeline.sample(*self._steering.arrays(waiting))
            # Among them those that an earlier step, which failed, did not deliver.
            chunks, self._undelivered = self._undelivered, []
            return chunks

    @guarded
    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now and free its blocks; returns what it has so far.

        None for an id that is unknown or has ended: aborting twice does no harm.
        """
        if request_id not in self._requests:
            return None
        with deferred_interrupt():
            return self._end_all(request_id, "abort", self._clock())[-1].result

    @guarded
    def close(self) -> None:
        """Give the memory of weights and cache back; every later use is an EngineClosedError."""
        self._abandon_steps()
        self.guard.close()
        self.scheduler.drafter = None  # which may hold a model of its own
        # Processes of ranks are not to wait until no error refers to them.
        getattr(self.runtime, "close", lambda: None)()
        del self.runtime, self.adapters, self.drafter, self._pipeline, self._steering

    def stats(self) -> EngineStats:
        """The engine's state in numbers, for metrics and a live view.

        Any thread may call it at any time; during a step, some numbers are of the step before.
        """
        return read_stats(self.scheduler, self._admission, self.num_steps, self.num_sampled_tokens)

    def check_integrity(self) -> None:
        """Queues, blocks and requests agree; IntegrityError if not."""
        self.scheduler.check_integrity()
        ended = (SequenceState.FINISHED, SequenceState.IDLE)
        unfinished = [a for a in self._answers.values() if a.sequence.state not in ended]
        if len(unfinished) != self.scheduler.num_waiting + self.scheduler.num_running:
            raise IntegrityError(
                f"{len(unfinished)} answers are unfinished, but {self.scheduler.num_waiting} "
                f"sequences wait and {self.scheduler.num_running} run"
            )

    def _submit_next(self) -> bool:
        """Schedule a step and submit it; False if there is nothing to compute."""
        now = self._clock()
        schedule = self.scheduler.schedule(now)
        if not schedule.entries:
            return False
        is_plain = not self._steering.changes(schedule)
        must_wait = not is_plain and self._steering.must_wait(schedule)
        self.scheduler.advance(schedule)
        self._pipeline.submit(schedule, now, sample=is_plain)
        if not is_plain and not must_wait:
            self._pipeline.sample(*self._steering.arrays(schedule))
        for sequence in schedule.admitted:
            request = self._answers[sequence.key].request
            if request.first_scheduled_time is None:
                request.first_scheduled_time = now
                self._admission.remove(request.request_id)
        return True

    @contextlib.contextmanager
    def _undone_after_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.failed_request_ids = self._abandon_steps()
            raise

    def _abandon_steps(self) -> frozenset[str]:
        """Undo every step in flight, as if never scheduled; returns the requests in them."""
        schedules = self._pipeline.abandon()
        for schedule in schedules:
            self.scheduler.rollback(schedule)
        keys = {entry.sequence.key for schedule in schedules for entry in schedule.entries}
        answers = [self._answers[key] for key in keys & self._answers.keys()]
        return frozenset(answer.request.request_id for answer in answers)

    def _update(self, step: InFlightStep, output: Any) -> list[OutputChunk]:
        """Process the tokens of a step: one of each sequence, or several after drafts."""
        now = self._clock()
        schedule = step.schedule
        token_ids = output.token_ids.tolist()
        rejected_rows = self.scheduler.complete(schedule, token_ids)
        # With two in flight it began when the one before it ended, not when it was submitted.
        started = max(step.started, self._last_step_end)
        record_step(self.events, schedule, self.scheduler, len(rejected_rows), started, now)
        if self.drafter is not None:
            self.drafter.end_step(schedule, output, now - started)
        self._last_step_end = now
        logprobs = read_logprobs(schedule.row_sequences, output)
        chunks = self._take_prompts(step, now) if schedule.scored else []
        rows = zip(schedule.row_sequences, token_ids, output.finite.tolist(), strict=True)
        for row, (sequence, token, is_finite) in enumerate(rows):
            # It may have ended since: aborted, its request failed, or at a token before this one.
            if sequence.is_finished or row in rejected_rows:
                continue
            answer = self._answers[sequence.key]
            if answer.failure is not None or not is_finite:
                chunks += self._fail(answer, now, answer.failure or not_finite(answer))
                continue
            try:
                if sequence.num_candidates:
                    best = output.top_token_ids[row], output.top_logprobs[row]
                    chunks += self._search(answer, *best, now)
                    continue
                text = self._append(answer, token, logprobs[row], now)
            except IntegrityError:
                raise
            except Exception as error:  # of its detokenizer or search: others are not affected
                problem = f"the answer to request {answer.request.request_id!r} cannot be made: "
                chunks += self._fail(answer, now, f"{problem}{type(error).__name__}: {error}")
                continue
            if answer.request.stream or (sequence.is_finished and answer.request.is_finished):
                chunks.append(self._chunk(answer, text, now, token, logprobs[row]))
        return chunks

    def _append(self, answer: Answer, token: int, logprob: TokenLogprob | None, now: float) -> str:
        """Add one sampled token; finish the answer if it ends here. Returns its new text."""
        sequence = answer.sequence
        if answer.request.first_token_time is None:
            answer.request.first_token_time = now
        if not sequence.num_output_tokens:
            self.events.record((now, "first_token", sequence.key))
        sequence.token_ids.append(token)
        self.num_sampled_tokens += 1
        if logprob is not None:
            sequence.logprobs.append(logprob)
            sequence.cumulative_logprob += logprob.logprob
        is_stop = token in answer.stop_token_ids  # before min_tokens they are masked out
        # The text ends before a stop token, as before a stop string.
        is_shown = not is_stop or sequence.params.include_stop_str_in_output
        text = answer.push(token) if is_shown else ""
        at_limit = len(sequence.token_ids) >= sequence.max_total_tokens
        if is_stop or (at_limit and answer.matched_stop is None):
            text += answer.flush()  # which may complete a stop string
        if is_stop:
            is_own = token in self.eos_token_ids and token not in sequence.params.stop_token_ids
            self.scheduler.finish(sequence, "stop", now, None if is_own else token)
        elif answer.matched_stop is not None:
            self.scheduler.finish(sequence, "stop", now, answer.matched_stop)
        elif at_limit:
            self.scheduler.finish(sequence, "length", now)
        return text
