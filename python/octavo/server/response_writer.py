"""One HTTP request from its prompts to its last byte, streamed or whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from octavo.engine.outputs import OutputChunk, RequestOutput
from octavo.errors import OctavoError
from octavo.server.errors import ApiError, to_api_error
from octavo.server.formats import DONE, Format, to_json, usage_of
from octavo.server.stream import EngineRequest, ResultStream

CLIENT_GONE = 499  # nginx's number for it; never sent, only logged


class ResponseWriter:
    """The engine's requests behind one HTTP request: one a prompt, each with n answers.

    prompt_field: the field to blame for a prompt that does not fit. notes: what the log line of the
    request will say of it.
    """

    def __init__(
        self,
        streams: Sequence[ResultStream],
        num_answers: int,
        answer_format: Format,
        prompt_field: str,
        notes: dict[str, Any],
    ) -> None:
        self._streams = streams
        self._num_answers = num_answers
        self._format = answer_format
        self._prompt_field = prompt_field
        self._notes = notes

    def close(self) -> None:
        """The client has gone, or one of the prompts has failed: end them all."""
        for stream in self._streams:
            stream.close()

    async def whole(self, receive: Receive) -> Response:
        """Wait for all answers, unless the client goes first."""
        watcher = asyncio.ensure_future(_call_on_disconnect(receive, self.close))
        try:
            results = [await stream.wait() for stream in self._streams]
            for stream, result in zip(self._streams, results, strict=True):
                _raise_if_failed(result, stream.request)
        except (OctavoError, ApiError) as error:
            if watcher.done():
                return Response(status_code=CLIENT_GONE)
            raise to_api_error(error, self._prompt_field) from error
        finally:
            watcher.cancel()
            self._finish()
        content = to_json(self._format.whole(results, self._usage()))
        return Response(content.encode(), media_type="application/json")

    async def stream(
        self, receive: Receive, *, include_usage: bool, continuous_usage: bool
    ) -> Response:
        """A response that streams.

        It begins with the first output, so that an error before has a status of its own.
        """
        batches = self._batches()
        watcher = asyncio.ensure_future(_call_on_disconnect(receive, self.close))
        try:
            first = await anext(batches)
            for stream in self._streams:  # the queue may have been full for one of many
                stream.raise_if_refused()
            _check_first(first[1], self._streams[first[0]].request)
        except (OctavoError, ApiError) as error:
            self._finish()
            if watcher.done():
                return Response(status_code=CLIENT_GONE)
            watcher.cancel()
            raise to_api_error(error, self._prompt_field) from error
        events = self._events(first, batches, include_usage, continuous_usage)
        return EventStream(events, watcher, self._finish)

    def _finish(self) -> None:
        self._take_notes()
        self.close()

    async def _events(
        self,
        first: tuple[int, list[OutputChunk]],
        batches: AsyncIterator[tuple[int, list[OutputChunk]]],
        include_usage: bool,
        continuous_usage: bool,
    ) -> AsyncIterator[str]:
        """What to write, one string a step."""
        num_prompt, num_answer = self._num_prompt_tokens(), 0  # for usage that goes along
        usage = ',"usage":null' if include_usage else ""
        if continuous_usage:
            usage = f',"usage":{to_json(usage_of(num_prompt, 0))}'
        opening = self._format.opening(len(self._streams) * self._num_answers, usage)
        try:
            batch: tuple[int, list[OutputChunk]] | None = first
            while batch is not None:
                index, chunks = batch
                pieces = [opening]
                opening = ""
                for chunk in chunks:
                    if chunk.result is not None:
                        _raise_if_broken(chunk.result)
                    if continuous_usage:
                        num_answer += len(chunk.token_ids)
                        usage = f',"usage":{to_json(usage_of(num_prompt, num_answer))}'
                    choice = index * self._num_answers + chunk.index
                    pieces.append(self._format.piece(choice, chunk, usage))
                text = "".join(pieces)
                if text:
                    yield text
                batch = await anext(batches, None)
            closing = self._format.closing(self._usage()) if include_usage else ""
            yield closing + DONE
        except (OctavoError, ApiError) as error:
            self._notes["error"] = str(error)
            body = to_api_error(error, self._prompt_field).encoded().decode("ascii")
            yield f"data: {body}\n\n{DONE}"

    async def _batches(self) -> AsyncIterator[tuple[int, list[OutputChunk]]]:
        """(which prompt, its new chunks) as they come, until all prompts have ended."""
        if len(self._streams) == 1:
            while chunks := await self._streams[0].next_chunks():
                yield 0, chunks
            return
        readers = {
            asyncio.ensure_future(stream.next_chunks()): index
            for index, stream in enumerate(self._streams)
        }
        try:
            while readers:
                done, _ = await asyncio.wait(readers, return_when=asyncio.FIRST_COMPLETED)
                for reader in done:
                    index = readers.pop(reader)
                    chunks = reader.result()
                    if not chunks:
                        continue
                    readers[asyncio.ensure_future(self._streams[index].next_chunks())] = index
                    yield index, chunks
        finally:
            for reader in readers:
                reader.cancel()

    def _num_prompt_tokens(self) -> int:
        return sum(len(stream.request.prompt.token_ids) for stream in self._streams)

    def _usage(self) -> dict[str, Any]:
        metrics = [stream.result.metrics for stream in self._streams if stream.result is not None]
        return usage_of(
            self._num_prompt_tokens(),
            sum(m.num_output_tokens for m in metrics),
            sum(m.num_cached_tokens for m in metrics),
        )

    def _take_notes(self) -> None:
        results = [stream.result for stream in self._streams if stream.result is not None]
        self._notes["prompt_tokens"] = self._num_prompt_tokens()
        self._notes["completion_tokens"] = sum(r.metrics.num_output_tokens for r in results)
        cached = sum(r.metrics.num_cached_tokens for r in results)
        if cached:
            self._notes["cached_tokens"] = cached
        reasons = {str(output.finish_reason) for r in results for output in r.outputs}
        if reasons:
            self._notes["finish_reason"] = ",".join(sorted(reasons))
        firsts = [r.metrics.time_to_first_token for r in results]
        known = [seconds for seconds in firsts if seconds is not None]
        if known:
            self._notes["ttft_s"] = round(min(known), 4)


class EventStream(Response):
    """Server-sent events, one write for each string of an iterator; ends when the client goes."""

    def __init__(
        self, events: AsyncIterator[str], watcher: asyncio.Future[None], on_end: Callable[[], None]
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._watcher = watcher
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the end."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            async for text in self._events:
                if self._watcher.done():
                    break
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            if not self._watcher.done():
                await send({"type": "http.response.body", "body": b""})
        finally:
            self._watcher.cancel()
            self._on_end()


async def _call_on_disconnect(receive: Receive, function: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    function()


def _raise_if_broken(result: RequestOutput) -> None:
    if result.error is not None:
        raise ApiError(500, result.error, code="model_error")


def _raise_if_failed(result: RequestOutput, request: EngineRequest) -> None:
    _raise_if_broken(result)
    if any(output.finish_reason == "timeout" for output in result.outputs):
        raise _late(result, request)


def _check_first(chunks: Sequence[OutputChunk], request: EngineRequest) -> None:
    """What goes wrong before anything was sent is a status, and not an empty answer."""
    result = chunks[-1].result
    if result is None:
        return
    _raise_if_broken(result)
    if result.metrics.num_output_tokens == 0:
        _raise_if_failed(result, request)


def _late(result: RequestOutput, request: EngineRequest) -> ApiError:
    seconds = time.monotonic() - result.metrics.arrival_time
    advice = "raise timeout, or ask for less"
    if request.is_servers_limit:
        limit = f"{request.timeout:g} seconds (--request-timeout)"
        advice = f"ask for less, since this server lets no request run longer than {limit}"
    return ApiError(
        504,
        f"the request's deadline passed after {seconds:.1f} seconds, with "
        f"{result.metrics.num_output_tokens} tokens made: {advice}",
        param="timeout",
        code="deadline_exceeded",
    )
