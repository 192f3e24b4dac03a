"""The page at /, its files, and what it asks of the engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from octavo.engine.events import EventLog
from octavo.errors import InvalidArgumentError
from octavo.server.errors import ApiError
from octavo.server.live import LiveView
from octavo.server.service import Service
from octavo.trace.explain import explain
from octavo.trace.log_file import log_of

if TYPE_CHECKING:
    from octavo.model import LoadedModel

_STATIC = Path(__file__).parent / "static"
# Nothing from another host, nothing inline, nobody's frame around it.
_POLICY = (
    "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class _JsonLines(Response):
    media_type = "application/x-ndjson"


def add_pages(app: FastAPI, service: Service) -> None:
    """Add the page and the routes under /engine."""
    live = LiveView(service)
    app.mount("/static", StaticFiles(directory=_STATIC), name="static")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
        return FileResponse(_STATIC / "index.html", headers=headers)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return FileResponse(_STATIC / "icon.svg", media_type="image/svg+xml")

    @app.get("/engine")
    async def engine() -> Response:
        """Running and waiting requests, the KV cache block by block, speeds."""
        return JSONResponse(await live.describe())

    @app.get("/engine/requests/{request_id}", responses={404: {"description": "Unknown, or past."}})
    async def explanation(request_id: str) -> Response:
        """Where a request's time went, in sentences, as far as the event log's ring remembers."""
        service.model_to_watch()
        copy = await service.engine.call(_copy_events)
        try:
            sentences = await asyncio.to_thread(_explain, copy, request_id)
        except InvalidArgumentError as error:
            message = f"the event log has no request {request_id!r}: it never came, or long ago"
            raise ApiError(404, message, param="request_id") from error
        return JSONResponse({"id": request_id, "sentences": sentences})

    @app.get("/engine/events", response_class=_JsonLines)
    async def events() -> Response:
        """The scheduler's last decisions, for `octavo explain`, `trace` and `replay`."""
        service.model_to_watch()
        copy = await service.engine.call(_copy_events)
        lines = await asyncio.to_thread(lambda: "".join(f"{line}\n" for line in copy.as_jsonl()))
        return _JsonLines(lines)


def _copy_events(model: LoadedModel) -> EventLog:
    """The ring as it is now, so that it can be read while the engine goes on."""
    events = model.engine.events
    copy = EventLog(max(1, len(events)), events.header)
    for event in events:
        copy.record(event)
    copy.num_recorded = events.num_recorded
    return copy


def _explain(events: Any, request_id: str) -> list[str]:
    return list(explain(log_of(events), request_id))
