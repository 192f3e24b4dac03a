"""A real server in a process of its own, SmolLM2 in it, and OpenAI's own client outside."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from reference_helpers import SMOLLM2_MISSING, smollm2_path
from server_helpers import ServerProcess, server_process

from octavo.llm import LLM
from octavo.sampling_params import SamplingParams

MODEL = "smollm2-135m"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
pytestmark = pytest.mark.skipif(smollm2_path() is None, reason=SMOLLM2_MISSING)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("server")
    options = ("--max-model-len", "1024", "--max-num-seqs", "16", "--num-threads", "2")
    keys = {"OCTAVO_API_KEY": "secret"}
    with server_process(directory, *options, environment=keys) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-none")


def test_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    (choice,) = answer.choices
    assert choice.message.content == ANSWER and choice.finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (37, 8)


def test_a_streamed_chat(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=2,
    )
    text, reason, usage, num_logprobs = "", None, None, 0
    for chunk in stream:
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
            reason = chunk.choices[0].finish_reason or reason
            if chunk.choices[0].logprobs and chunk.choices[0].logprobs.content:
                num_logprobs += len(chunk.choices[0].logprobs.content)
        usage = chunk.usage or usage
    assert (text, reason, num_logprobs) == (ANSWER, "stop", 8)
    assert usage is not None and usage.total_tokens == 45


def test_many_at_a_time_answer_as_alone(client: openai.OpenAI, server: ServerProcess) -> None:
    """Sixteen asynchronous streams, sampled, against the blocking API in this process."""
    prompts = [f"Question {i}: what is {i} plus {i * 7}?" for i in range(16)]

    async def ask(session: openai.AsyncOpenAI, index: int) -> str:
        stream = await session.completions.create(
            model=MODEL,
            prompt=prompts[index],
            max_tokens=24,
            temperature=0.8,
            seed=index,
            presence_penalty=0.5 if index % 3 == 0 else 0.0,
            stream=True,
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all() -> list[str]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="secret") as session:
            return await asyncio.gather(*(ask(session, index) for index in range(16)))

    texts = asyncio.run(ask_all())
    llm = LLM(MODEL, max_model_len=1024, num_threads=2)
    for index in (0, 5, 15):
        penalty = 0.5 if index % 3 == 0 else 0.0
        params = SamplingParams(
            max_tokens=24, temperature=0.8, seed=index, presence_penalty=penalty
        )
        (output,) = llm.generate([prompts[index]], params, progress=False)
        assert texts[index] == output.text


def test_completions_with_everything(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt=["The capital of France is", "Two and two is"],
        max_tokens=8,
        temperature=0,
        n=2,
        logprobs=1,
        stop=["\n"],
        logit_bias={"0": -100},
        frequency_penalty=0.1,
        extra_body={"min_tokens": 2, "ignore_eos": True, "priority": 1, "cache_salt": "a"},
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text
    assert answer.choices[0].text.startswith(" Paris")
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.tokens


def test_errors_are_the_clients_own(server: ServerProcess, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=-1)
    assert bad.value.param == "temperature" and bad.value.status_code == 400
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-none", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt="word " * 3000)
    assert bad.value.code == "context_length_exceeded"
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    late = client.with_options(timeout=60)
    with pytest.raises(openai.InternalServerError) as slow:
        late.completions.create(
            model=MODEL,
            prompt="Once",
            max_tokens=900,
            extra_body={"ignore_eos": True, "timeout": 0.2},
        )
    assert slow.value.status_code == 504


def gauge(server: ServerProcess, name: str) -> float:
    for line in httpx.get(f"{server.url}/metrics").text.splitlines():
        if line.startswith(f"{name}{{"):
            return float(line.rpartition(" ")[2])
    raise AssertionError(name)


def test_a_socket_that_closes_frees_its_blocks(server: ServerProcess) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    body = {"prompt": "Once", "max_tokens": 1000, "ignore_eos": True, "n": 3}
    for stream in (True, False):
        content = json.dumps({**body, "stream": stream}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer secret\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + content)
            wait_until(lambda: gauge(server, "vllm:num_requests_running") == 3)
        started = time.monotonic()
        wait_until(lambda: gauge(server, "vllm:num_requests_running") == 0)
        assert time.monotonic() - started < 10  # a few steps; 1000 tokens take far longer
        assert gauge(server, "vllm:kv_cache_usage_perc") == 0


def wait_until(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_log_is_json_with_the_requests_id(server: ServerProcess) -> None:
    headers = {"Authorization": "Bearer secret", "X-Request-Id": "log-test"}
    body = {"prompt": "Hello", "max_tokens": 2, "ignore_eos": True}
    httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).raise_for_status()
    entry = server.wait_for("request", request_id="log-test")
    assert entry["status"] == 200 and entry["completion_tokens"] == 2
    assert "secret" not in server.log_path.read_text()


@pytest.mark.parametrize("second", [False, True])
def test_a_signal_drains_and_a_second_one_stops(tmp_path: Path, second: bool) -> None:
    body = {"prompt": "Once", "max_tokens": 1000 if second else 150, "ignore_eos": True}
    with server_process(tmp_path, "--max-model-len", "1024") as server:

        def ask() -> httpx.Response:
            return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(ask)
            wait_until(lambda: gauge(server, "vllm:num_requests_running") == 1)
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("draining")
            assert ask().status_code == 503
            if second:
                server.process.send_signal(signal.SIGTERM)
                assert running.result().status_code == 503
            else:
                assert running.result().json()["usage"]["completion_tokens"] == 150
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log_path.read_text()


LOADING = """
import time
from octavo.server.options import ServerOptions
from octavo.server.serving import serve
serve(ServerOptions(port=0, log_format="json"), lambda: time.sleep(600))
"""


# Soon one of its calls ends after Python has begun to.
IN_THE_CORE = f"""
from octavo._native import measure_flops

def load():
    while True:
        measure_flops(num_threads=1, seconds=0.01)

{LOADING.replace("lambda: time.sleep(600)", "load")}"""


@pytest.mark.parametrize("code", [LOADING, IN_THE_CORE], ids=["waiting", "in the core"])
def test_a_signal_while_loading(tmp_path: Path, code: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stderr is not None
    assert json.loads(process.stderr.readline())["event"] == "listening"
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=20)
    assert process.returncode == 0 and "stopped" in log and "Traceback" not in log


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    code = LOADING.replace("time.sleep(600)", "exec('raise OSError(\"damaged\")')")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1 and "OSError: damaged" in done.stderr
    command = [sys.executable, "-m", "octavo", "serve", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr


def test_a_port_in_use_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "octavo", "serve", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"127.0.0.1:{port} cannot be listened on" in done.stderr
    assert "Traceback" not in done.stderr


def test_from_start_to_first_token(tmp_path: Path) -> None:
    started = time.monotonic()
    with server_process(tmp_path, "--max-model-len", "1024") as server:
        body = {"messages": QUESTION, "temperature": 0, "max_tokens": 1}
        response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        seconds = time.monotonic() - started
        assert response.json()["choices"][0]["message"]["content"] == "The"
    print(f"start to first token: {seconds:.2f} s")
    assert seconds < 15  # under 3 s on a quiet machine: docs/server.md; tests share theirs
