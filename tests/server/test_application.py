"""The server as an ASGI application that another program's server runs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from parrot import write_parrot

from octavo.errors import InvalidArgumentError, ModelNotFoundError
from octavo.server.application import Application

COMPLETIONS = "/v1/completions"
LOOP = {"la": "la", "sing": "la"}


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OCTAVO_API_KEY", raising=False)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_parrot(tmp_path / "parrot", LOOP, context=512))


@contextlib.contextmanager
def run_by_uvicorn(app: Application) -> Iterator[tuple[httpx.Client, uvicorn.Server]]:
    """The application behind a socket, as `uvicorn FILE:app` has it."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.01)
    try:
        assert server.started
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client, server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def test_it_answers_as_the_server_does(model: str) -> None:
    app = Application(model, num_threads=1, server={"served_names": ["bird"]})
    with run_by_uvicorn(app) as (client, _):
        assert client.get("/ready").json() == {"ready": True, "phase": "ready"}
        answer = client.post(COMPLETIONS, json={"prompt": "sing", "max_tokens": 3}).json()
    assert (answer["model"], answer["choices"][0]["text"]) == ("bird", "lalala")
    assert app.service.engine.state == "stopped"


def test_a_name_and_recommended_sampling_are_the_models(model: str) -> None:
    (Path(model) / "generation_config.json").write_text('{"temperature": 0.25}')
    options = Application(model).service.options
    assert options.served_names == (model,) and options.defaults == {"temperature": 0.25}


def test_running_answers_end_before_it_stops(model: str) -> None:
    app = Application(model, num_threads=1)
    text = ""
    with run_by_uvicorn(app) as (client, server):
        body = {"prompt": "sing", "max_tokens": 200, "stream": True}
        with client.stream("POST", COMPLETIONS, json=body) as response:
            for line in response.iter_lines():
                server.should_exit = True
                text += line
    assert text.count('"text":"la"') == 200 and text.endswith("[DONE]")


def test_without_a_key_it_is_open_to_anybody(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"messages": [{"role": "user", "content": "sing"}], "chat_template": "sing"}
    adapter = {"lora_name": "a", "lora_path": model}
    with run_by_uvicorn(Application(model, num_threads=1)) as (client, _):
        refused = client.post("/v1/chat/completions", json=body)
        assert refused.status_code == 400 and "chat_template is a program" in refused.text
        assert client.post("/v1/load_lora_adapter", json=adapter).status_code == 403
    monkeypatch.setenv("OCTAVO_API_KEY", "secret")
    with run_by_uvicorn(Application(model, num_threads=1)) as (client, _):
        assert client.post("/v1/chat/completions", json=body).status_code == 401
        client.headers["Authorization"] = "Bearer secret"
        assert client.post("/v1/chat/completions", json={**body, "max_tokens": 2}).is_success


def test_what_is_wrong_is_said_at_once(model: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        Application("no-such-model")
    with pytest.raises(InvalidArgumentError, match="'colour'; expected ServerOptions' fields"):
        Application(model, server={"colour": "red"})
    with pytest.raises(InvalidArgumentError, match="served_names is 'bird'; expected a list"):
        Application(model, server={"served_names": "bird"})
    with pytest.raises(InvalidArgumentError, match="adapters has 'bird'.*names of their own"):
        Application(model, adapters={"bird": model}, server={"served_names": ["a", "bird"]})


def test_a_model_that_cannot_be_loaded_stops_the_server(model: str) -> None:
    app = Application(model, max_model_len=100_000)
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    async def send(message: Any) -> None:
        sent.append(message)

    with pytest.raises(InvalidArgumentError):
        asyncio.run(app({"type": "lifespan"}, receive, send))
    assert sent[0]["type"] == "lifespan.startup.failed" and "100000" in sent[0]["message"]
    assert app.service.phase == "failed"
