"""What a user gets back: finished requests, and the pieces of a streamed one."""

from __future__ import annotations

import time
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Logprob:
    """An entry of a TokenLogprob that is read as a dict. rank: 1 for the most probable token."""

    logprob: float
    rank: int | None
    decoded_token: str | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability (natural, of the raw distribution) of one token of an answer or a prompt.

    top_token_ids and top_logprobs: the most probable tokens there, most probable first, as many as
    `SamplingParams.logprobs`, or `prompt_logprobs`, asked for. rank: the token's place among all of
    the vocabulary, 1 for the most probable one, the lower id first of equals. It can be read as
    vLLM's dict of token id -> Logprob, the token itself first.
    """

    token_id: int
    logprob: float
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
    rank: int | None = None

    def as_dict(self) -> dict[int, Logprob]:
        """Token id -> Logprob, the token itself first."""
        found = {self.token_id: Logprob(self.logprob, self.rank)}
        for rank, token in enumerate(self.top_token_ids, 1):
            found[token] = Logprob(self.top_logprobs[rank - 1], rank)
        return found

    def __getitem__(self, token_id: int) -> Logprob:
        return self.as_dict()[token_id]

    def __iter__(self) -> Iterator[int]:
        return iter(self.as_dict())

    def __len__(self) -> int:
        return len(self.as_dict())

    def keys(self) -> KeysView[int]:
        """The token ids."""
        return self.as_dict().keys()

    def values(self) -> ValuesView[Logprob]:
        """Their Logprobs."""
        return self.as_dict().values()

    def items(self) -> ItemsView[int, Logprob]:
        """Token ids with their Logprobs."""
        return self.as_dict().items()


@dataclass(frozen=True)
class CompletionOutput:
    """One answer.

    index: which of the n answers. text: without the stop string (unless asked for) and without
    special tokens (unless asked for). token_ids: all sampled ones, the token that ended it too.
    finish_reason: "stop" (end of text, a stop string or a stop token), "length" (max_tokens or the
    end of the context), "timeout", "abort" or "error"; None while the answer is not finished.
    stop_reason: the stop string or stop token id that matched, None for the model's own end of
    text.
    logprobs: one entry a token, None when none were asked for; cumulative_logprob: their sum.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    cumulative_logprob: float | None = None


@dataclass(frozen=True)
class RequestMetrics:
    """Times of one request, in seconds of `time.monotonic`, and counts."""

    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    finished_time: float
    num_prompt_tokens: int
    num_output_tokens: int  # of all answers together
    num_preemptions: int
    num_cached_tokens: int = 0  # of the prompt, found in the cache by the first answer

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token; None if there was none."""
        if self.first_token_time is None:
            return None
        return self.first_token_time - self.arrival_time

    @property
    def total_time(self) -> float:
        """Seconds from arrival to the end."""
        return self.finished_time - self.arrival_time

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first, over the time since the first: the speed of decoding.

        None with fewer than two tokens.
        """
        if self.first_token_time is None or self.num_output_tokens < 2:
            return None
        seconds = self.finished_time - self.first_token_time
        return (self.num_output_tokens - 1) / seconds if seconds > 0 else None


@dataclass(frozen=True)
class RequestOutput:
    """A finished request.

    prompt: the text, None when the prompt was given as token ids. outputs: the n answers in order.
    error: what went wrong when a finish_reason is "error", else None.
    prompt_logprobs: one entry for each prompt token, None where the token has none (the first, and
    those before prompt_logprobs_start); None as a whole when they were not asked for.
    embedding: of an embedding model what the prompt's vector is made of, float64 (dimensions,), not
    normalized (`embedding_of`); else None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    error: str | None
    metrics: RequestMetrics
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    embedding: NDArray[np.float64] | None = field(default=None, compare=False, repr=False)

    @property
    def text(self) -> str:
        """The text of the first answer."""
        return self.outputs[0].text


@dataclass(frozen=True)
class OutputChunk:
    """What one step added to one answer.

    index: which of the n answers. text: the new text; may be empty, as when a character's bytes
    are not complete yet or a stop string may have begun. token_ids, logprobs: the new tokens.
    finish_reason: set on the answer's last chunk. result: the whole request, on the request's
    last chunk.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = field(default=())
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    result: RequestOutput | None = None


@dataclass(frozen=True)
class EngineStats:
    """The state of an engine now, and what it has done since it began.

    Now: num_running and num_waiting are sequences (answers), num_waiting_requests those requests
    that have not started, num_waiting_tokens their prompts' tokens; waiting_reason says why the
    first in the queue waits (a key of `events.WAITING_REASONS`; None when the queue is empty);
    num_free_blocks are blocks of the KV cache that no sequence holds; num_cached_blocks of these
    have content that may be used again. Since it began: steps, tokens sampled, preemptions; prompt
    tokens looked up in the prefix cache and found there; cached blocks evicted; how often a
    sequence had drafts, the drafts, and how many in each place were accepted. num_draft_branches:
    chains of drafts beside a sequence's first; num_draft_branch_wins: those that were the best.
    """

    num_running: int
    num_waiting: int
    num_waiting_requests: int
    num_waiting_tokens: int
    waiting_reason: str | None
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_steps: int
    num_sampled_tokens: int
    num_preemptions: int
    num_prefix_queries: int
    num_prefix_hits: int
    num_evictions: int
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_per_position: tuple[int, ...] = ()
    num_draft_branches: int = 0
    num_draft_branch_wins: int = 0

    @property
    def num_accepted_tokens(self) -> int:
        """Drafts that were right, as all before them."""
        return sum(self.num_accepted_per_position)

    @property
    def kv_cache_usage(self) -> float:
        """The part of the KV cache's blocks that sequences hold, 0 to 1."""
        return 1.0 - self.num_free_blocks / self.num_blocks


def refused_output(prompt: object, error: Exception) -> RequestOutput:
    """The output of a request that was never started. prompt: what was given; a text is kept."""
    now = time.monotonic()
    metrics = RequestMetrics(now, None, None, now, 0, 0, 0)
    text = prompt if isinstance(prompt, str) else None
    return RequestOutput("", text, (), (), str(error), metrics)
