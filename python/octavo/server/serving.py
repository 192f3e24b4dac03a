"""From options to a listening server, and from a signal to its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import uvicorn

from octavo.errors import InvalidArgumentError, OctavoError
from octavo.server.app import create_app
from octavo.server.logs import log_event, set_up_logging
from octavo.server.options import ServerOptions
from octavo.server.service import Service

if TYPE_CHECKING:
    from octavo.model import LoadedModel

_log = logging.getLogger("octavo.server")
_ADVICE: dict[int | None, str] = {
    errno.EADDRNOTAVAIL: "choose a --host of this machine: 127.0.0.1, or 0.0.0.0 for all it has",
    errno.EACCES: "choose a --port of 1024 or more, which needs no privileges",
}
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to `_Stopping`, since uvicorn cannot drain."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(options: ServerOptions, load: Callable[[], LoadedModel]) -> None:
    """Serve until a signal ends it. load: makes the model; what it raises is raised here.

    The socket is bound first, so that a port in use is an error at once. While the model is being
    loaded the server answers 503; a signal ends the process then.
    """
    set_up_logging(options.log_format)
    listener = _bind(options)
    is_loading = False
    with contextlib.suppress(KeyboardInterrupt):
        is_loading = asyncio.run(_serve(options, load, listener))
    if is_loading:
        # Python stops threads at its end, and one that is in the native core aborts the process.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)


async def _serve(
    options: ServerOptions, load: Callable[[], LoadedModel], listener: socket.socket
) -> bool:
    """Whether it ended while the model was still being loaded, by a thread that goes on."""
    service = Service(options, load)
    config = uvicorn.Config(
        create_app(service),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=75,  # longer than clients keep idle connections
    )
    server = _Uvicorn(config)
    stopping = _Stopping(service, server)
    url = _url(options.host, listener)
    log_event(_log, logging.INFO, "listening", url=url, model=service.name)
    if options.is_open:
        log_event(
            _log,
            logging.WARNING,
            "the server is open to the network, and no key is asked for: give it --api-key",
            host=options.host,
        )
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    loading = asyncio.ensure_future(_load(service, url))
    try:
        await asyncio.wait([loading, serving], return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            await loading
            await serving
    finally:
        loading.cancel()
        server.should_exit = True
        await asyncio.wait([serving])
        stopping.cancel()
        if service.engine.state == "ready":
            await service.engine.stop()
    log_event(_log, logging.INFO, "stopped")
    return service.engine.state == "loading"


async def _load(service: Service, url: str) -> None:
    started = time.monotonic()
    model = await service.start()
    engine = model.engine
    log_event(
        _log,
        logging.INFO,
        "ready",
        url=url,
        model=service.name,
        seconds=round(time.monotonic() - started, 2),
        max_model_len=model.max_model_len,
        max_num_seqs=engine.options.max_num_seqs,
        kv_cache_tokens=engine.blocks.num_tokens_together(model.max_model_len),
    )


class _Stopping:
    """SIGTERM and Ctrl-C: the first lets running requests end, the second does not."""

    def __init__(self, service: Service, server: uvicorn.Server) -> None:
        self._service = service
        self._server = server
        self._draining: asyncio.Future[None] | None = None
        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._draining is None and self._service.phase == "ready":
            log_event(
                _log,
                logging.INFO,
                "draining: no new requests; a second signal stops at once",
                signal=number.name,
                open_requests=self._service.engine.num_open,
                shutdown_timeout=self._service.options.shutdown_timeout,
            )
            self._draining = asyncio.ensure_future(self._drain())
        else:
            log_event(_log, logging.WARNING, "stopping at once", signal=number.name)
            self._service.phase = "draining"
            self._service.abort_all()
            self._server.should_exit = True

    async def _drain(self) -> None:
        await self._service.drain()
        self._server.should_exit = True

    def cancel(self) -> None:
        """Leave signals alone again."""
        for number in _SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)
        if self._draining is not None:
            self._draining.cancel()


def _bind(options: ServerOptions) -> socket.socket:
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InvalidArgumentError(
            f"host is {options.host!r}, which is unknown ({error.strerror or error}); "
            "expected an address of this machine, as 127.0.0.1"
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        advice = _ADVICE.get(error.errno, "choose another --port, or --port 0 for a free one")
        raise OctavoError(
            f"{options.host}:{options.port} cannot be listened on: {error.strerror}; {advice}"
        ) from error
    return listener


def _url(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
