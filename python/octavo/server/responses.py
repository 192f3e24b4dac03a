"""POST /v1/responses: OpenAI's Responses API, over the same path as a conversation's answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from octavo.prompts import EncodedPrompt
from octavo.sampling_params import SamplingParams
from octavo.server import prepare
from octavo.server.errors import ApiError
from octavo.server.formats import Head
from octavo.server.responses_body import ResponsesBody, translate
from octavo.server.responses_format import ResponsesFormat
from octavo.server.service import Service


def add_responses(
    app: FastAPI,
    service: Service,
    make_head: Callable[..., Head],
    answer: Callable[..., Awaitable[Response]],
    described: Mapping[int | str, dict[str, Any]],
) -> None:
    """Add the route. make_head, answer: as the other routes; described: what it may return."""

    @app.post("/v1/responses", responses=dict(described))
    async def responses(body: ResponsesBody, request: Request) -> Response:
        """Answer a text, or items of a conversation, as items."""
        model = service.model(body.model)
        translation = translate(body)
        chat = translation.chat

        def read() -> tuple[EncodedPrompt, SamplingParams]:
            prompt, defaults = prepare.encode_chat(model, chat, markup), service.options.defaults
            return prompt, prepare.sampling_params(model, chat, prompt, defaults, markup)

        try:
            markup = service.markup_of(chat)
            prompt, params = await asyncio.to_thread(read)
            head: Head = make_head(service, request, "resp", body)
            head = head._replace(response_id=head.response_id.replace("resp-", "resp_", 1))
            tags, tokenizer = markup.reasoning, model.tokenizer
            end = tokenizer.token_id(tags.end) if tags and tokenizer else None
            echo = {**body.echo(), "temperature": params.temperature, "top_p": params.top_p}
            make = partial(
                ResponsesFormat,
                echo=echo,
                thinking_end=end,
                in_own_words=translation.in_own_words,
            )
            answer_format = prepare.chat_format(
                model, chat, head, params, markup, prompt.text, make
            )
            work = [(prompt, params)]
            return await answer(service, request, chat, work, head, answer_format, given=body)
        except ApiError as error:
            raise translation.in_own_words(error) from error
