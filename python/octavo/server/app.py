"""The routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Lifespan

import octavo
from octavo.engine.admission import part_id
from octavo.errors import InvalidArgumentError
from octavo.prompts import EncodedPrompt
from octavo.sampling_params import SamplingParams
from octavo.server import messages, prepare
from octavo.server.embeddings import EmbeddingBody, EmbeddingFormat, read_input
from octavo.server.errors import ApiError, in_own_words, to_api_error, validation_error
from octavo.server.fields import check_extra_fields
from octavo.server.formats import Head, WholeFormat
from octavo.server.message_format import MessageFormat
from octavo.server.messages import CountTokensBody, MessagesBody
from octavo.server.metrics import CONTENT_TYPE
from octavo.server.middleware import RequestMiddleware
from octavo.server.pages import add_pages
from octavo.server.protocol import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    LoadAdapterBody,
    PromptBody,
    TokenizeChatBody,
    TokenizeCompletionBody,
    UnloadAdapterBody,
    slips,
)
from octavo.server.response_writer import ResponseWriter
from octavo.server.responses_body import ResponsesBody, translate
from octavo.server.responses_format import ResponsesFormat
from octavo.server.service import Service

if TYPE_CHECKING:
    from octavo.model import LoadedModel
    from octavo.server.answers import Markup
    from octavo.text.tokenizer import Tokenizer

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A field is wrong; the error's `param` names it."},
    401: {"description": "The API key is missing or wrong."},
    403: {"description": "Adapters are not changed for clients without a key."},
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


def create_app(service: Service, lifespan: Lifespan[_App] | None = None) -> ASGIApp:
    """The application, ready for an ASGI server. lifespan starts the service, or the caller."""
    app = _App(
        title="octavo",
        version=octavo.__version__,
        description="OpenAI's API, as vLLM speaks it, and Anthropic's Messages API.",
        docs_url=None,  # its page loads scripts from another host
        redoc_url=None,
        lifespan=lifespan,
    )
    # Of any other exception RequestMiddleware logs the traceback.
    for kind in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    generating = (_add_generation, _add_responses, _add_messages, _add_embeddings)
    for add in (*generating, _add_models, _add_tokens, _add_probes, add_pages):
        add(app, service)
    whole: ASGIApp = RequestMiddleware(app, service.options)
    if service.options.allowed_origins:
        from starlette.middleware.cors import CORSMiddleware

        whole = CORSMiddleware(
            whole,
            allow_origins=service.options.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Request-Id", "Retry-After", "X-Octavo-Warning", "X-Request-Id"],
        )
    return whole


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", responses=_STREAMED)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        model = service.model_that_writes(body.model)
        markup = service.markup_of(body)

        prompt, params = await asyncio.to_thread(_read_chat, service, model, body, markup)
        head = _head(service, request, "chatcmpl-", body)
        answer_format = prepare.chat_format(model, body, head, params, markup, prompt)
        return await _answer(service, request, body, [(prompt, params)], head, answer_format)

    @app.post("/v1/completions", responses=_STREAMED)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Go on with a text, or with many."""
        model = service.model_that_writes(body.model)

        def read() -> list[tuple[EncodedPrompt, SamplingParams]]:
            prompts, defaults = prepare.encode_completion(model, body), service.options.defaults
            return [(p, prepare.sampling_params(model, body, p, defaults)) for p in prompts]

        work = await asyncio.to_thread(read)
        head = _head(service, request, "cmpl-", body)
        answer_format = prepare.completion_format(model, body, head, [prompt for prompt, _ in work])
        return await _answer(service, request, body, work, head, answer_format)


def _add_responses(app: FastAPI, service: Service) -> None:
    @app.post("/v1/responses", responses=_STREAMED)
    async def create_response(body: ResponsesBody, request: Request) -> Response:
        """Answer a text, or items of a conversation, as items."""
        model = service.model_that_writes(body.model)
        translation = translate(body)
        chat, names = translation.chat, translation.names

        with in_own_words(names):
            markup = service.markup_of(chat)
            prompt, params = await asyncio.to_thread(_read_chat, service, model, chat, markup)
            head = _head(service, request, "resp_", body)
            tags, tokenizer = markup.reasoning, model.tokenizer
            make = partial(
                ResponsesFormat,
                echo={**body.echo(), "temperature": params.temperature, "top_p": params.top_p},
                thinking_end=tokenizer.token_id(tags.end) if tags and tokenizer else None,
                names=names,
            )
            answer_format = prepare.chat_format(model, chat, head, params, markup, prompt, make)
            return await _answer(
                service, request, chat, [(prompt, params)], head, answer_format, given=body
            )


