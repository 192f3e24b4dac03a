"""Requests and their sequences: what was asked, and the state of each answer.

A request asks for `params.n` answers; each answer is a `Sequence`, whose `sample_index` makes its
random numbers different. The states of a sequence:

    WAITING --admitted--> RUNNING --finish reason--> FINISHED
       ^                     |
       +-----preempted-------+        (aborted: from WAITING or RUNNING to FINISHED)

A preempted sequence keeps its tokens. It loses only its KV cache, and computes it again later, as
if prompt and answer so far were one long prompt.
"""

from __future__ import annotations

import enum
import hashlib
import time
from collections.abc import Collection, Hashable
from collections.abc import Sequence as SequenceOf
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from octavo.engine.adapters import NO_ADAPTER, Loan
from octavo.engine.outputs import TokenLogprob
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo.grammar.matcher import Grammar  # which needs NumPy

FinishReason = Literal["stop", "length", "abort", "error", "timeout"]
Rank = tuple[float, int, int]
"""The position of a sequence in every queue, smallest first; see `Scheduler.add`."""


class SequenceState(enum.Enum):
    """The state of a sequence in the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    IDLE = "idle"  # a beam of a search that has no part in it now


@dataclass(eq=False, slots=True, repr=False)
class Sequence:
    """One answer while it is computed.

    token_ids: prompt and answer so far. num_pending_tokens: how many more tokens the steps in
    flight sample; with drafts, at most so many. num_computed_tokens: how many of all of them have
    their keys and values in the cache, or will by the end of the steps in flight; 0 after a
    preemption; lowered by the number of drafts that are rejected. A sequence with one token left to
    compute is decoding, with more it is in prefill; there is no other difference.
    priority: lower is more urgent. arrival_time: seconds of the engine's clock. adapter: the LoRA
    adapter that it is computed with. leader: the first answer of the same request, whose prompt
    this one shares; None for the first itself. rope_set: 1 if it has outgrown the model's
    `rope_switch`; block_hashes are the names for that set. max_total_tokens: prompt and answer end
    at this length. watches_answer: whether its logits, or what it may sample, depend on the tokens
    of the answer by more than the model: by penalties, grammars, the user's own functions.
    num_cached_tokens: how many of its tokens were in the cache when it was first admitted.
    num_published_blocks: how many of its blocks are full and were offered to others. state_row:
    where the device keeps its last sampled token, while it runs. num_candidates: of a beam of a
    search, how many of the most probable next tokens are wanted; 0: it is no beam. A beam pauses
    after each token, until its search decides.
    """

    key: Hashable
    prompt_token_ids: InitVar[SequenceOf[int]]
    params: SamplingParams
    sample_index: int = 0
    _: KW_ONLY
    priority: int = 0
    arrival_time: float = 0.0
    cache_salt: str | None = None
    adapter: Loan = NO_ADAPTER
    leader: Sequence | None = None
    num_candidates: int = 0
    token_ids: list[int] = field(init=False)
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = field(default=0, init=False)
    num_pending_tokens: int = field(default=0, init=False)
    num_preemptions: int = field(default=0, init=False)
    watches_answer: bool = field(init=False)
    # Kept by the scheduler.
    rank: Rank = field(init=False)
    max_total_tokens: int = field(default=0, init=False)
    num_cached_tokens: int | None = field(default=None, init=False)
    num_published_blocks: int = field(default=0, init=False)
    state_row: int = field(default=-1, init=False)
    block_hashes: list[bytes] = field(default_factory=list, init=False)
    rope_set: int = field(default=0, init=False)
    state: SequenceState = field(default=SequenceState.WAITING, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    stop_reason: str | int | None = field(default=None, init=False)
    logprobs: list[TokenLogprob] = field(default_factory=list, init=False)
    cumulative_logprob: float = field(default=0.0, init=False)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list, init=False)
    drafting: Any = field(default=None, init=False)  # what the drafter knows about it

    def __post_init__(self, prompt_token_ids: SequenceOf[int]) -> None:
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.watches_answer = self.has_penalties or bool(self.params.logits_processors)
        self.rank = (self.arrival_time, 0, self.sample_index)

    def use_rope(self, rope_set: int) -> None:
        """Choose the set of rope frequencies, while no block is held: keys depend on it."""
        if rope_set != self.rope_set:
            self.rope_set = rope_set
            self.block_hashes.clear()

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer together, as far as they are known."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose keys and values are not in the cache; 1 while decoding."""
        return len(self.token_ids) + self.num_pending_tokens - self.num_computed_tokens

    @property
    def is_in_prefill(self) -> bool:
        """Whether it has more to compute than one token to decode from."""
        return self.num_uncomputed_tokens > (0 if self.samples_nothing else 1)

    @property
    def output_token_ids(self) -> tuple[int, ...]:
        """The answer so far."""
        return tuple(self.token_ids[self.num_prompt_tokens :])

    @property
    def samples_nothing(self) -> bool:
        """Whether it ends with its prompt: the prompt's log-probabilities are all it wants."""
        return self.params.max_tokens == 0

    @property
    def first_prompt_row(self) -> int:
        """The first token of the prompt whose logits are still needed, for the token after it.

        The prompt's last token where none are: its logits are those of the answer.
        """
        last = self.num_prompt_tokens - 1
        if self.params.prompt_logprobs is None or self.leader is not None:
            return last
        first = max(self.params.prompt_logprobs_start - 1, 0)
        return min(first + len(self.prompt_logprobs), last)

    @property
    def num_reusable_tokens(self) -> int:
        """How many tokens from the first on may come from the cache, which holds no logits."""
        last = self.num_prompt_tokens - 1
        first = self.first_prompt_row
        return len(self.token_ids) - 1 if first == last else first

    @property
    def has_penalties(self) -> bool:
        """Whether its logits depend on the tokens of the answer."""
        params = self.params
        penalties = params.frequency_penalty or params.presence_penalty
        return bool(penalties) or params.repetition_penalty != 1 or params.dry_multiplier > 0

    @property
    def takes_drafts(self) -> bool:
        """Whether its next tokens may be sampled in one step, after drafts.

        Not while it watches the answer, nor until min_tokens are sampled: the end is forbidden.
        """
        is_free = not self.watches_answer and not self.num_candidates
        return is_free and self.num_output_tokens >= self.params.min_tokens

    @property
    def is_paused(self) -> bool:
        """Whether it is a beam that waits for the others of its search."""
        return bool(self.num_candidates) and not self.num_uncomputed_tokens

    @property
    def is_finished(self) -> bool:
        """Whether the sequence has ended and left the scheduler."""
        return self.state is SequenceState.FINISHED

    def __repr__(self) -> str:
        return (
            f"Sequence({self.key!r}, {self.state.value}, tokens {self.num_tokens}, "
            f"computed {self.num_computed_tokens})"
        )


