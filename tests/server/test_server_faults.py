"""Overload and faults: keys, full queues, deadlines, clients that go, draining, loading."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_helpers import (
    RawClient,
    error_of,
    events_of,
    fake_llm,
    run,
    runtime_of,
    serving,
    slow_down,
)

from octavo.errors import InvalidArgumentError
from octavo.llm import LLM
from octavo.server.app import create_app
from octavo.server.options import ServerOptions
from octavo.server.service import Service
from octavo.text.chat import ChatTemplate

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = {"prompt": "ABC", "max_tokens": 400, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    return fake_llm(tmp_path)


def test_keys(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm, api_keys=("secret", "other")) as (client, _):
            body = {"prompt": "A", "max_tokens": 1}
            wrong = ["", "Bearer", "Bearer ", "Bearer secre", "Bearer secret2", "Basic secret"]
            wrong += ["secret", "Bearer sécret"]
            for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize", "/nowhere"):
                for header in wrong:
                    headers = {"authorization": header.encode("latin-1")}
                    response = await client.post(path, json=body, headers=headers)
                    error = error_of(response, 401)
                    assert error["code"] == "invalid_api_key" and "secret" not in error["message"]
                    assert response.headers["www-authenticate"] == "Bearer"
                error_of(await client.post(path, json=body), 401)
            error_of(await client.get("/v1/models"), 401)
            for key in ("secret", "other"):
                headers = {"authorization": f"bearer {key}"}
                response = await client.post(COMPLETIONS, json=body, headers=headers)
                assert response.status_code == 200
            for path in ("/health", "/ready", "/version", "/metrics"):
                assert (await client.get(path)).status_code == 200

    run(test)


def test_a_full_queue_and_what_is_told(tmp_path: Path) -> None:
    llm = fake_llm(tmp_path, max_waiting_requests=2, max_num_seqs=1)

    async def test() -> None:
        slow_down(llm, 0.003)
        async with serving(llm) as (client, service):
            posts = [
                asyncio.ensure_future(
                    client.post(COMPLETIONS, json={**LONG, "max_tokens": 60, "stream": i % 2 == 1})
                )
                for i in range(8)
            ]
            responses = await asyncio.gather(*posts)
            refused = [r for r in responses if r.status_code == 429]
            assert len(refused) == 8 - sum(r.status_code == 200 for r in responses)
            assert 3 <= len(refused) <= 6
            for response in refused:
                error = error_of(response, 429)
                assert error["code"] == "queue_full" and int(response.headers["retry-after"]) >= 1
            assert (await client.post(COMPLETIONS, json={**LONG, "max_tokens": 1})).is_success
            text = (await client.get("/metrics")).text
            line = 'vllm:admission_rejections_total{engine="0",model_name="model",reason='
            assert f'{line}"queue_full"}} {len(refused)}.0' in text
            assert service.stats is not None and service.stats.engine.num_steps > 0

    run(test)


def test_deadlines(tmp_path: Path) -> None:
    llm = fake_llm(tmp_path, max_num_seqs=1)

    async def test() -> None:
        slow_down(llm, 0.005)
        async with serving(llm, request_timeout=0.5) as (client, _):
            response = await client.post(COMPLETIONS, json={**LONG, "timeout": 0.1})
            error = error_of(response, 504)
            assert error["param"] == "timeout" and error["code"] == "deadline_exceeded"
            assert "raise timeout" in error["message"]
            # Under way when it passes: the stream says so in its last event.
            sent = {**LONG, "timeout": 0.1, "stream": True}
            events = events_of((await client.post(COMPLETIONS, json=sent)).text)
            assert events[-1]["choices"][0]["finish_reason"] == "timeout" and len(events) > 3
            # In the queue when it passes: nothing was sent, so it is a status.
            first = asyncio.ensure_future(client.post(COMPLETIONS, json={**LONG, "timeout": 9}))
            await asyncio.sleep(0.05)
            for stream in (False, True):
                sent = {**LONG, "timeout": 0.05, "stream": stream}
                error_of(await client.post(COMPLETIONS, json=sent), 504)
            started = time.monotonic()
            error = error_of(await first, 504)  # the server's own limit, though it asked for more
            assert "longer than 0.5 seconds (--request-timeout)" in error["message"]
            assert time.monotonic() - started < 1

    run(test)


@pytest.mark.parametrize("prompt", ["ABC", ["ABC", "DEF", "GHI"]])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_blocks(llm: LLM, stream: bool, prompt: Any) -> None:
    async def test() -> None:
        slow_down(llm, 0.01)
        async with serving(llm) as (_, service):
            raw = RawClient(
                service, COMPLETIONS, {**LONG, "prompt": prompt, "n": 2, "stream": stream}
            )
            task = asyncio.ensure_future(raw.run())
            wanted = 2 if prompt == "ABC" else 6
            while await service.engine.call(lambda m: m.engine.scheduler.num_running) != wanted:
                await asyncio.sleep(0.01)
            steps = await service.engine.call(lambda m: m.engine.num_steps)
            raw.gone.set()
            await asyncio.wait_for(task, 5)
            assert await service.engine.call(lambda m: m.engine.scheduler.num_running) == 0
            # One, and those that pass while this test talks with the engine on a busy machine.
            assert await service.engine.call(lambda m: m.engine.num_steps) - steps <= 10
            assert service.engine.num_open == 0

    run(test)


def test_a_client_that_goes_before_its_body_is_whole(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as (_, service):
            raw = RawClient(service, COMPLETIONS, LONG)
            raw._read = True
            raw.gone.set()
            await raw.run()
            assert raw.sent[0]["status"] == 499 and service.engine.num_open == 0

    run(test)


def test_loading_and_draining(llm: LLM) -> None:
    go = threading.Event()

    def load() -> LLM:
        go.wait(20)
        return llm

    async def test() -> None:
        slow_down(llm, 0.004)
        service = Service(ServerOptions(shutdown_timeout=20), load)
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            starting = asyncio.ensure_future(service.start())
            await asyncio.sleep(0.05)
            for path in (COMPLETIONS, CHAT):
                body = {**LONG, "messages": [{"role": "user", "content": "x"}]}
                response = await client.post(path, json=body)
                assert error_of(response, 503)["code"] == "loading"
                assert int(response.headers["retry-after"]) >= 1
            for path in ("/health", "/ready"):
                assert (await client.get(path)).status_code == 503
            assert (await client.get("/v1/models")).json()["data"][0]["max_model_len"] is None
            assert (await client.get("/metrics")).status_code == 200
            go.set()
            await starting
            assert (await client.get("/ready")).status_code == 200

            running = asyncio.ensure_future(client.post(COMPLETIONS, json=LONG))
            await asyncio.sleep(0.1)
            draining = asyncio.ensure_future(service.drain())
            await asyncio.sleep(0.02)
            error = error_of(await client.post(COMPLETIONS, json=LONG), 503)
            assert error["code"] == "draining"
            assert (await client.get("/ready")).status_code == 503
            assert (await client.get("/health")).status_code == 200  # it still steps
            assert (await client.get("/v1/models")).is_success
            assert not running.done()
            await draining
            assert (await running).json()["usage"]["completion_tokens"] == 400
            await service.engine.stop()

    run(test)


def test_draining_runs_out_of_time(llm: LLM) -> None:
    async def test() -> None:
        slow_down(llm, 0.02)
        async with serving(llm, shutdown_timeout=0.2) as (client, service):
            whole = asyncio.ensure_future(client.post(COMPLETIONS, json=LONG))
            streamed = asyncio.ensure_future(
                client.post(COMPLETIONS, json={**LONG, "stream": True})
            )
            await asyncio.sleep(0.1)
            started = time.monotonic()
            await service.drain()
            assert 0.1 < time.monotonic() - started < 3
            error = error_of(await whole, 503)
            assert "shutting down" in error["message"]
            last = events_of((await streamed).text)[-1]
            assert "shutting down" in last["error"]["message"]

    run(test)


def test_a_model_that_cannot_be_loaded() -> None:
    def load() -> LLM:
        raise InvalidArgumentError("the weights are damaged")

    async def test() -> None:
        service = Service(ServerOptions(), load)
        with pytest.raises(InvalidArgumentError, match="damaged"):
            await service.start()
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            error_of(await client.post(COMPLETIONS, json=LONG), 503)
            assert "damaged" in (await client.get("/health")).json()["reason"]

    run(test)


def test_a_step_that_fails(llm: LLM) -> None:
    async def test() -> None:
        slow_down(llm, 0.005)
        async with serving(llm) as (client, _):
            for stream in (False, True):
                post = client.post(COMPLETIONS, json={**LONG, "stream": stream})
                running = asyncio.ensure_future(post)
                await asyncio.sleep(0.1)
                runtime_of(llm).fail_next = RuntimeError("a planted fault")
                response = await running
                last = events_of(response.text)[-1] if stream else None
                error = error_of(response, 500) if last is None else last["error"]
                assert "a planted fault" in error["message"]
                assert error["code"] == "engine_step_failed"
                assert (await client.get("/health")).status_code == 200
                body = {**LONG, "max_tokens": 2}
                assert (await client.post(COMPLETIONS, json=body)).status_code == 200

    run(test)


TEMPLATES = {
    "refuses": "{{ raise_exception('no ' + messages[0].content) }}",
    "fails": "{{ messages[0].content / 3 }}",
    "reaches out": "{{ messages.__class__.__base__.__subclasses__() }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_fails_fails_its_request_alone(tmp_path: Path, name: str) -> None:
    llm = fake_llm(tmp_path)
    llm.chat_template = ChatTemplate(TEMPLATES[name])

    async def test() -> None:
        async with serving(llm) as (client, _):
            body = {"messages": [{"role": "user", "content": "Hi"}]}
            good = client.post(COMPLETIONS, json={**LONG, "max_tokens": 3})
            bad, fine = await asyncio.gather(client.post(CHAT, json=body), good)
            assert error_of(bad, 400)["param"] == "messages"
            assert fine.status_code == 200

    run(test)


def test_what_nobody_foresaw_is_logged_and_hidden(
    llm: LLM, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("a secret of the house")

    async def test() -> None:
        monkeypatch.setattr("octavo.server.prepare.sampling_params", fail)
        async with serving(llm) as (client, _):
            error = error_of(await client.post(COMPLETIONS, json=LONG), 500)
            assert error["code"] == "internal_error" and "secret" not in error["message"]

    logging.getLogger("octavo").propagate = True
    run(test)
    assert any("did not foresee" in record.getMessage() for record in caplog.records)


def test_ids_and_traces_are_passed_through(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

    async def test() -> None:
        async with serving(llm) as (client, _):
            headers = {"x-request-id": "mine-1", "traceparent": f"00-{trace}-{parent}-01"}
            body = {**LONG, "max_tokens": 2}
            response = await client.post(COMPLETIONS, json=body, headers=headers)
            assert response.headers["x-request-id"] == "mine-1"
            assert response.headers["traceparent"] == headers["traceparent"]
            assert response.json()["id"].startswith("cmpl-mine-1-")
            evil = {"x-request-id": "a b\tc", "traceparent": "nonsense"}
            response = await client.post(COMPLETIONS, json=body, headers=evil)
            assert len(response.headers["x-request-id"]) == 32
            assert "traceparent" not in response.headers
            # Two at a time under one id do not disturb each other.
            both = [client.post(COMPLETIONS, json=body, headers=headers) for _ in range(2)]
            assert [r.status_code for r in await asyncio.gather(*both)] == [200, 200]

    with caplog.at_level(logging.INFO, "octavo"):
        logging.getLogger("octavo").propagate = True
        run(test)
    fields = [getattr(record, "octavo_fields", {}) for record in caplog.records]
    first = next(entry for entry in fields if entry.get("request_id") == "mine-1")
    assert first["trace_id"] == trace and first["parent_id"] == parent
    assert (first["status"], first["prompt_tokens"], first["completion_tokens"]) == (200, 3, 2)
    assert first["finish_reason"] == "length" and first["ttft_s"] >= 0


@pytest.mark.parametrize("stream", [False, True])
def test_the_log_counts_the_tokens_of_a_client_that_goes(
    llm: LLM, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    num_made = 0

    async def test() -> None:
        nonlocal num_made
        slow_down(llm, 0.01)
        async with serving(llm) as (_, service):
            raw = RawClient(service, COMPLETIONS, {**LONG, "n": 2, "stream": stream})
            task = asyncio.ensure_future(raw.run())
            while num_made < 6:
                await asyncio.sleep(0.005)
                num_made = sum(each.num_output_tokens for each in service.engine.open_streams())
            raw.gone.set()
            await task

    with caplog.at_level(logging.INFO, "octavo"):
        logging.getLogger("octavo").propagate = True
        run(test)
    (line,) = [f for r in caplog.records if "prompt_tokens" in (f := vars(r)["octavo_fields"])]
    assert line["completion_tokens"] >= num_made and 0 < line["ttft_s"] < 30


def test_metrics_have_vllms_names(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm, served_names=("tiny",)) as (client, _):
            for stream in (False, True):
                body = {**LONG, "max_tokens": 5, "n": 2, "stream": stream}
                assert (await client.post(COMPLETIONS, json=body)).status_code == 200
            text = (await client.get("/metrics")).text
            labels = 'engine="0",model_name="tiny"'
            for line in (
                f"vllm:prompt_tokens_total{{{labels}}} 6.0",
                f"vllm:generation_tokens_total{{{labels}}} 20.0",
                f"vllm:num_requests_running{{{labels}}} 0.0",
                'vllm:request_success_total{engine="0",finished_reason="length",'
                'model_name="tiny"} 4.0',
                f"vllm:time_to_first_token_seconds_count{{{labels}}} 2.0",
                f"vllm:inter_token_latency_seconds_count{{{labels}}} 16.0",
                f"vllm:e2e_request_latency_seconds_count{{{labels}}} 2.0",
                f"vllm:request_params_n_sum{{{labels}}} 4.0",
                f"vllm:num_preemptions_total{{{labels}}} 0.0",
            ):
                assert line in text, line
            sums = {
                part: float(re.search(rf"request_{part}_time_seconds_sum.* (\S+)", text)[1])
                for part in ("inference", "prefill", "decode")
            }
            assert sums["inference"] == pytest.approx(sums["prefill"] + sums["decode"])
            # vLLM's buckets, so that its dashboards show the same.
            ends = re.findall(r'iteration_tokens_total_bucket\{.*le="([0-9.]+)"', text)
            assert [float(end) for end in ends] == [1.0, *(2.0**n for n in range(3, 15))]
            assert "# TYPE vllm:kv_cache_usage_perc gauge" in text
            assert 'vllm:cache_config_info{block_size="4"' in text

    run(test)


def test_metrics_of_the_prefix_cache_are_those_of_the_engine(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm, served_names=("tiny",)) as (client, _):
            num_prompt = 0
            for _ in range(2):
                body = {"prompt": "the same prompt", "max_tokens": 2}
                answer = (await client.post(COMPLETIONS, json=body)).json()
                num_prompt += answer["usage"]["prompt_tokens"]
            text = (await client.get("/metrics")).text
        stats, labels = llm.engine.stats(), 'engine="0",model_name="tiny"'
        hits = stats.num_prefix_hits
        assert 0 < hits < stats.num_prefix_queries
        for line in (
            f"vllm:prefix_cache_queries_total{{{labels}}} {stats.num_prefix_queries}.0",
            f"vllm:prefix_cache_hits_total{{{labels}}} {hits}.0",
            f"vllm:prompt_tokens_cached_total{{{labels}}} {hits}.0",
            f'vllm:prompt_tokens_by_source_total{{{labels},source="local_cache_hit"}} {hits}.0',
            'vllm:prompt_tokens_by_source_total{engine="0",model_name="tiny",'
            f'source="local_compute"}} {num_prompt - hits}.0',
        ):
            assert line in text, line

    run(test)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"port": 70000}, "port is 70000"),
        ({"api_keys": ("",)}, "API key is empty"),
        ({"api_keys": ("ä",)}, "ASCII"),
        ({"api_keys": "key"}, "api_keys is 'key'; expected a list"),
        ({"allowed_origins": "https://example.org"}, "expected a list"),
        ({"served_names": ()}, "served_names"),
        ({"shutdown_timeout": -1}, "shutdown_timeout is -1"),
        ({"stall_timeout": 0}, "stall_timeout is 0"),
        ({"request_timeout": 0}, "request_timeout is 0"),
        ({"max_body_bytes": 0}, "max_body_bytes is 0"),
        ({"tool_parser": "x"}, "tool_parser is 'x'"),
        ({"log_format": "x"}, "log_format is 'x'"),
    ],
)
def test_wrong_options_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        ServerOptions(**fields)


def test_who_is_open_to_the_network() -> None:
    for host, is_open in (("127.0.0.1", False), ("localhost", False), ("::1", False)):
        assert ServerOptions(host=host).is_open == is_open
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        assert ServerOptions(host=host).is_open
        assert not ServerOptions(host=host, api_keys=("k",)).is_open
