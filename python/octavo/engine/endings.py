"""How requests end: with a search's answers, without an answer, early, or with an error."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from octavo.engine.adapters import AdapterTable
from octavo.engine.admission import AdmissionLimits, Deadlines
from octavo.engine.answer import Answer, not_finite, request_output
from octavo.engine.outputs import OutputChunk, RequestOutput, TokenLogprob
from octavo.engine.pipeline import InFlightStep
from octavo.engine.prompt_logprobs import take_prompt_rows
from octavo.engine.request import FinishReason
from octavo.engine.scheduler import Scheduler
from octavo.engine.search import BeamGroup
from octavo.engine.steering import Steering


class Endings:
    """The part of the engine that ends requests and makes their last chunks."""

    adapters: AdapterTable
    scheduler: Scheduler
    num_sampled_tokens: int
    _admission: AdmissionLimits
    _deadlines: Deadlines
    _steering: Steering
    _answers: dict[object, Answer]  # by the key of their sequence
    _requests: dict[str, list[Answer]]
    _searches: dict[str, BeamGroup]

    def _take_prompts(self, step: InFlightStep, now: float) -> list[OutputChunk]:
        """Keep the log-probabilities of prompts; end the requests that sample nothing."""
        chunks: list[OutputChunk] = []
        scored = step.schedule.scored
        for sequence in take_prompt_rows(scored, step.prompt_rows):
            answer = self._answers[sequence.key]
            chunks += self._fail(answer, now, not_finite(answer))
        for _, sequence, _, _, is_last in scored:
            if is_last and not sequence.is_finished:
                answer = self._answers[sequence.key]
                self.scheduler.finish(sequence, "length", now)
                if answer.request.stream or answer.request.is_finished:
                    chunks.append(self._chunk(answer, answer.flush(), now))
        return chunks

    def _search(self, answer: Answer, tokens: Any, logprobs: Any, now: float) -> list[OutputChunk]:
        """Give a beam's most probable next tokens to its search; the results, if it ends here."""
        request = answer.request
        group = self._searches[request.request_id]
        request.first_token_time = request.first_token_time or now
        self.num_sampled_tokens += 1
        if group.take(answer.sequence, tokens, logprobs, self.scheduler, now):
            return []
        answers = self._requests[request.request_id]
        for each, (found, reason, logprob) in zip(answers, group.search.results(), strict=True):
            each.set_answer(found, logprob)
            is_stop = reason == "stop" and found[-1] in each.sequence.params.stop_token_ids
            self.scheduler.finish(each.sequence, reason, now, found[-1] if is_stop else None)
        return [self._chunk(answers[-1], "", now)]

    def _fail(self, answer: Answer, now: float, problem: str) -> list[OutputChunk]:
        """End the answer's whole request with an error."""
        answer.request.error = problem
        return self._end_all(answer.request.request_id, "error", now)

    def _end_all(self, request_id: str, reason: FinishReason, now: float) -> list[OutputChunk]:
        """End every answer of a request that has not ended yet; returns their last chunks."""
        chunks = []
        ending = [a for a in self._requests[request_id] if not a.sequence.is_finished]
        for answer in ending:
            text = ""
            with suppress(Exception):  # of its detokenizer: it ends without the rest of its text
                text = answer.flush()
            self.scheduler.finish(answer.sequence, reason, now)
            if answer.request.stream or answer is ending[-1]:
                chunks.append(self._chunk(answer, text, now))
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
            self._steering.remove(answer.sequence.key)
        self._searches.pop(request_id, None)
        self._admission.remove(request_id)
        self._deadlines.remove(request_id)
        self.adapters.release(answers[0].request.adapter)
        return request_output(answers, now)