def _add_messages(app: FastAPI, service: Service) -> None:
    @app.post("/v1/messages", responses=_STREAMED)
    async def create_message(body: MessagesBody, request: Request) -> Response:
        """Answer a conversation, by Anthropic's Messages API."""
        model = service.model_that_writes(body.model)
        chat, begun = messages.to_chat(body)
        markup = service.markup_of(chat)

        def read() -> tuple[EncodedPrompt, SamplingParams]:
            with in_own_words(messages.own_names(body)):
                prompt = messages.encode(model, chat, markup, begun)
                defaults = service.options.defaults
                # An answer that has begun is behind the thinking.
                written = replace(markup, reasoning=None) if begun else markup
                return prompt, prepare.sampling_params(model, chat, prompt, defaults, written)

        prompt, params = await asyncio.to_thread(read)
        head = _head(service, request, "msg_", body)
        reading = messages.reading_of(chat, markup, prompt, begun)
        state = request.state
        answer_format = MessageFormat(head, reading, len(prompt.token_ids), state.request_id)
        return await _answer(
            service, request, chat, [(prompt, params)], head, answer_format, given=body
        )

    @app.post("/v1/messages/count_tokens", responses=_ERRORS)
    async def count_message_tokens(body: CountTokensBody, request: Request) -> Response:
        """The number of tokens in the prompt of a message."""
        model = service.model_that_writes(body.model)
        chat, begun = messages.to_chat(body)
        markup = service.markup_of(chat)
        prompt = await asyncio.to_thread(messages.encode, model, chat, markup, begun)
        return _warn(request, body, JSONResponse({"input_tokens": len(prompt.token_ids)}))


def _add_embeddings(app: FastAPI, service: Service) -> None:
    @app.post("/v1/embeddings", responses=_ERRORS)
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        """The vector of a text, or of many."""
        model = service.model_that_embeds(body.model)
        work = await asyncio.to_thread(read_input, model, body)
        head = _head(service, request, "embd-", body)
        answer_format = EmbeddingFormat(body, head.model, model.need_pooling())
        return await _answer(service, request, body, work, head, answer_format)


def _read_chat(
    service: Service, model: LoadedModel, body: ChatBody, markup: Markup
) -> tuple[EncodedPrompt, SamplingParams]:
    """The prompt of a conversation, and how it is answered; compiles a grammar, if it is new."""
    prompt, defaults = prepare.encode_chat(model, body, markup), service.options.defaults
    return prompt, prepare.sampling_params(model, body, prompt, defaults, markup)


def _head(service: Service, request: Request, prefix: str, body: Body) -> Head:
    """The id is unique among those running, even where clients give several requests one id."""
    response_id = f"{prefix}{request.state.request_id}-{time.monotonic_ns() & 0xFFFFFF:06x}"
    name = service.adapter_of(body.model) or service.name
    return Head(response_id, int(time.time()), name)


async def _answer(
    service: Service,
    request: Request,
    body: PromptBody,
    work: Sequence[tuple[EncodedPrompt, SamplingParams]],
    head: Head,
    answer_format: WholeFormat,
    given: Body | None = None,
) -> Response:
    """given: what the client sent, where `body` was made of it."""
    streams = []
    for index, one in enumerate(work):
        name = head.response_id if len(work) == 1 else part_id(head.response_id, index)
        streams.append(service.submit(name, *one, body))
    notes = request.state.notes
    notes["id"] = head.response_id
    try:
        response = await ResponseWriter(streams, body, answer_format, notes).write(request.receive)
    except ApiError as error:
        if error.status == 429 and service.metrics is not None:
            service.metrics.rejected("queue_full")
        raise
    return _warn(request, given or body, response)


