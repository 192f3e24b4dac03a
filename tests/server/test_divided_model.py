"""`octavo serve -tp 2`: a server in a process of its own, and another one for its second rank."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_helpers import ServerProcess, server_process
from text_helpers import tiny_model

LIMITS = ("--load-format", "dummy", "--device", "cpu", "--num-threads", "1", "--max-num-seqs", "4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), context=4096)


def ranks_of(server: ServerProcess) -> list[int]:
    pid = server.process.pid
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def ask(server: ServerProcess, **body: Any) -> httpx.Response:
    request = {"prompt": "The ship", "temperature": 0, "max_tokens": 8, "ignore_eos": True, **body}
    request["model"] = httpx.get(server.url + "/v1/models").json()["data"][0]["id"]
    return httpx.post(server.url + "/v1/completions", json=request, timeout=60)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def wait_until_ended(pids: list[int]) -> None:
    end = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end, "a process is left"
        time.sleep(0.02)


def test_it_answers_and_ends_when_all_its_processes_are_told_to(
    model: Path, tmp_path: Path
) -> None:
    """As a service manager does it: the request that is being answered is answered to its end."""
    with server_process(tmp_path, str(model), *LIMITS) as server:
        expected = text_of(ask(server))
        expected_long = text_of(ask(server, max_tokens=3000))
    (tmp_path / "tp").mkdir()
    with server_process(tmp_path / "tp", str(model), *LIMITS, "-tp", "2") as server:
        assert text_of(ask(server)) == expected
        assert httpx.get(server.url + "/metrics").status_code == 200
        pids = ranks_of(server)
        assert len(pids) == 1
        found: list[str] = []
        asking = threading.Thread(
            target=lambda: found.append(text_of(ask(server, max_tokens=3000)))
        )
        asking.start()
        while not httpx.get(server.url + "/engine").json()["stats"]["num_running"]:
            assert asking.is_alive()
        assert not found
        for pid in (*pids, server.process.pid):
            os.kill(pid, signal.SIGTERM)
        asking.join(60)
        assert found == [expected_long]
        assert server.process.wait(30) == 0
        wait_until_ended(pids)
        assert "Traceback" not in server.log_path.read_text()


def test_it_says_so_when_a_rank_is_killed(model: Path, tmp_path: Path) -> None:
    with server_process(tmp_path, str(model), *LIMITS, "-tp", "2") as server:
        pids = ranks_of(server)
        os.kill(pids[0], signal.SIGKILL)
        for _ in range(2):
            begin = time.monotonic()
            response = ask(server)
            assert response.status_code >= 500, response.text
            assert time.monotonic() - begin < 5
        health = httpx.get(server.url + "/health")
        assert health.status_code == 503 and "rank 1 of the model" in health.json()["reason"]
        assert server.stop() is not None
        wait_until_ended(pids)


def test_it_says_so_while_nobody_asks(model: Path, tmp_path: Path) -> None:
    with server_process(tmp_path, str(model), *LIMITS, "-tp", "2") as server:
        assert httpx.get(server.url + "/health").status_code == 200
        os.kill(ranks_of(server)[0], signal.SIGKILL)
        end = time.monotonic() + 10
        while (health := httpx.get(server.url + "/health")).status_code == 200:
            assert time.monotonic() < end, "a lost model is healthy"
            time.sleep(0.1)
        assert "rank 1 of the model" in health.json()["reason"]
