"""The seam between the engine and a search over several beams (octavo.search).

The beams of a request are sequences that decode together. Each one pauses after a token: it
reports the most probable next ones, and samples nothing. When all have reported, the search says
how the beams go on, and sequences fork: a beam takes over the tokens of any other, shares its full
blocks of the KV cache and copies the last one (`BlockManager.fork`).

A beam that was preempted, or gets no block, computes its tokens again. The others wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any, NamedTuple, Protocol

from octavo.engine.request import FinishReason, Sequence, SequenceState
from octavo.engine.scheduler import Scheduler
from octavo.errors import InvalidArgumentError
from octavo.sampling_params import SamplingParams

MAX_CANDIDATES = 512  # that the sampler of a GPU lists


class Candidates(NamedTuple):
    """A beam's most probable next tokens, most probable first, and their log-probabilities."""

    token_ids: list[int]
    logprobs: list[float]


class Move(NamedTuple):
    """A beam goes on: with the tokens of beam `parent`, and then `token`."""

    parent: int
    token: int


class Search(Protocol):
    """Chooses how the beams of one request go on. It belongs to that request.

    num_beams: the most beams at a time. num_candidates: how many tokens each beam reports.
    """

    num_beams: int
    num_candidates: int

    def advance(self, rows: SequenceOf[Candidates]) -> SequenceOf[Move]:
        """The next beams, at most num_beams; none ends the search.

        rows: of each beam as the last call left them, in order; of one, the prompt, at first.
        """

    def results(self) -> list[tuple[SequenceOf[int], FinishReason, float]]:
        """num_beams answers, the best first: tokens, why each ended, its log-probability."""


def check_search(
    search: Search,
    num_prompt_tokens: int,
    params: SamplingParams,
    stream: bool,
    scheduler: Scheduler,
    vocab_size: int,
) -> None:
    """Raise an InvalidArgumentError with the reason why the search cannot be made."""
    num_beams, limits, blocks = search.num_beams, scheduler.limits, scheduler.blocks
    if stream:
        raise InvalidArgumentError(
            "a search over beams cannot be streamed: which beam wins is known at its end only"
        )
    if params.n != 1 or params.prompt_logprobs is not None:
        raise InvalidArgumentError(
            "a search over beams is asked for with n or prompt_logprobs; expected neither"
        )
    if params.logits_processors:
        raise InvalidArgumentError(
            "logits_processors is given, but a search over beams takes the model's own "
            "probabilities: leave it out, or sample"
        )
    if params.structured_outputs is not None:
        raise InvalidArgumentError(
            "structured_outputs is given, but a search over beams follows no grammar: leave it out"
        )
    if num_beams > limits.max_num_seqs:
        raise InvalidArgumentError(
            f"the search has {num_beams} beams; expected at most {limits.max_num_seqs} "
            f"(max_num_seqs): ask for fewer, or raise it"
        )
    most = min(MAX_CANDIDATES, vocab_size)
    if search.num_candidates > most:
        raise InvalidArgumentError(
            f"the search needs the {search.num_candidates} most probable tokens of each beam; "
            f"expected at most {most}: ask for fewer beams, or fewer stop_token_ids"
        )
    total = scheduler.max_total_tokens(num_prompt_tokens, params.max_tokens)
    num_alone = blocks.groups.blocks_in_all(total)
    num_shared = 0
    if not blocks.has_windows:
        num_shared = (num_prompt_tokens - 1) // blocks.block_size
    num_needed = num_alone + (num_beams - 1) * (num_alone - num_shared)
    if num_needed > blocks.num_blocks:
        raise InvalidArgumentError(
            f"{num_beams} beams of {total} tokens may need {num_needed} blocks; the KV cache has "
            f"{blocks.num_blocks}: lower beam_width or max_tokens, or raise num_kv_blocks"
        )


class BeamGroup:
    """The sequences of one search; sequence i is beam i."""

    def __init__(self, request_id: str, search: Search, beams: SequenceOf[Sequence]) -> None:
        self.search = search
        self._request_id = request_id
        self._beams = beams
        self._num_alive = 1
        self._rows: dict[int, Candidates] = {}

    def take(
        self, beam: Sequence, tokens: Any, logprobs: Any, scheduler: Scheduler, now: float
    ) -> bool:
        """Note what a beam reports; when all have, fork. False: the search has ended.

        A report of a beam that has got other tokens since, or lost what it computed, does not
        count: it will report again. now: for the event log, in seconds.
        """
        if not beam.is_paused:
            return True
        count = self.search.num_candidates
        found = Candidates(tokens[:count].tolist(), logprobs[:count].tolist())
        self._rows[beam.sample_index] = found
        alive = self._beams[: self._num_alive]
        # One that computes again what it lost is waited for, although its report is known.
        is_busy = any(s.state is SequenceState.RUNNING and not s.is_paused for s in alive)
        if len(self._rows) < len(alive) or is_busy or any(s.num_pending_tokens for s in alive):
            return True
        moves = self.search.advance([self._rows[index] for index in range(len(alive))])
        self._rows = {}
        if moves:
            parents = [move.parent for move in moves]
            scheduler.events.record((now, "forked", self._request_id, parents))
            self._fork(moves, scheduler)
        return bool(moves)

    def _fork(self, moves: SequenceOf[Move], scheduler: Scheduler) -> None:
        running = SequenceState.RUNNING
        children = self._beams[: len(moves)]
        parents: dict[int, Sequence] = {}
        old = [(list(s.token_ids), list(s.block_hashes)) for s in self._beams]
        computed = [(s.num_computed_tokens, s.num_published_blocks) for s in self._beams]
        for child in children:
            if child.state is SequenceState.IDLE:
                child.state = SequenceState.WAITING
                scheduler.add(child)
        room = scheduler.num_places
        for index, (child, move) in enumerate(zip(children, moves, strict=True)):
            parent = self._beams[move.parent]
            if parent.state is running and (child.state is running or room > 0):
                room -= child.state is not running
                parents[index] = parent
        losers = [s for i, s in enumerate(self._beams) if s.state is running and i not in parents]
        table = {self._beams[index].key: parent.key for index, parent in parents.items()}
        num_tokens = max((s.num_computed_tokens for s in parents.values()), default=0)
        scheduler.fork(table, [s.key for s in losers], num_tokens)
        for index, (child, move) in enumerate(zip(children, moves, strict=True)):
            tokens, names = old[move.parent]
            child.token_ids, child.block_hashes = [*tokens, move.token], list(names)
            if index not in parents:
                continue
            if not len(scheduler.blocks.block_table(child.key)):
                losers.append(child)
            else:
                if child.state is not running:
                    scheduler.resume(child)
                child.num_computed_tokens, child.num_published_blocks = computed[move.parent]
                child.num_cached_tokens = child.num_cached_tokens or 0
                child.rope_set = self._beams[move.parent].rope_set
        for loser in losers:
            if loser.state is running:
                scheduler.requeue(loser)
            else:
                scheduler.blocks.free(loser.key)
        for beam in self._beams[len(moves) : self._num_alive]:
            scheduler.rest(beam)
        self._num_alive = len(moves)
