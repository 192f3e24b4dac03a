"""LoRA adapters in the API: as models of their own, loaded and unloaded while requests run."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_helpers import error_of, events_of, fake_llm, run, serving, slow_down

from octavo.llm import LLM
from octavo.server.service import Service

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    found = fake_llm(tmp_path, max_adapters=2)
    found.load_adapter("seven", "/adapters/7")
    return found


async def ask(client: httpx.AsyncClient, model: str, **fields: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": "ABCDEF", "max_tokens": 8, "temperature": 0, **fields}
    response = await client.post(COMPLETIONS, json={**body, "ignore_eos": True})
    assert response.status_code == 200, response.text
    return dict(response.json())


async def until_running(service: Service, count: int) -> None:
    """Wait until so many requests have their adapters."""
    while service.stats is None or service.stats.engine.num_running < count:
        await asyncio.sleep(0.002)


def test_an_adapter_is_a_model_of_its_own(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm, served_names=("base",)) as (client, _):
            texts = {}
            for model in ("base", "seven"):
                answer = await ask(client, model)
                assert answer["model"] == model
                texts[model] = answer["choices"][0]["text"]
            assert texts["base"] != texts["seven"]
            found = (await client.get("/v1/models")).json()["data"]
            described = [(each["id"], each["root"], each["parent"]) for each in found]
            assert described == [("base", "base", None), ("seven", "/adapters/7", "base")]
            assert (await client.get("/v1/models/seven")).json() == found[1]
            body = {"model": "seven", "messages": [{"role": "user", "content": "Hi"}]}
            response = await client.post(CHAT, json={**body, "max_tokens": 3, "stream": True})
            assert {event["model"] for event in events_of(response.text)} == {"seven"}
            together = await asyncio.gather(*(ask(client, name) for name in [*texts] * 3))
            assert [a["choices"][0]["text"] for a in together] == [*texts.values()] * 3

    run(test)


def test_an_unknown_name_gets_404_with_the_names_there_are(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm, served_names=("base",)) as (client, _):
            for path, more in ((COMPLETIONS, {"prompt": "A"}), (CHAT, {"messages": []})):
                error = error_of(await client.post(path, json={"model": "eight", **more}), 404)
                assert error["param"] == "model" and error["code"] == "model_not_found"
                assert "expected 'base' or 'seven'" in error["message"]
            error_of(await client.get("/v1/models/eight"), 404)

    run(test)


def test_loaded_and_unloaded_while_requests_run(llm: LLM) -> None:
    slow_down(llm, 0.01)

    async def test() -> None:
        async with serving(llm) as (client, service):
            before = (await ask(client, "seven", max_tokens=60))["choices"]
            running = asyncio.create_task(ask(client, "seven", max_tokens=60))
            await until_running(service, 1)
            body = {"lora_name": "nine", "lora_path": "/adapters/9"}
            response = await client.post(LOAD, json=body)
            assert response.status_code == 200
            assert response.text == "Success: LoRA adapter 'nine' added successfully."
            nine = await ask(client, "nine")
            response = await client.post(UNLOAD, json={"lora_name": "seven"})
            assert response.text == "Success: LoRA adapter 'seven' removed successfully."
            assert not running.done()
            error_of(await client.post(COMPLETIONS, json={"model": "seven", "prompt": "A"}), 404)
            assert (await running)["choices"] == before
            assert nine["choices"] == (await ask(client, "nine"))["choices"]
            names = [each["id"] for each in (await client.get("/v1/models")).json()["data"]]
            assert names == ["model", "nine"]

    run(test)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (LOAD, {"lora_name": "x"}, 400, "lora_path: Field required"),
        (LOAD, {"lora_name": "", "lora_path": "7"}, 400, "lora_name"),
        (LOAD, {"lora_name": "seven", "lora_path": "7"}, 400, "already been loaded"),
        (LOAD, {"lora_name": "model", "lora_path": "7"}, 400, "already been loaded"),
        (LOAD, {"lora_name": "x", "lora_path": "/adapters/bad"}, 400, "is damaged"),
        (UNLOAD, {"lora_name": "eight"}, 404, "'eight' is not loaded: expected one of seven"),
        (UNLOAD, {}, 400, "lora_name"),
    ],
)
def test_refused(llm: LLM, path: str, body: Any, status: int, message: str) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            assert message in error_of(await client.post(path, json=body), status)["message"]

    run(test)


def test_a_folder_that_is_not_there_gets_404(llm: LLM, monkeypatch: Any, tmp_path: Path) -> None:
    from octavo.weights.adapter import read_adapter

    monkeypatch.setattr(llm.engine.adapters, "_read", lambda path: read_adapter(path, None))

    async def test() -> None:
        async with serving(llm) as (client, _):
            body = {"lora_name": "x", "lora_path": str(tmp_path / "none")}
            error = error_of(await client.post(LOAD, json=body), 404)
            assert "expected an adapter that PEFT" in error["message"]

    run(test)


def test_all_places_in_use_get_429(llm: LLM) -> None:
    slow_down(llm, 0.01)
    llm.load_adapter("eight", "/adapters/8")

    async def test() -> None:
        async with serving(llm) as (client, service):
            running = [
                asyncio.create_task(ask(client, name, max_tokens=80)) for name in ("seven", "eight")
            ]
            await until_running(service, 2)
            body = {"lora_name": "nine", "lora_path": "/adapters/9"}
            response = await client.post(LOAD, json=body)
            assert error_of(response, 429)["code"] == "adapters_in_use"
            assert response.headers["Retry-After"] == "1"
            await asyncio.gather(*running)
            assert (await client.post(LOAD, json=body)).status_code == 200
            assert len((await client.get("/v1/models")).json()["data"]) == 4

    run(test)


def test_only_who_is_trusted_changes_adapters(llm: LLM) -> None:
    """A server that others reach without a key reads no folder that a request names."""

    async def test() -> None:
        async with serving(llm, host="0.0.0.0") as (client, _):
            body = {"lora_name": "nine", "lora_path": "/adapters/9"}
            assert "--api-key" in error_of(await client.post(LOAD, json=body), 403)["message"]
            error_of(await client.post(UNLOAD, json={"lora_name": "seven"}), 403)
            assert (await ask(client, "seven"))["model"] == "seven"

    run(test)


def test_many_threads_ask_for_many_adapters(llm: LLM) -> None:
    """`LLM.generate(adapter=)`: the answers of each are as if it were alone."""
    from concurrent.futures import ThreadPoolExecutor

    from octavo.sampling_params import SamplingParams

    llm.load_adapter("eight", "/adapters/8")
    params = SamplingParams(max_tokens=12, temperature=0)

    def answer(name: str | None) -> Any:
        outputs = llm.generate(["ABCDE", "FGHIJ"], params, progress=False, adapter=name)
        return [output.outputs[0].token_ids for output in outputs]

    names = (None, "seven", "eight")
    alone = {name: answer(name) for name in names}
    assert len({str(each) for each in alone.values()}) == 3
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(answer, names * 4)) == [alone[name] for name in names * 4]
    (last,) = [c.result for c in llm.stream("ABCDE", params, adapter="eight") if c.result]
    assert last.outputs[0].token_ids == alone["eight"][0]
    llm.unload_adapter("eight")
    with pytest.raises(Exception, match="'eight' is not loaded: expected one of seven"):
        answer("eight")
