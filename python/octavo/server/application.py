"""The server as an ASGI application, for whoever brings the HTTP server: uvicorn, Ray Serve …"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.config import EngineConfig, read_environment
from octavo.errors import InvalidArgumentError
from octavo.server.app import create_app
from octavo.server.logs import log_event
from octavo.server.options import ServerOptions, read_defaults
from octavo.server.service import Service
from octavo.weights.hub import resolve_model

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from octavo.llm import LLM

_log = logging.getLogger("octavo.server")


class Application:
    """One model behind OpenAI's API, as an ASGI application of its own.

        app = Application("smollm2-135m", num_threads=2)  # then: uvicorn FILE:app

    The model is looked for at once, and loaded when the server starts (ASGI's lifespan, which it
    must have). When the server ends, running answers get `shutdown_timeout` seconds.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        config: EngineConfig | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        server: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Find the model; fetch it where it is not here.

        model, config, adapters, options: as of `LLM`. server: fields of `ServerOptions`; left out
        are the model's name and recommended sampling, the key of OCTAVO_API_KEY, and a host that
        is not known: what only clients of the same machine may do is refused without a key.
        """
        environment = read_environment()
        path = resolve_model(model, environment)
        fields = {
            "host": "",
            "api_keys": (environment.api_key,) if environment.api_key else (),
            "served_names": (model or path.name,),
            "defaults": read_defaults(path),
        }
        try:
            found = ServerOptions(**{**fields, **(server or {})})
        except TypeError as error:
            raise InvalidArgumentError(f"server: {error}; expected ServerOptions' fields") from None
        for name in found.served_names:
            if name in (adapters or {}):  # which requests would never reach
                raise InvalidArgumentError(
                    f"adapters has {name!r}, which the model is called; expected names of their own"
                )
        config = config or EngineConfig(max_waiting_requests=512)  # as `octavo serve`
        load = partial(load_logged, path, config, adapters, **options)
        self.service = Service(found, load)
        self._app = create_app(self.service, self._running)

    @contextlib.asynccontextmanager
    async def _running(self, _: object) -> AsyncIterator[None]:
        await self.service.start()
        try:
            yield
        finally:
            await self.service.drain()
            await self.service.engine.stop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        await self._app(scope, receive, send)


def load_logged(
    path: Path,
    config: EngineConfig,
    adapters: Mapping[str, str | Path] | None = None,
    **options: Any,
) -> LLM:
    """The model; while it loads, the server's log says how much is done."""
    from octavo.llm import LLM
    from octavo.progress import log_bytes

    write = partial(log_event, _log, logging.INFO)
    on_load = log_bytes(write, f"loading {path.name}")
    llm = LLM(path, config=config, on_load=on_load, adapters=adapters, **options)
    for line in llm.notes:
        write(line)
    if llm.pooling is not None:
        write(f"{path.name} gives embeddings: {llm.pooling}")
    if llm.tokenizer is None:
        warning = (
            f"{path} holds no tokenizer.json: only prompts of token ids are taken, and answers "
            f"have no text; `octavo generate hi -m {path}` says how to make one"
        )
        log_event(_log, logging.WARNING, warning)
    return llm
