"""What the page shows of the engine: running and waiting, the KV cache block by block, speeds."""

from __future__ import annotations

import base64
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from octavo.engine.events import WAITING_REASONS
from octavo.server.service import Service
from octavo.server.step_stats import StepStats

if TYPE_CHECKING:
    from octavo.engine.engine import Engine

BLANK, CACHED, SHARED, FIRST_OWNER = 0, 1, 2, 3  # what a byte of the block map means
_NUM_OWNERS = 250  # different bytes for sequences; they are used again beyond
_WINDOW = 2.0  # seconds over which speeds are measured
_MOST_REQUESTS = 64  # listed; the others are counted only


def block_map(engine: Engine) -> tuple[bytes, dict[str, list[int]]]:
    """A byte for each block, and for each running request the bytes of its answers.

    To be called in the engine's thread.
    """
    pool = engine.blocks.pools[0]
    states = bytearray(
        CACHED if pool.is_published(block) else BLANK for block in range(pool.num_blocks)
    )
    owners: dict[str, list[int]] = {}
    keys = sorted((key for key in engine.blocks.holders() if isinstance(key, tuple)), key=str)
    for key in keys:
        # Of its name, so that a request keeps its colour from one look to the next.
        owner = FIRST_OWNER + hash(key) % _NUM_OWNERS
        owners.setdefault(key[0], []).append(owner)
        for block in engine.blocks.block_table(key):
            states[block] = SHARED if pool.num_holders(block) > 1 else owner
    return bytes(states), owners


class LiveView:
    """Remembers the last steps of a service, and describes its engine when asked."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._steps: deque[tuple[float, int, int]] = deque(maxlen=4096)
        self._num_drawn = 0
        service.observers.append(self._observe_step)

    def _observe_step(self, stats: StepStats) -> None:
        """After every step."""
        drawn = stats.engine.num_sampled_tokens
        self._steps.append((time.monotonic(), stats.num_tokens, drawn - self._num_drawn))
        self._num_drawn = drawn

    async def describe(self) -> dict[str, Any]:
        """Everything the page shows, as JSON has it."""
        service = self._service
        model = service.model_to_watch()
        states, owners = await service.engine.call(lambda found: block_map(found.engine))
        engine = model.engine
        return {
            "model": service.name,
            "phase": service.phase,
            "uptime": round(time.time() - service.started, 1),
            "max_model_len": model.max_model_len,
            "max_num_seqs": engine.options.max_num_seqs,
            "blocks": {
                "size": engine.options.block_size,
                "map": base64.b64encode(states).decode("ascii"),
            },
            "stats": self._stats(),
            "speed": self._speed(),
            "requests": self._requests(owners),
        }

    def _stats(self) -> dict[str, Any]:
        stats = self._service.stats
        if stats is None:
            return {"num_running": 0, "num_waiting": 0, "waiting_for": None}
        now = stats.engine
        reason = None if now.waiting_reason is None else WAITING_REASONS[now.waiting_reason]
        return {
            "num_running": now.num_running,
            "num_waiting": now.num_waiting,
            "waiting_for": reason,
            "num_used_blocks": now.num_blocks - now.num_free_blocks,
            "num_cached_blocks": now.num_cached_blocks,
            "num_steps": now.num_steps,
            "num_drawn_tokens": now.num_sampled_tokens,
            "num_preemptions": now.num_preemptions,
            "num_evictions": now.num_evictions,
            "num_prefix_queries": now.num_prefix_queries,
            "num_prefix_hits": now.num_prefix_hits,
        }

    def _speed(self) -> dict[str, Any]:
        now = time.monotonic()
        recent = [step for step in self._steps if now - step[0] <= _WINDOW]
        metrics = self._service.metrics
        firsts = sorted(metrics.recent_ttft) if metrics is not None else []
        return {
            "tokens_per_second": round(sum(step[2] for step in recent) / _WINDOW, 1),
            "computed_per_second": round(sum(step[1] for step in recent) / _WINDOW, 1),
            "steps_per_second": round(len(recent) / _WINDOW, 1),
            "ttft_p50": firsts[len(firsts) // 2] if firsts else None,
            "ttft_last": metrics.recent_ttft[-1] if metrics is not None and firsts else None,
        }

    def _requests(self, owners: dict[str, list[int]]) -> list[dict[str, Any]]:
        now = time.monotonic()
        streams = self._service.engine.open_streams()
        return [
            {
                "id": stream.request.request_id,
                "state": "running" if stream.request.request_id in owners else "waiting",
                "owners": owners.get(stream.request.request_id, []),
                "age": round(now - stream.arrival_time, 2),
                "ttft": None
                if stream.first_token_time is None
                else round(stream.first_token_time - stream.arrival_time, 4),
                "prompt_tokens": len(stream.request.prompt.token_ids),
                "output_tokens": stream.num_output_tokens,
                "n": stream.request.params.n,
                "priority": stream.request.priority,
            }
            for stream in streams[:_MOST_REQUESTS]
        ]
