"""The page at /, the documentation at /docs, their files, and what they show of the engine."""

from __future__ import annotations

import asyncio
import base64
import html
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from octavo.engine.admission import whole_id
from octavo.engine.events import WAITING_REASONS, EventLog
from octavo.server.errors import ApiError
from octavo.server.service import Service
from octavo.server.stream import ResultStream
from octavo.trace.explain import explain
from octavo.trace.log_file import LogFile, log_of

if TYPE_CHECKING:
    from octavo.engine.engine import Engine

_STATIC = Path(__file__).parent / "static"
# Nothing from another host, nothing inline, no other page's frame around it. Text becomes markup
# only through DOMPurify, in a browser that knows trusted types.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
# Asked for again each time, which costs a 304: files of two versions of octavo do not mix.
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
BLANK, CACHED, SHARED, FIRST_OWNER = 0, 1, 2, 3  # what a byte of the block map means
_NUM_OWNERS = 250  # different bytes for sequences; they are used again beyond
_WINDOW = 2.0  # seconds over which speeds are measured
_MOST_REQUESTS = 64  # listed; the others are counted only


class _JsonLines(Response):
    media_type = "application/x-ndjson"


class _PageFiles(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_HEADERS)
        return response


def add_pages(app: FastAPI, service: Service) -> None:
    """Add the pages and the routes under /engine."""
    app.mount("/static", _PageFiles(directory=_STATIC), name="static")

    async def copy_events() -> EventLog:
        """The ring as it is now, so that it can be read while the engine goes on."""
        service.model_to_watch()
        return await service.engine.call(lambda model: _copy(model.engine.events))

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_STATIC / "index.html", headers=_HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def documentation(request: Request) -> Response:
        return HTMLResponse(_documentation(service, str(request.base_url)), headers=_HEADERS)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return FileResponse(_STATIC / "icon.svg", media_type="image/svg+xml")

    @app.get("/engine")
    async def engine() -> Response:
        """Running and waiting requests, the KV cache block by block, speeds."""
        return JSONResponse(await describe_engine(service))

    @app.get("/engine/requests/{request_id}", responses={404: {"description": "Unknown, or past."}})
    async def explanation(request_id: str) -> Response:
        """Where a request's time went, in sentences, as far as the event log's ring remembers.

        Of a completion with several prompts each is a member of "requests".
        """
        copy = await copy_events()
        found = await asyncio.to_thread(lambda: _explain(log_of(copy), request_id))
        if not found:
            message = f"the event log has no request {request_id!r}: it never came, or long ago"
            raise ApiError(404, message, param="request_id")
        is_one = found[0]["id"] == request_id
        return JSONResponse(found[0] if is_one else {"id": request_id, "requests": found})

    @app.get("/engine/events", response_class=_JsonLines)
    async def events() -> Response:
        """The scheduler's last decisions, for `octavo explain`, `trace` and `replay`."""
        copy = await copy_events()
        lines = await asyncio.to_thread(lambda: "".join(f"{line}\n" for line in copy.as_jsonl()))
        return _JsonLines(lines)


def _documentation(service: Service, url: str) -> str:
    """docs.html, with this server's address and model in its examples, and what the model does."""
    key = ' \\\n  -H "Authorization: Bearer $OCTAVO_API_KEY"' if service.options.api_keys else ""
    # Within a string of JSON, within the single quotes of a shell.
    model = json.dumps(service.name)[1:-1].replace("'", "\\u0027")
    values = {"address": url.rstrip("/"), "name": service.name, "model": model, "key": key}
    loaded = service.engine.model
    other = "vectors" if loaded is None or loaded.pooling is None else "texts"
    page = (_STATIC / "docs.html").read_text(encoding="utf-8")
    page = re.sub(rf" *<!-- {other} -->.*?<!-- end -->\n", "", page, flags=re.DOTALL)
    for name, value in values.items():
        page = page.replace(f"{{{{{name}}}}}", html.escape(value))
    return page