def _warn(request: Request, body: Body, response: Response) -> Response:
    """Name the ignored fields that look like a slip."""
    found = [f"{ascii(name)[:60]}, perhaps {meant}" for name, meant in slips(body).items() if meant]
    if found:
        warning = f"unknown fields, ignored: {'; '.join(found[:5])}"
        response.headers["X-Octavo-Warning"] = request.state.notes["warning"] = warning
    return response


def _add_models(app: FastAPI, service: Service) -> None:
    def describe(name: str) -> dict[str, Any]:
        folder = service.adapters.get(name)
        return {
            "id": name,
            "object": "model",
            "created": int(service.started),
            "owned_by": "octavo",
            "root": service.name if folder is None else str(folder),
            "parent": None if folder is None else service.name,
            "max_model_len": service.engine.model and service.engine.model.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        """The served names of the model, and its LoRA adapters."""
        data = [describe(name) for name in (*service.options.served_names, *service.adapters)]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}", responses={404: _ERRORS[404]})
    async def model(name: str) -> Response:
        """One of them."""
        service.check_name(name)
        return JSONResponse(describe(name))

    @app.post("/v1/load_lora_adapter", responses=_ERRORS)
    async def load_lora_adapter(body: LoadAdapterBody) -> Response:
        """Read a LoRA adapter from a folder of the server's machine, and give it a name."""
        await service.load_adapter(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter", responses=_ERRORS)
    async def unload_lora_adapter(body: UnloadAdapterBody) -> Response:
        """Forget a LoRA adapter; requests that use it go on."""
        await service.unload_adapter(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _add_tokens(app: FastAPI, service: Service) -> None:
    def model_and_tokenizer(body: Body) -> tuple[LoadedModel, Tokenizer]:
        model = service.model(body.model)
        if model.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer", param="model")
        return model, model.tokenizer

    @app.post("/tokenize", responses=_ERRORS)
    async def tokenize(
        body: TokenizeCompletionBody | TokenizeChatBody, request: Request
    ) -> Response:
        """The tokens of a text, or of a conversation's prompt."""
        model, tokenizer = model_and_tokenizer(body)
        check_extra_fields(body.model_extra or {})
        if isinstance(body, TokenizeChatBody):
            markup = service.markup_of(body)
            prompt = await asyncio.to_thread(prepare.encode_chat, model, body, markup)
            tokens = list(prompt.token_ids)
        else:
            try:
                text, special = body.prompt, body.add_special_tokens
                tokens = await asyncio.to_thread(tokenizer.encode, text, special)
            except InvalidArgumentError as error:
                raise to_api_error(error, "prompt") from error
        found = {
            "count": len(tokens),
            "max_model_len": model.max_model_len,
            "tokens": tokens,
            "token_strs": list(map(tokenizer.token, tokens)) if body.return_token_strs else None,
        }
        return _warn(request, body, JSONResponse(found))

    @app.post("/detokenize", responses=_ERRORS)
    async def detokenize(body: DetokenizeBody, request: Request) -> Response:
        """The text of tokens, special ones included."""
        _, tokenizer = model_and_tokenizer(body)
        text = await asyncio.to_thread(tokenizer.decode, body.tokens, False)
        return _warn(request, body, JSONResponse({"prompt": text}))


def _add_probes(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses={503: {"description": "The loop does not step."}})
    @app.get("/ping", include_in_schema=False)
    async def health() -> Response:
        """Whether the engine's loop really steps."""
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
    async def ready() -> Response:
        """Whether requests are taken now."""
        ok = service.phase == "ready" and service.engine.health().ok
        return JSONResponse({"ready": ok, "phase": service.phase}, 200 if ok else 503)

    @app.get("/version")
    async def version() -> Response:
        """octavo's version."""
        return JSONResponse({"version": octavo.__version__})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        found = service.metrics
        return Response(found.render() if found else b"", media_type=CONTENT_TYPE)


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        found = validation_error(error.errors())
    elif isinstance(error, HTTPException):
        message = str(error.detail) or "the request is wrong"
        if error.status_code == 404:
            message = f"there is no {request.method} {request.url.path} here"
        elif error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}"
        found = ApiError(error.status_code, message, headers=error.headers)
    else:
        found = to_api_error(error)
    request.state.notes["error"] = found.for_log
    return found.response(request.scope)
