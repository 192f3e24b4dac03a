"""The asynchronous API: the server's engine thread, usable without the server."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.config import EngineConfig
from octavo.engine.outputs import OutputChunk, RequestOutput
from octavo.engine.pooling import EMBED, EmbeddingRequestOutput, embedding_output
from octavo.errors import EngineStepError
from octavo.model import LoadedModel, load_model
from octavo.prompts import AnyPrompt, EncodedPrompt
from octavo.sampling_params import SamplingParams
from octavo.server.engine_thread import EngineThread
from octavo.server.stream import EngineRequest, ResultStream

if TYPE_CHECKING:
    from octavo.runtime.loader import LoadProgress


class AsyncLLM:
    """A model in memory, for programs with an event loop.

        async with AsyncLLM("smollm2-135m") as llm:
            output = await llm.generate("The capital of France is")
            async for chunk in llm.stream("Once upon a time"):
                print(chunk.text, end="")

    Any number of tasks may ask at a time; their requests share the steps, which run in a thread of
    their own. A task that is cancelled, or leaves the loop over a stream, ends its request. Errors
    of loading are raised where the block begins; those of a request where it is awaited.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        config: EngineConfig | None = None,
        on_load: LoadProgress | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        **options: Any,
    ) -> None:
        """The arguments of `LLM`; nothing is loaded yet. on_load: called in another thread."""

        def watch(done: int, total: int) -> None:
            self._engine.on_load(done, total)
            if on_load is not None:
                on_load(done, total)

        load = partial(load_model, model, config=config, on_load=watch, adapters=adapters)
        self._engine = EngineThread(partial(load, **options))
        # Not the loop's own: threads of that may wait for answers.
        self._readers = ThreadPoolExecutor(4, "octavo-read")
        self._numbers = itertools.count()
        self._model: LoadedModel | None = None

    async def start(self) -> LoadedModel:
        """Load the model; raises what `LLM` raises."""
        self._model = await self._engine.start()
        return self._model

    async def stop(self) -> None:
        """End the engine's thread after the step that it is in; open requests get an error."""
        self._readers.shutdown(wait=False)
        await self._engine.stop()

    async def __aenter__(self) -> AsyncLLM:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def generate(
        self,
        prompt: AnyPrompt,
        params: SamplingParams | None = None,
        **options: Any,
    ) -> RequestOutput:
        """Answer one prompt or conversation. options: as for `stream`."""
        stream = await self._submit(prompt, params, **options)
        try:
            return await stream.wait()
        finally:
            stream.close()

    async def embed(
        self,
        prompt: AnyPrompt,
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        **options: Any,
    ) -> EmbeddingRequestOutput:
        """The vector of one text, of an embedding model.

        dimensions, normalize: as of `LLM.embed`. options: as for `stream`.
        """
        pooling = self._loaded().need_pooling(dimensions)
        result = await self.generate(prompt, EMBED, **options)
        return embedding_output(result, pooling, dimensions, normalize)

    async def stream(
        self,
        prompt: AnyPrompt,
        params: SamplingParams | None = None,
        **options: Any,
    ) -> AsyncGenerator[OutputChunk, None]:
        """Answer piece by piece, as its tokens are drawn; the last chunk's `result` is the whole.

        options: request_id (also seeds requests that name no seed; of an open request it is an
        InvalidArgumentError), priority (lower is more urgent), timeout (seconds), cache_salt and
        adapter, as `Engine.add_request` has them.
        """
        stream = await self._submit(prompt, params, **options)
        try:
            while chunks := await stream.next_chunks():
                for chunk in chunks:
                    yield chunk
        finally:
            stream.close()

    async def _submit(
        self,
        prompt: AnyPrompt,
        params: SamplingParams | None,
        request_id: str | None = None,
        **options: Any,
    ) -> ResultStream:
        model, params = self._loaded(), params or SamplingParams()
        # Before the wait, so that tasks get their seeds in the order in which they ask.
        name = f"request-{next(self._numbers)}" if request_id is None else request_id

        def read() -> EncodedPrompt:  # a long prompt and a new grammar take a while
            encoded = model.encode(prompt)
            model.engine.check_request(encoded.token_ids, params)
            return encoded

        loop = asyncio.get_running_loop()
        encoded = await loop.run_in_executor(self._readers, read)
        return self._engine.submit(EngineRequest(name, encoded, params, **options))

    def _loaded(self) -> LoadedModel:
        if self._model is None:
            raise EngineStepError(
                "the model is not loaded; expected `async with AsyncLLM(...) as llm`, or start()"
            )
        return self._model
