"""What the routes use: the engine's thread, the model's names, and whether requests are taken.

LOADING --loaded--> READY --SIGTERM--> DRAINING --idle or out of time--> the end
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from octavo.engine.admission import whole_id
from octavo.errors import (
    AdaptersInUseError,
    EngineStepError,
    ModelNotFoundError,
    OctavoError,
    ShutdownError,
)
from octavo.prompts import EncodedPrompt
from octavo.sampling_params import SamplingParams
from octavo.server.answers import Markup, detect_markup, markup_of
from octavo.server.beams import beam_params
from octavo.server.engine_thread import EngineThread
from octavo.server.errors import ApiError, bad_request
from octavo.server.metrics import Metrics
from octavo.server.options import ServerOptions
from octavo.server.protocol import ChatFields, PromptBody, SamplingBody
from octavo.server.stream import EngineRequest, ResultStream, StepStats

if TYPE_CHECKING:
    from octavo.model import LoadedModel

Phase = Literal["loading", "ready", "draining", "failed"]


class Service:
    """One model behind the API. load: makes it, in the engine's thread."""

    def __init__(self, options: ServerOptions, load: Callable[[], LoadedModel]) -> None:
        self.options = options
        self.engine = EngineThread(load, self._on_step, options.stall_timeout, options.event_log)
        self.phase: Phase = "loading"
        self.started = time.time()
        self.stats: StepStats | None = None
        # Of the last steps: when each ended, the tokens it computed, the tokens it sampled.
        self.recent_steps: deque[tuple[float, int, int]] = deque(maxlen=4096)
        self._num_sampled = 0
        self.metrics: Metrics | None = None
        self.markup = Markup()
        self._model: LoadedModel | None = None

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.options.served_names[0]

    @property
    def adapters(self) -> dict[str, Path]:
        """The LoRA adapters by the names that requests may give, and their folders."""
        return {} if self._model is None else self._model.engine.adapters.paths

    def adapter_of(self, name: str | None) -> str | None:
        """The adapter that a request for this model names; None: it is the model itself."""
        return None if not name or name in self.options.served_names else name

    async def load_adapter(self, name: str, folder: str) -> None:
        """Read an adapter between two steps; ApiError as vLLM: 400, or 404 for no folder."""
        self._check_adapters_may_change()
        if name in (*self.options.served_names, *self.adapters):
            raise bad_request(f"the lora adapter {name!r} has already been loaded", "lora_name")
        try:
            await self.engine.call(lambda model: model.engine.adapters.add(name, Path(folder)))
        except ModelNotFoundError as error:
            raise ApiError(404, str(error), "lora_path", "model_not_found") from error
        except (AdaptersInUseError, EngineStepError):
            raise
        except OctavoError as error:
            raise bad_request(str(error), "lora_path") from error

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that use it go on. ApiError 404 for an unknown one."""
        self._check_adapters_may_change()
        await self.engine.call(lambda model: model.engine.adapters.remove(name))

    def _check_adapters_may_change(self) -> None:
        """As chat templates: a folder of this machine is read for who may be trusted."""
        self.model()
        if self.options.is_open:
            raise ApiError(
                403,
                "this server changes no adapters by requests: others can reach it without a key. "
                "Start it with --api-key, or name the adapters with --adapter NAME=PATH",
            )

    async def start(self) -> LoadedModel:
        """Load the model; raises what loading it raised."""
        try:
            model = await self.engine.start()
        except BaseException:
            self.phase = "failed"
            raise
        self._model = model
        self.metrics = Metrics(self.name, model.engine)
        self.markup = self.options.markup(markup_of(model.chat_template))
        if self.phase == "loading":
            self.phase = "ready"
        # So that the first grammar does not wait for it.
        asyncio.get_running_loop().run_in_executor(None, _read_vocabulary, model)
        return model

    async def drain(self) -> None:
        """Take no more requests, and let those that run end, as long as shutdown_timeout says."""
        self.phase = "draining"
        try:
            await asyncio.wait_for(self.engine.wait_until_idle(), self.options.shutdown_timeout)
        except asyncio.TimeoutError:
            self.abort_all()

    def abort_all(self) -> None:
        """End what still runs."""
        self.engine.abort_all(ShutdownError("the server is shutting down"))

    def model(self, name: str | None = None) -> LoadedModel:
        """The model; an ApiError while requests cannot be taken, or for another model's name."""
        if self.phase == "loading":
            raise self._unavailable("the model is being loaded: try again soon", "loading")
        if self.phase == "draining":
            raise self._unavailable("the server is shutting down", "draining")
        if self._model is None or self.engine.state != "ready":
            raise self._unavailable(f"the engine has stopped: {self.engine.problem}", "stopped")
        self.check_name(name)
        return self._model

    def model_that_embeds(self, name: str | None) -> LoadedModel:
        """The model, as `model`; status 400 for one that makes texts."""
        model = self.model(name)
        if model.pooling is None:
            raise bad_request(
                f"the model {self.name!r} makes texts: ask it at /v1/chat/completions or "
                "/v1/completions, or start the server with an embedding model, or with --runner "
                "pooling",
                "model",
            )
        return model

    def model_that_writes(self, name: str | None) -> LoadedModel:
        """The model, as `model`; status 400 for one that gives embeddings."""
        model = self.model(name)
        if model.pooling is not None:
            raise bad_request(
                f"the model {self.name!r} gives embeddings and makes no texts: ask it at "
                "/v1/embeddings, or start the server with a model that makes texts, or with "
                "--runner generate",
                "model",
            )
        return model

    def model_to_watch(self) -> LoadedModel:
        """The model, while requests are taken and while the last ones end."""
        if self._model is None or self.engine.state != "ready":
            return self.model()
        return self._model

    def _unavailable(self, message: str, code: str) -> ApiError:
        if self.metrics is not None:
            self.metrics.rejected("unavailable")
        return ApiError(503, message, code=code)

    def check_name(self, name: str | None) -> None:
        """404 for a model that is not served; no name, or "", means the one that is."""
        known = (*self.options.served_names, *self.adapters)
        if name and name not in known:
            raise ApiError(
                404,
                f"the model {name!r} is not served here; expected {' or '.join(map(repr, known))}",
                param="model",
                code="model_not_found",
            )

    def submit(
        self, request_id: str, prompt: EncodedPrompt, params: SamplingParams, body: PromptBody
    ) -> ResultStream:
        """Hand one prompt to the engine."""
        own, limit = body.timeout or math.inf, self.options.request_timeout or math.inf
        timeout = min(own, limit)
        search = None
        if isinstance(body, SamplingBody) and body.use_beam_search:
            beams = beam_params(body, params)
            search = self.model(body.model).make_search(beams, len(prompt.token_ids))
            params = beams.sampling_params()
        stream = self.engine.submit(
            EngineRequest(
                request_id,
                prompt,
                params,
                body.priority or 0,
                None if math.isinf(timeout) else timeout,
                body.cache_salt,
                self.adapter_of(body.model),
                is_servers_limit=limit <= own,
                search=search,
                part_of=whole_id(request_id),
            )
        )
        if self.metrics is not None:
            self.metrics.watch(stream)
        return stream

    def markup_of(self, body: ChatFields) -> Markup:
        """How the model writes what is no plain text, by its own chat template or the body's."""
        if body.tools and self.options.tool_parser == "none":
            raise bad_request(
                "tools is given, but this server looks for no calls (--tool-call-parser none): "
                "leave tools out, or start the server with --tool-call-parser auto",
                "tools",
            )
        if body.chat_template is None:
            return self.markup
        if not self.options.takes_templates:
            raise bad_request(
                "chat_template is a program, and this server runs none from a request: others can "
                "reach it without a key. Leave chat_template out, or start the server with an API "
                "key or with --trust-request-chat-template",
                "chat_template",
            )
        return self.options.markup(detect_markup(body.chat_template))

    def _on_step(self, stats: StepStats) -> None:
        self.stats = stats
        sampled = stats.engine.num_sampled_tokens
        step = (time.monotonic(), stats.num_tokens, sampled - self._num_sampled)
        self.recent_steps.append(step)
        self._num_sampled = sampled
        if self.metrics is not None:
            self.metrics.observe_step(stats)


def _read_vocabulary(model: LoadedModel) -> None:
    with contextlib.suppress(OctavoError):  # which a request that needs it will name
        model.engine.grammars.prepare()
