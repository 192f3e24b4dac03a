"""The engine's numbers, gathered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.engine.outputs import EngineStats

if TYPE_CHECKING:
    from octavo.engine.engine import Engine


def read_stats(engine: Engine) -> EngineStats:
    """See `Engine.stats`."""
    scheduler, pool = engine.scheduler, engine.blocks.pool
    return EngineStats(
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        num_waiting_requests=engine.num_waiting_requests,
        num_waiting_tokens=engine.num_waiting_tokens,
        waiting_reason=scheduler.waiting_reason,
        num_blocks=pool.num_blocks,
        num_free_blocks=pool.num_free,
        num_cached_blocks=pool.num_cached,
        num_steps=engine.num_steps,
        num_drawn_tokens=engine.num_drawn_tokens,
        num_preemptions=scheduler.num_preemptions,
        num_prefix_queries=scheduler.prefix_cache.num_queries,
        num_prefix_hits=scheduler.prefix_cache.num_hits,
        num_evictions=pool.num_evictions,
    )
