"""One HTTP request from its prompts to its last byte, streamed or whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from octavo.engine.outputs import OutputChunk, RequestOutput
from octavo.engine.steering import NO_TOKEN
from octavo.errors import OctavoError
from octavo.server.errors import ApiError, to_api_error
from octavo.server.formats import Format, WholeFormat, to_json, usage_of
from octavo.server.protocol import PromptBody, SamplingBody, StreamOptions
from octavo.server.stream import EngineRequest, ResultStream

CLIENT_GONE = 499  # nginx's number for it; never sent, only logged


@dataclass(frozen=True)
class ResponseWriter:
    """The engine's requests behind one HTTP request: one a prompt, each with n answers.

    notes: what the log line of the request will say of it.
    """

    streams: Sequence[ResultStream]
    body: PromptBody
    answer_format: WholeFormat
    notes: dict[str, Any]

    async def write(self, receive: Receive) -> Response:
        """Wait for all answers, or, to stream them, for the first output.

        So an error before the first output has a status of its own. A client that goes ends its
        requests.
        """
        watcher = asyncio.ensure_future(_call_on_disconnect(receive, self._close))
        response = None

        def end() -> None:
            watcher.cancel()
            self._take_notes()
            self._close()

        try:
            body, answer_format = self.body, self.answer_format
            if body.stream and isinstance(body, SamplingBody) and isinstance(answer_format, Format):
                events = self._events(body, answer_format)
                response = EventStream(await anext(events), events, end)
                return response
            return await self._whole()
        except (OctavoError, ApiError) as error:
            if watcher.done():
                return Response(status_code=CLIENT_GONE)
            raise to_api_error(error, self.body.prompt_field) from error
        finally:
            if response is None:
                end()

    def _close(self) -> None:
        for stream in self.streams:
            stream.close()

    async def _whole(self) -> Response:
        async def result_of(stream: ResultStream) -> RequestOutput:
            result = await stream.wait()
            _check_result(result, stream.request, may_be_late=False)
            return result

        results = await asyncio.gather(*map(result_of, self.streams))  # the first error at once
        content = await self.answer_format.text(results, usage_of(*self._count_tokens()))
        return Response(content.encode(), media_type="application/json")

    async def _events(self, body: SamplingBody, answer_format: Format) -> AsyncIterator[str]:
        """What to write, one string a step; an error is raised before the first, written after."""
        options = body.stream_options or StreamOptions()
        num_answers = body.num_answers
        num_prompt, num_answer = self._num_prompt_tokens(), 0  # for usage that goes along

        def usage() -> str:
            if options.continuous_usage_stats:
                return f',"usage":{to_json(usage_of(num_prompt, num_answer))}'
            return ',"usage":null' if options.include_usage else ""

        pieces = [answer_format.opening(len(self.streams) * num_answers, usage())]
        is_first = True
        try:
            async for index, chunks in self._batches():
                for stream in self.streams if is_first else ():
                    stream.raise_if_refused()  # the queue may have been full for one of many
                for chunk in chunks:
                    if chunk.result is not None:
                        has_begun = not is_first or chunk.result.metrics.num_output_tokens > 0
                        request = self.streams[index].request
                        _check_result(chunk.result, request, may_be_late=has_begun)
                    num_answer += len(chunk.token_ids)
                    choice = index * num_answers + chunk.index
                    pieces.append(answer_format.piece(choice, chunk, usage()))
                text = "".join(pieces)
                if text or is_first:
                    yield text
                pieces, is_first = [], False
            used = usage_of(*self._count_tokens())
            yield answer_format.closing(used if options.include_usage else None)
        except (OctavoError, ApiError) as error:
            if is_first:
                raise
            found = to_api_error(error, body.prompt_field)
            self.notes["error"] = found.for_log
            yield answer_format.failed(found)

    async def _batches(self) -> AsyncIterator[tuple[int, list[OutputChunk]]]:
        """(which prompt, its new chunks) as they come, until all prompts have ended."""
        if len(self.streams) == 1:  # without a task for each step
            while chunks := await self.streams[0].next_chunks():
                yield 0, chunks
            return
        readers = {
            asyncio.ensure_future(stream.next_chunks()): index
            for index, stream in enumerate(self.streams)
        }
        try:
            while readers:
                done, _ = await asyncio.wait(readers, return_when=asyncio.FIRST_COMPLETED)
                for reader in done:
                    index = readers.pop(reader)
                    chunks = reader.result()
                    if chunks:
                        readers[asyncio.ensure_future(self.streams[index].next_chunks())] = index
                        yield index, chunks
        finally:
            for reader in readers:
                reader.cancel()

    def _num_prompt_tokens(self) -> int:
        return sum(len(stream.request.prompt.token_ids) for stream in self.streams)

    def _results(self) -> list[RequestOutput]:
        return [stream.result for stream in self.streams if stream.result is not None]

    def _count_tokens(self) -> tuple[int, int, int]:
        """Tokens of the prompts, of the answers so far, and those that the prefix cache had."""
        num_output = sum(stream.num_output_tokens for stream in self.streams)
        num_cached = sum(result.metrics.num_cached_tokens for result in self._results())
        return self._num_prompt_tokens(), num_output, num_cached

    def _take_notes(self) -> None:
        notes = self.notes
        notes["prompt_tokens"], notes["completion_tokens"], cached = self._count_tokens()
        if cached:
            notes["cached_tokens"] = cached
        reasons = {str(output.finish_reason) for r in self._results() for output in r.outputs}
        if reasons:
            notes["finish_reason"] = ",".join(sorted(reasons))
        firsts = [s for each in self.streams if (s := each.time_to_first_token) is not None]
        if firsts:
            notes["ttft_s"] = round(min(firsts), 4)


class EventStream(StreamingResponse):
    """Server-sent events: the first string, which has been waited for, and the others."""

    def __init__(self, first: str, others: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        async def events() -> AsyncIterator[str]:
            yield first
            async for text in others:
                yield text

        headers = {"Cache-Control": "no-cache"}
        super().__init__(events(), media_type="text/event-stream", headers=headers)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the end; the requests of a client that goes end with an error."""
        try:
            await self.stream_response(send)
        finally:
            self._on_end()


async def _call_on_disconnect(receive: Receive, function: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    function()


def _check_result(result: RequestOutput, request: EngineRequest, *, may_be_late: bool) -> None:
    """Raise an ApiError where the request or the model failed, or where the deadline passed."""
    if result.error is not None:
        if NO_TOKEN in result.error:  # the client's fault, as the words and grammars are
            advice = "leave out what the others contradict (bad_words, allowed_token_ids, …)"
            raise ApiError(400, f"{result.error}: {advice}", code="no_token_allowed")
        raise ApiError(500, result.error, code="model_error")
    if may_be_late or all(output.finish_reason != "timeout" for output in result.outputs):
        return
    seconds = time.monotonic() - result.metrics.arrival_time
    advice = "raise timeout, or ask for less"
    if request.is_servers_limit:
        limit = f"{request.timeout:g} seconds (--request-timeout)"
        advice = f"ask for less, since this server lets no request run longer than {limit}"
    raise ApiError(
        504,
        f"the request's deadline passed after {seconds:.1f} seconds, with "
        f"{result.metrics.num_output_tokens} tokens made: {advice}",
        param="timeout",
        code="deadline_exceeded",
    )
