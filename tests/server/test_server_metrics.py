"""What the metrics count of requests that sample otherwise, and of those that end early."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_helpers import RawClient, error_of, fake_llm, run, runtime_of, serving, slow_down

from octavo.engine.outputs import OutputChunk
from octavo.llm import LLM

COMPLETIONS = "/v1/completions"


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    return fake_llm(tmp_path)


async def metric(client: httpx.AsyncClient, name: str) -> float:
    text = (await client.get("/metrics")).text
    found = re.search(rf"^vllm:{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
    assert found, name
    return float(found[1])


async def ends(client: httpx.AsyncClient) -> dict[str, int]:
    """How many answers have ended, by reason."""
    text = (await client.get("/metrics")).text
    found = re.findall(r'^vllm:request_success_total\{.*reason="(\w+)",.*\} (\S+)$', text, re.M)
    return {reason: int(float(count)) for reason, count in found if float(count)}


@pytest.mark.parametrize(
    ("body", "num_tokens", "num_first"),
    [
        ({"max_tokens": 4, "n": 3}, 12, 1),
        ({"max_tokens": 4, "n": 3, "use_beam_search": True}, 12, 1),
        ({"max_tokens": 0, "echo": True, "logprobs": 1}, 0, 0),
        ({"max_tokens": 200, "n": 2, "timeout": 1e-9}, 0, 0),  # its prompt was never processed
    ],
)
def test_tokens_of_requests_of_every_kind(
    llm: LLM, body: dict[str, Any], num_tokens: int, num_first: int
) -> None:
    async def test() -> None:
        async with serving(llm) as (client, service):
            asked = {"prompt": "hello", "ignore_eos": True, **body}
            is_late = "timeout" in body
            response = await client.post(COMPLETIONS, json=asked)
            assert response.status_code == (504 if is_late else 200), response.text
            assert await metric(client, "prompt_tokens_total") == (0 if is_late else 5)
            assert await metric(client, "request_prompt_tokens_sum") == 5
            assert await metric(client, "generation_tokens_total") == num_tokens
            assert await metric(client, "request_generation_tokens_sum") == num_tokens
            assert await metric(client, "time_to_first_token_seconds_count") == num_first
            assert 0 <= await metric(client, "time_to_first_token_seconds_sum") < 60
            assert service.metrics is not None and len(service.metrics.recent_ttft) == num_first
            reason = "timeout" if is_late else "length"
            assert await ends(client) == {reason: body.get("n", 1)}

    run(test)


def test_answers_that_end_early_are_counted_one_by_one_and_by_reason(llm: LLM) -> None:
    body = {"prompt": "hello", "max_tokens": 400, "ignore_eos": True, "n": 4}

    async def test() -> None:
        slow_down(llm, 0.01)
        async with serving(llm) as (client, service):

            async def has_begun() -> None:
                while not any(s.num_output_tokens for s in service.engine.open_streams()):
                    await asyncio.sleep(0.005)

            raw = RawClient(service, COMPLETIONS, {**body, "stream": True})
            task = asyncio.ensure_future(raw.run())
            await has_begun()
            (stream,) = service.engine.open_streams()
            stream.put(OutputChunk(stream.request.request_id, 2, "", finish_reason="stop"))
            assert await ends(client) == {"stop": 1}
            raw.gone.set()
            await task
            assert await ends(client) == {"stop": 1, "abort": 3}

            runtime_of(llm).fail_next = RuntimeError("a device")
            error_of(await client.post(COMPLETIONS, json={**body, "n": 2}), 500)
            assert await ends(client) == {"stop": 1, "abort": 3, "error": 2}

            beams = {**body, "n": 3, "max_tokens": 200, "use_beam_search": True}
            post = asyncio.ensure_future(client.post(COMPLETIONS, json=beams))
            while not service.engine.num_open:
                await asyncio.sleep(0.005)
            service.abort_all()  # as at the end of the time to shut down
            error_of(await post, 503)
            assert await ends(client) == {"stop": 1, "abort": 6, "error": 2}

    run(test, seconds=30)


def test_every_reason_of_a_preemption_stands_at_0_from_the_start(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as (client, _):
            text = (await client.get("/metrics")).text
        found = re.findall(r"^octavo:preemptions_total\{.*reason=\"(\w+)\".* 0.0$", text, re.M)
        assert found == ["kv_blocks", "priority", "rope"]

    run(test)


def test_what_was_asked_for_is_counted_of_answered_requests_alone(tmp_path: Path) -> None:
    """As vLLM counts it, and as the other histograms of requests do."""
    llm = fake_llm(tmp_path, max_waiting_requests=1)
    body = {"prompt": "hello", "max_tokens": 40, "ignore_eos": True}

    async def test() -> None:
        slow_down(llm, 0.01)
        async with serving(llm) as (client, _):
            posts = [client.post(COMPLETIONS, json=body) for _ in range(30)]
            codes = [response.status_code for response in await asyncio.gather(*posts)]
            assert set(codes) == {200, 429}
            for name in ("request_prompt_tokens", "request_params_n", "request_params_max_tokens"):
                assert await metric(client, name + "_count") == codes.count(200), name
            num_tokens = await metric(client, "request_generation_tokens_sum")
            assert await metric(client, "request_params_max_tokens_sum") == num_tokens

    run(test)


def test_a_limit_of_hundreds_of_digits_is_as_many_tokens_as_fit(llm: LLM) -> None:
    """It was no number for a metric: the client waited for ever, as did others of its step."""

    async def test() -> None:
        async with serving(llm) as (client, _):
            bodies = [{"prompt": "hello", "max_tokens": each} for each in (10**400, 4)]
            posts = [client.post(COMPLETIONS, json=body) for body in bodies]
            responses = await asyncio.wait_for(asyncio.gather(*posts), 20)
            assert [response.status_code for response in responses] == [200, 200]
            assert await metric(client, "request_params_max_tokens_count") == 2

    run(test)


@pytest.mark.parametrize("num_answers", [1, 4])
def test_the_time_for_a_token_is_that_of_one_answer(llm: LLM, num_answers: int) -> None:
    """Each step gives all answers a token, so it is about a step's time for any number of them."""
    body = {"prompt": "hello", "max_tokens": 11, "ignore_eos": True, "n": num_answers}

    async def test() -> None:
        slow_down(llm, 0.01)
        async with serving(llm) as (client, _):
            assert (await client.post(COMPLETIONS, json=body)).status_code == 200
            for_one = await metric(client, "request_time_per_output_token_seconds_sum")
            decoding = await metric(client, "request_decode_time_seconds_sum")
            assert for_one == pytest.approx(decoding / 10) and for_one >= 0.01

    run(test)


def test_samples_are_the_numbers_of_the_text(llm: LLM) -> None:
    async def test() -> None:
        async with serving(llm) as (client, service):
            for prompt in ("ABC", "xyz"):
                body = {"prompt": prompt, "max_tokens": 9, "ignore_eos": True}
                assert (await client.post(COMPLETIONS, json=body)).status_code == 200
            text = (await client.get("/metrics")).text
            assert service.metrics is not None
            found = list(service.metrics.samples())
            families = text_string_to_metric_families(text)
            samples = [sample for family in families for sample in family.samples]
            want = [s[:3] for s in samples if not s.name.endswith("_created")]
            assert len(found) == len(want) > 300
            for name, labels, value in found:
                assert (name, labels, value) in want
            assert sum(value for name, _, value in found if "generation_tokens_total" in name) == 18

    run(test)
