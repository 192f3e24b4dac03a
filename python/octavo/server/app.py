"""The routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

import octavo
from octavo.errors import InvalidArgumentError
from octavo.prompts import EncodedPrompt
from octavo.sampling_params import SamplingParams
from octavo.server import prepare
from octavo.server.errors import ApiError, to_api_error, validation_error
from octavo.server.fields import refused_field
from octavo.server.formats import Format, Head
from octavo.server.metrics import CONTENT_TYPE
from octavo.server.middleware import RequestMiddleware
from octavo.server.pages import add_pages
from octavo.server.protocol import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    SamplingBody,
    TokenizeChatBody,
    TokenizeCompletionBody,
    slips,
)
from octavo.server.response_writer import ResponseWriter
from octavo.server.service import Service, describe_model

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A field is wrong; the error's `param` names it."},
    401: {"description": "The API key is missing or wrong."},
    404: {"description": "The model is not served here."},
    413: {"description": "The body is too large."},
    415: {"description": "The body is no application/json."},
    429: {"description": "The queue is full; Retry-After says when to try again."},
    500: {"description": "The request, or the step it was part of, failed."},
    503: {"description": "The model is being loaded, or the server is shutting down."},
    504: {"description": "The request's deadline passed."},
}
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, whole or as server-sent events.",
        "content": {"application/json": {}, "text/event-stream": {}},
    },
    **_ERRORS,
}


class _App(FastAPI):
    """Its schema says what the routes really give: 400 where FastAPI would write 422."""

    def openapi(self) -> dict[str, Any]:
        schema = super().openapi()
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        return schema


def create_app(service: Service) -> ASGIApp:
    """The application, ready for an ASGI server; the service is started by whoever runs it."""
    app = _App(
        title="octavo",
        version=octavo.__version__,
        description="OpenAI's API, as vLLM speaks it.",
        docs_url=None,  # its page loads scripts from another host
        redoc_url=None,
    )
    app.state.service = service
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_api_error)  # and RequestMiddleware logs it
    _add_generation(app)
    _add_models(app)
    _add_tokens(app)
    _add_probes(app)
    add_pages(app, service)
    whole: ASGIApp = RequestMiddleware(app, service.options)
    if service.options.allowed_origins:
        from starlette.middleware.cors import CORSMiddleware

        whole = CORSMiddleware(
            whole,
            allow_origins=service.options.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
        )
    return whole


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _add_generation(app: FastAPI) -> None:
    @app.post("/v1/chat/completions", responses=_STREAMED)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        service = _service(request)
        model = service.model()
        service.check_model(body.model)
        tool_format = service.tool_format_of(body)
        prompt = await asyncio.to_thread(prepare.encode_chat, model, body, tool_format)
        params = prepare.sampling_params(model, body, prompt, service.options.defaults)
        head = Head(_response_id(request, "chatcmpl"), int(time.time()), service.name)
        answer_format = prepare.chat_format(model, body, head, params, tool_format)
        return await _answer(request, body, [(prompt, params)], head, answer_format)

    @app.post("/v1/completions", responses=_STREAMED)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Go on with a text, or with many."""
        service = _service(request)
        model = service.model()
        service.check_model(body.model)
        prompts = await asyncio.to_thread(prepare.encode_completion, model, body)
        defaults = service.options.defaults
        work = [(p, prepare.sampling_params(model, body, p, defaults)) for p in prompts]
        head = Head(_response_id(request, "cmpl"), int(time.time()), service.name)
        answer_format = prepare.completion_format(model, body, head, prompts)
        return await _answer(request, body, work, head, answer_format)


async def _answer(
    request: Request,
    body: SamplingBody,
    work: Sequence[tuple[EncodedPrompt, SamplingParams]],
    head: Head,
    answer_format: Format,
) -> Response:
    service = _service(request)
    streams = [
        service.submit(
            head.response_id if len(work) == 1 else f"{head.response_id}-{index}",
            prompt,
            params,
            body,
        )
        for index, (prompt, params) in enumerate(work)
    ]
    notes = request.state.notes
    notes["id"] = head.response_id
    field = "prompt" if isinstance(body, CompletionBody) else "messages"
    answering = ResponseWriter(streams, body.num_answers, answer_format, field, notes)
    try:
        if body.stream:
            options = body.stream_options
            response = await answering.stream(
                request.receive,
                include_usage=bool(options and options.include_usage),
                continuous_usage=bool(options and options.continuous_usage_stats),
            )
        else:
            response = await answering.whole(request.receive)
    except ApiError as error:
        if error.status == 429 and service.metrics is not None:
            service.metrics.rejected("queue_full")
        raise
    return _warn(request, body, response)