@dataclass(eq=False)
class Request:
    """A prompt with its sampling parameters, and the answers being made for it.

    prompt: the text, None when the prompt came as token ids. stream: report every step's progress
    and not the end alone. continues_prompt: the answer is read right after the prompt, as a
    completion, and not by itself, as a turn of a chat; matters for the first space of some
    tokenizers. kept_special_ids: special tokens that the text holds even where the others are
    skipped, such as the tags around calls of tools. priority: lower is more urgent. deadline: when
    it ends, answered or not. cache_salt: only requests with the same one share cached keys and
    values. grammar: what its answers follow. bad_words: as tokens. num_beams, num_candidates: of a
    search (search.py); 0: none. Times are seconds of the engine's clock, `time.monotonic` unless
    told otherwise.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    stream: bool = False
    continues_prompt: bool = True
    kept_special_ids: Collection[int] = ()
    priority: int = 0
    deadline: float | None = None
    cache_salt: str | None = None
    adapter: Loan = NO_ADAPTER
    grammar: Grammar | None = None
    bad_words: SequenceOf[list[int]] = ()
    num_beams: int = 0
    num_candidates: int = 0
    sequences: tuple[Sequence, ...] = ()
    error: str | None = None
    arrival_time: float = field(default_factory=time.monotonic)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None

    def __post_init__(self) -> None:
        first = self._sequence(0, None)
        number = self.num_beams or self.params.n
        self.sequences = (first, *(self._sequence(i, first) for i in range(1, number)))
        for beam in self.sequences[1 : self.num_beams]:
            beam.state = SequenceState.IDLE

    def _sequence(self, index: int, leader: Sequence | None) -> Sequence:
        return Sequence(
            (self.request_id, index),
            self.prompt_token_ids,
            self.params,
            index,
            priority=self.priority,
            arrival_time=self.arrival_time,
            cache_salt=self.cache_salt,
            adapter=self.adapter,
            leader=leader,
            num_candidates=self.num_candidates,
        )

    @property
    def is_finished(self) -> bool:
        """Whether every answer has ended."""
        return all(sequence.is_finished for sequence in self.sequences)


def derive_seed(engine_seed: int, label: str) -> int:
    """A 64-bit seed for a request that names none: a hash of the engine's seed and a label.

    The label is the request's id (or the caller's own key), so the same requests to an engine of
    the same seed give the same answers, and different requests independent ones.
    """
    # JSON can spell half a surrogate pair in a label, and UTF-8 has no place for it.
    text = f"{engine_seed}:{label}".encode("utf-8", errors="surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "little")
