"""What the engine reports about itself: its events for the log, and its numbers.

The scheduler records its own events.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from octavo.config import RuntimeOptions
from octavo.engine.admission import AdmissionLimits
from octavo.engine.block_manager import BlockManager
from octavo.engine.events import Event, EventLog
from octavo.engine.outputs import EngineStats
from octavo.engine.request import Request
from octavo.engine.schedule import Schedule, SchedulerLimits
from octavo.engine.scheduler import Scheduler
from octavo.errors import QueueFullError


def describe_engine(
    options: RuntimeOptions, limits: SchedulerLimits, blocks: BlockManager
) -> dict[str, Any]:
    """What a reader of the log, or a replay of it, needs to know about the engine."""
    return {
        "block_size": blocks.block_size,
        "num_blocks": blocks.num_blocks,
        "kv_windows": blocks.groups.windows,
        "max_waiting_requests": options.max_waiting_requests,
        "max_waiting_tokens": options.max_waiting_tokens,
        **asdict(limits),
    }


def arrival(request: Request, timeout: float | None, block_names: tuple[bytes, ...]) -> Event:
    """A request was accepted."""
    params, first = request.params, request.sequences[0]
    max_tokens = params.max_tokens
    if max_tokens is None:
        max_tokens = first.max_total_tokens - first.num_prompt_tokens
    asked = (first.num_prompt_tokens, max_tokens, params.n)
    event = (request.arrival_time, "arrived", request.request_id, *asked)
    return (*event, request.priority, timeout, block_names, request.num_beams)


def refusal(request_id: str, num_prompt_tokens: int, error: QueueFullError, now: float) -> Event:
    """A request found the queue full."""
    return (now, "refused", request_id, num_prompt_tokens, error.num_requests, error.num_tokens)


def record_step(
    events: EventLog,
    schedule: Schedule,
    scheduler: Scheduler,
    num_rejected: int,
    started: float,
    now: float,
) -> None:
    """A step has ended. num_rejected: of its drafts."""
    counts = (schedule.num_decodes, schedule.num_tokens, schedule.num_attended)
    state = (scheduler.num_running, scheduler.num_waiting, scheduler.blocks.num_free_blocks)
    events.record((now, "step", None, now - started, *counts, *state, schedule.number))
    drafted = [entry for entry in schedule.entries if entry.draft_token_ids]
    if drafted:
        num_sequences = sum([entry.branch is None for entry in drafted])
        # A branch computes again what it shares; its own drafts are those that it samples after.
        branches = [entry for entry in drafted if entry.branch is not None]
        num_repeated = sum([entry.num_new_tokens - entry.num_samples for entry in branches])
        num_tokens = sum([entry.num_new_tokens for entry in drafted])
        num_drafts = num_tokens - num_sequences - num_repeated
        sums = (num_sequences, num_drafts, num_drafts - num_rejected)
        events.record((now, "drafts", None, *sums, schedule.number, num_repeated))


def read_stats(
    scheduler: Scheduler, admission: AdmissionLimits, num_steps: int, num_sampled_tokens: int
) -> EngineStats:
    """See `Engine.stats`."""
    pool = scheduler.blocks.pool
    return EngineStats(
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        num_waiting_requests=admission.num_requests,
        num_waiting_tokens=admission.num_tokens,
        waiting_reason=scheduler.waiting_reason,
        num_blocks=scheduler.blocks.num_blocks,
        num_free_blocks=scheduler.blocks.num_free_blocks,
        num_cached_blocks=pool.num_cached,
        num_steps=num_steps,
        num_sampled_tokens=num_sampled_tokens,
        num_preemptions=scheduler.num_preemptions,
        num_prefix_queries=scheduler.prefix_cache.num_queries,
        num_prefix_hits=scheduler.prefix_cache.num_hits,
        num_evictions=pool.num_evictions,
        num_drafts=scheduler.draft_counts.num_drafts,
        num_draft_tokens=scheduler.draft_counts.num_draft_tokens,
        num_accepted_per_position=tuple(scheduler.draft_counts.accepted_per_position),
        num_draft_branches=scheduler.draft_counts.num_branches,
        num_draft_branch_wins=scheduler.draft_counts.num_branch_wins,
    )