def _explain(log: LogFile, request_id: str) -> list[dict[str, Any]]:
    """The request of this id, or those of its prompts."""
    names = [name for name in log.request_ids if request_id in (name, whole_id(name))]
    return [{"id": name, "sentences": list(explain(log, name))} for name in names]


def _copy(events: EventLog) -> EventLog:
    copy = EventLog(max(1, len(events)), events.header)
    for event in events:
        copy.record(event)
    copy.num_recorded = events.num_recorded
    return copy


def block_map(engine: Engine) -> tuple[bytes, dict[str, list[int]]]:
    """A byte for each block, and for each running request the bytes of its answers.

    To be called in the engine's thread.
    """
    pool = engine.blocks.pool
    states = bytearray(
        CACHED if pool.is_published(block) else BLANK for block in range(pool.num_blocks)
    )
    owners: dict[str, list[int]] = {}
    keys = sorted((key for key in engine.blocks.holders() if isinstance(key, tuple)), key=str)
    for key in keys:
        # Of its name, so that a request keeps its colour from one look to the next.
        owner = FIRST_OWNER + hash(key) % _NUM_OWNERS
        owners.setdefault(key[0], []).append(owner)
        for block in engine.blocks.blocks_of(key):
            states[block] = SHARED if pool.num_holders(block) > 1 else owner
    return bytes(states), owners


async def describe_engine(service: Service) -> dict[str, Any]:
    """Everything the page shows of the engine as it is now, as JSON has it."""
    model = service.model_to_watch()
    states, owners = await service.engine.call(lambda found: block_map(found.engine))
    options = model.engine.options
    streams = service.engine.open_streams()[:_MOST_REQUESTS]
    return {
        "model": service.name,
        "phase": service.phase,
        "uptime": round(time.time() - service.started, 1),
        "max_model_len": model.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "sampling_defaults": dict(service.options.defaults),
        "blocks": {"size": options.block_size, "map": base64.b64encode(states).decode("ascii")},
        "stats": _stats(service),
        "speed": _speed(service),
        "requests": [_describe_request(stream, owners) for stream in streams],
    }


def _stats(service: Service) -> dict[str, Any]:
    if service.stats is None:
        return {"num_running": 0, "num_waiting": 0, "waiting_for": None}
    now = service.stats.engine
    return {
        "num_running": now.num_running,
        "num_waiting": now.num_waiting,
        "waiting_for": now.waiting_reason and WAITING_REASONS[now.waiting_reason],
        "num_used_blocks": now.num_blocks - now.num_free_blocks,
        "num_cached_blocks": now.num_cached_blocks,
        "num_steps": now.num_steps,
        "num_drawn_tokens": now.num_sampled_tokens,
        "num_preemptions": now.num_preemptions,
        "num_evictions": now.num_evictions,
        "num_prefix_queries": now.num_prefix_queries,
        "num_prefix_hits": now.num_prefix_hits,
    }


def _speed(service: Service) -> dict[str, Any]:
    now = time.monotonic()
    recent = [step for step in service.recent_steps if now - step[0] <= _WINDOW]
    firsts = list(service.metrics.recent_ttft) if service.metrics is not None else []
    return {
        "tokens_per_second": round(sum(step[2] for step in recent) / _WINDOW, 1),
        "computed_per_second": round(sum(step[1] for step in recent) / _WINDOW, 1),
        "steps_per_second": round(len(recent) / _WINDOW, 1),
        "ttft_p50": sorted(firsts)[len(firsts) // 2] if firsts else None,
        "ttft_last": firsts[-1] if firsts else None,
    }


def _describe_request(stream: ResultStream, owners: dict[str, list[int]]) -> dict[str, Any]:
    request, first = stream.request, stream.first_token_time
    return {
        "id": request.request_id,
        "state": "running" if request.request_id in owners else "waiting",
        "owners": owners.get(request.request_id, []),
        "age": round(time.monotonic() - stream.arrival_time, 2),
        "ttft": None if first is None else round(first - stream.arrival_time, 4),
        "prompt_tokens": len(request.prompt.token_ids),
        "output_tokens": stream.num_output_tokens,
        "n": request.params.n,
        "priority": request.priority,
    }
