"""Embeddings: the engine's steps as they are, and a drafter that proposes nothing but keeps states.

A request for an embedding ends with its prompt and samples nothing, so no step multiplies by the
head. Every step returns the hidden states behind the final norm, of all its tokens; `Recorder`
takes from them what the vector needs. What is kept lies in `Sequence.drafting`, and goes with it.

The bits of a vector do not depend on how the prompt was computed: those of the states do not (on
the CPU, or with `deterministic`), and the states of a mean are added one by one, in order. After a
preemption a sequence begins anew. A beginning that comes from the prefix cache has no states, which
only the last token's vector can do without: with other kinds of pooling nothing is looked up.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from octavo.config import RuntimeOptions
from octavo.engine.block_pool import IntegrityError
from octavo.engine.drafter import Drafter
from octavo.engine.engine import Engine
from octavo.engine.outputs import OutputChunk, RequestMetrics, RequestOutput
from octavo.engine.pipeline import InFlightStep, StepRuntime
from octavo.engine.request import Sequence
from octavo.engine.schedule import Schedule
from octavo.errors import EngineStepError, InvalidArgumentError
from octavo.models.pooling import Pooling
from octavo.sampling_params import SamplingParams

Float32 = NDArray[np.float32]
EMBED = SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=2**31 - 1)
"""A request for an embedding: no answer, and log-probabilities of no token of the prompt."""

_TINY = 1e-12  # a vector that is 0 stays so, as in torch's normalize


@dataclass(frozen=True, eq=False)
class EmbeddingOutput:
    """A vector. embedding: float32, (dimensions,)."""

    embedding: Float32


@dataclass(frozen=True, eq=False)
class EmbeddingRequestOutput:
    """The embedding of one prompt.

    prompt: the text, None when the prompt was given as token ids. outputs: under vLLM's name the
    vector, which is also `embedding`.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: EmbeddingOutput
    metrics: RequestMetrics

    @property
    def embedding(self) -> Float32:
        """The vector, float32 (dimensions,)."""
        return self.outputs.embedding


@dataclass(eq=False)
class Pooled:
    """What is kept of a sequence's states.

    values: (dimensions,), float64: the state of one token, or the sum over all so far. num_tokens:
    of the prompt, how many the steps that have ended computed.
    """

    values: NDArray[np.float64]
    num_tokens: int = 0


class Recorder(Drafter):
    """Keeps of each prompt the states that its vector is made of."""

    states = "tokens"

    def __init__(self, pooling: Pooling) -> None:
        self.pooling = pooling

    def end_step(self, schedule: Schedule, output: Any, seconds: float) -> None:
        """Take the states of the step's tokens; output.states: (tokens, dimensions), float32."""
        first = 0
        for sequence, start, num_new_tokens, *_ in schedule.entries:
            rows = output.states[first : first + num_new_tokens]
            first += num_new_tokens
            if not sequence.is_finished:
                self._take(sequence, start, rows)

    def _take(self, sequence: Sequence, start: int, rows: Float32) -> None:
        if self.pooling.kind == "last":
            if start + len(rows) == sequence.num_prompt_tokens:
                sequence.drafting = Pooled(rows[-1].astype(np.float64))
            return
        if start == 0:  # begun, or begun anew
            sequence.drafting = Pooled(np.zeros(self.pooling.dimensions))
        pooled: Pooled | None = sequence.drafting
        if pooled is None or pooled.num_tokens != start:
            raise IntegrityError(f"{sequence!r} lacks states before those from token {start} on")
        if self.pooling.kind == "mean":
            for row in rows:
                pooled.values += row
        elif start == 0:
            pooled.values += rows[0]
        pooled.num_tokens += len(rows)

    def vector(self, sequence: Sequence) -> NDArray[np.float64]:
        """What a sequence whose prompt is computed has, as it is: float64 (dimensions,)."""
        pooled: Pooled = sequence.drafting
        return pooled.values / (pooled.num_tokens if self.pooling.kind == "mean" else 1)


class PoolingEngine(Engine):
    """An engine of an embedding model: its requests are `EMBED`, their results have `embedding`."""

    def __init__(
        self, runtime: StepRuntime, options: RuntimeOptions, *, pooling: Pooling, **more: Any
    ) -> None:
        """more: as of `Engine`, but for the drafter."""
        if pooling.kind != "last":
            options = replace(options, enable_prefix_caching=False)
        self.pooling = pooling
        self.recorder = Recorder(pooling)
        super().__init__(runtime, options, drafter=self.recorder, **more)

    def check_request(self, prompt_token_ids: SequenceOf[int], params: SamplingParams) -> None:
        """As `Engine`; an InvalidArgumentError for a request that wants an answer."""
        if params != EMBED:
            raise InvalidArgumentError(
                "this model gives embeddings and makes no texts: ask for them with llm.embed or "
                "/v1/embeddings, or load a model that makes texts (runner='generate', if this is "
                "one)"
            )
        super().check_request(prompt_token_ids, params)

    def _take_prompts(self, step: InFlightStep, now: float) -> list[OutputChunk]:
        """End the requests whose prompts are computed; with an error where a state is no number."""
        chunks: list[OutputChunk] = []
        for _, sequence, _, _, is_last in step.schedule.scored:
            if not is_last or sequence.is_finished:
                continue
            if not np.isfinite(sequence.drafting.values).all():
                answer = self._answers[sequence.key]
                chunks += self._fail(
                    answer,
                    now,
                    "the model's hidden states hold a NaN or an infinity in request "
                    f"{answer.request.request_id!r}: its weights may be damaged, or its values "
                    "exceed the dtype; `octavo diff` shows where they first appear",
                )
        return chunks + super()._take_prompts(step, now)

    def _remove(self, request_id: str, now: float) -> RequestOutput:
        sequence = self._requests[request_id][0].sequence
        output = super()._remove(request_id, now)
        if sequence.finish_reason != "length":
            return replace(output, prompt_logprobs=None)
        return replace(output, prompt_logprobs=None, embedding=self.recorder.vector(sequence))


def normalized(values: NDArray[Any]) -> Float32:
    """The vector divided by its length, float32; computed in float64."""
    wide = values.astype(np.float64)
    return np.asarray(wide / max(float(np.sqrt((wide * wide).sum())), _TINY), np.float32)


def embedding_of(
    result: RequestOutput, pooling: Pooling, dimensions: int | None, normalize: bool | None = None
) -> Float32:
    """The vector of a request that has ended, made of its first `dimensions` numbers.

    normalize: divided by its length, or not; None: as the model's files say. EngineStepError where
    there is none.
    """
    if result.embedding is None:
        reason = result.outputs[0].finish_reason
        raise EngineStepError(result.error or f"the request has no embedding: it ended by {reason}")
    part = result.embedding[:dimensions]
    is_wanted = pooling.normalize if normalize is None else normalize
    return normalized(part) if is_wanted else part.astype(np.float32)


def embedding_output(
    result: RequestOutput, pooling: Pooling, dimensions: int | None, normalize: bool | None
) -> EmbeddingRequestOutput:
    """A finished request as the users of `embed` get it."""
    return EmbeddingRequestOutput(
        result.request_id,
        result.prompt,
        result.prompt_token_ids,
        EmbeddingOutput(embedding_of(result, pooling, dimensions, normalize)),
        result.metrics,
    )