def _warn(request: Request, body: Body, response: Response) -> Response:
    """Say, of fields that are ignored because nobody knows them, which look like a slip."""
    found = [f"{ascii(name)[:60]}, perhaps {meant}" for name, meant in slips(body).items() if meant]
    if found:
        warning = f"unknown fields, ignored: {'; '.join(found[:5])}"
        response.headers["X-Octavo-Warning"] = request.state.notes["warning"] = warning
    return response


def _response_id(request: Request, prefix: str) -> str:
    """Unique among those running, even where clients give several requests one id."""
    return f"{prefix}-{request.state.request_id}-{time.monotonic_ns() & 0xFFFFFF:06x}"


def _add_models(app: FastAPI) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        """The served names of the model."""
        service = _service(request)
        length = service.max_model_len
        names = service.options.served_names
        data = [describe_model(service, name, length) for name in names]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}", responses={404: _ERRORS[404]})
    async def model(name: str, request: Request) -> Response:
        """One of them."""
        service = _service(request)
        service.check_model(name)
        return JSONResponse(describe_model(service, name, service.max_model_len))


def _add_tokens(app: FastAPI) -> None:
    @app.post("/tokenize", responses=_ERRORS)
    async def tokenize(
        body: TokenizeCompletionBody | TokenizeChatBody, request: Request
    ) -> Response:
        """The tokens of a text, or of a conversation's prompt."""
        service = _service(request)
        model = service.model()
        service.check_model(body.model)
        if model.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer", param="model")
        refused = refused_field(body.model_extra or {})
        if refused is not None:
            raise refused
        if isinstance(body, TokenizeChatBody):
            tool_format = service.tool_format_of(body)
            prompt = await asyncio.to_thread(prepare.encode_chat, model, body, tool_format)
            tokens = list(prompt.token_ids)
        else:
            try:
                tokens = await asyncio.to_thread(
                    model.tokenizer.encode, body.prompt, body.add_special_tokens
                )
            except InvalidArgumentError as error:
                raise to_api_error(error, "prompt") from error
        strings = [model.tokenizer.token(token) for token in tokens]
        found = {
            "count": len(tokens),
            "max_model_len": model.max_model_len,
            "tokens": tokens,
            "token_strs": strings if body.return_token_strs else None,
        }
        return _warn(request, body, JSONResponse(found))

    @app.post("/detokenize", responses=_ERRORS)
    async def detokenize(body: DetokenizeBody, request: Request) -> Response:
        """The text of tokens, special ones included."""
        service = _service(request)
        model = service.model()
        service.check_model(body.model)
        if model.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer", param="model")
        text = await asyncio.to_thread(model.tokenizer.decode, body.tokens, False)
        return _warn(request, body, JSONResponse({"prompt": text}))


def _add_probes(app: FastAPI) -> None:
    @app.get("/health", responses={503: {"description": "The loop does not step."}})
    @app.get("/ping", include_in_schema=False)
    async def health(request: Request) -> Response:
        """Whether the engine's loop really steps."""
        service = _service(request)
        health = service.engine.health()
        body = {
            "status": "ok" if health.ok else "unhealthy",
            "phase": service.phase,
            "reason": None if health.ok else health.reason,
            "steps": 0 if service.stats is None else service.stats.engine.num_steps,
            "seconds_since_progress": round(health.seconds_since_progress, 3),
        }
        return JSONResponse(body, 200 if health.ok else 503)

    @app.get("/ready", responses={503: {"description": "Loading, or shutting down."}})
    async def ready(request: Request) -> Response:
        """Whether requests are taken now."""
        service = _service(request)
        ok = service.phase == "ready" and service.engine.health().ok
        return JSONResponse({"ready": ok, "phase": service.phase}, 200 if ok else 503)

    @app.get("/version")
    async def version() -> Response:
        """octavo's version."""
        return JSONResponse({"version": octavo.__version__})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        """Metrics for Prometheus."""
        found = _service(request).metrics
        return Response(found.render() if found else b"", media_type=CONTENT_TYPE)


async def _on_api_error(request: Request, error: Exception) -> Response:
    found = to_api_error(error)
    request.state.notes["error"] = found.message
    return Response(
        found.encoded(), found.status, headers=found.headers, media_type="application/json"
    )


async def _on_validation_error(request: Request, error: Exception) -> Response:
    problems = error.errors() if isinstance(error, RequestValidationError) else []
    return await _on_api_error(request, validation_error(problems))


async def _on_http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 404:
        message = f"there is no {request.method} {request.url.path} here"
    elif status == 405:
        message = f"{request.url.path} does not take {request.method}"
    else:
        message = str(getattr(error, "detail", "")) or "the request is wrong"
    headers = getattr(error, "headers", None) or {}
    return await _on_api_error(request, ApiError(status, message, headers=headers))
