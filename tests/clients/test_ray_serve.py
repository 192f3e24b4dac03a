"""Replicas by Ray Serve: two, each with two ranks, behind one address; one of them loses a rank."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from parrot import write_parrot
from pydantic import ValidationError

from octavo.errors import InvalidArgumentError

with warnings.catch_warnings():  # Ray's own
    warnings.simplefilter("ignore")
    from octavo.server.ray_serve import Replicas, replicas

LOOP = {"la": "la", "sing": "la"}
_MARK = "OCTAVO_TEST_OF_REPLICAS"  # by which a process is known
BODY = {"prompt": "sing", "max_tokens": 4}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@contextlib.contextmanager
def ray_serve(folder: Path, arguments: dict[str, Any]) -> Iterator[httpx.Client]:
    """`serve run` with a file, in a process of its own; Ray ends with it."""
    port = free_port()
    application = {
        "name": "octavo",
        "route_prefix": "/",
        "import_path": "octavo.server.ray_serve:replicas",
        "args": arguments,
    }
    file, log_path = folder / "replicas.yaml", folder / "ray.log"
    file.write_text(yaml.dump({"http_options": {"port": port}, "applications": [application]}))
    program = str(Path(sys.executable).with_name("serve"))
    variables = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", _MARK: str(folder)}
    variables["RAY_metrics_report_interval_ms"] = "1000"
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [program, "run", str(file)], stdout=log, stderr=log, env={**os.environ, **variables}
        )
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        said = log_path.read_text()
        assert process.poll() is None and "startup failed" not in said, said
        with contextlib.suppress(httpx.TransportError):
            return client.get("/ready").is_success
        return False

    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            until(is_ready, 120)
            yield client
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


def metric_of_replicas(name: str) -> dict[str, float]:
    """The values of one of octavo's metrics among Ray's own, by replica."""
    found: dict[str, float] = {}
    discovery = json.loads(Path("/tmp/ray/prom_metrics_service_discovery.json").read_text())
    for target in discovery[0]["targets"]:
        with contextlib.suppress(httpx.TransportError):
            text = httpx.get(f"http://{target}/metrics").text
            for labels, value in re.findall(rf"^ray_{name}\{{(.*)\}} (\S+)$", text, re.M):
                if 'model_name="bird"' in labels:
                    replica = re.findall(r'ReplicaId="(\w+)"', labels)[0]
                    found[replica] = found.get(replica, 0) + float(value)
    return found


def ranks_of(folder: Path) -> set[int]:
    """The processes that are other ranks of these replicas."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            is_rank = b"rank_process" in (entry / "cmdline").read_bytes()
            if is_rank and f"{_MARK}={folder}".encode() in (entry / "environ").read_bytes():
                found.add(int(entry.name))
    return found


def write_model(folder: Path) -> str:
    """A parrot that two ranks can divide: its attention is zero, whatever its heads are."""
    file = write_parrot(folder, LOOP, context=512) / "config.json"
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    file.write_text(json.dumps({**json.loads(file.read_text()), **heads}))
    return str(folder)


def test_replicas_share_requests_and_one_that_fails_is_replaced(tmp_path: Path) -> None:
    arguments = {
        "model": write_model(tmp_path / "parrot"),
        "num_replicas": 2,
        "tensor_parallel_size": 2,
        "max_num_seqs": 4,
        "num_kv_blocks": 64,
        "server": {"served_names": ["bird"]},
        "deployment": {"ray_actor_options": {"num_cpus": 0}, "health_check_period_s": 1},
    }
    with ray_serve(tmp_path, arguments) as client, ThreadPoolExecutor(16) as pool:

        def ask(number: int) -> str:
            answer = client.post("/v1/completions", json=BODY)
            assert answer.is_success, answer.text
            assert answer.json()["model"] == "bird"
            return str(answer.json()["choices"][0]["text"])

        assert set(pool.map(ask, range(48))) == {"lalalala"}
        with client.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
            lines = [line for line in response.iter_lines() if line]
        assert len(lines) > 4 and lines[-1] == "data: [DONE]"
        # Any of the two answers: each has computed something.
        assert min(client.get("/health").json()["steps"] for _ in range(40)) > 0
        until(lambda: sum(metric_of_replicas("vllm_request_success_total").values()) == 49, 60)
        answered = metric_of_replicas("vllm_request_success_total")
        assert len(answered) == 2 and min(answered.values()) > 0
        assert metric_of_replicas("vllm_e2e_request_latency_seconds_count") == answered
        before = ranks_of(tmp_path)
        assert len(before) == 2

        os.kill(min(before), signal.SIGKILL)
        until(lambda: len(ranks_of(tmp_path) - before) == 1, 60)
        until(lambda: all(client.get("/ready").is_success for _ in range(20)), 60)
        assert set(pool.map(ask, range(48))) == {"lalalala"}
    until(lambda: not ranks_of(tmp_path), 10)


def test_arguments_are_texts_from_a_command_line(tmp_path: Path) -> None:
    """What Ray is asked for, by the arguments of a replica."""
    model = write_model(tmp_path / "parrot")

    def asked(**arguments: Any) -> Any:
        return replicas(Replicas.model_validate({"model": model, **arguments}))._bound_deployment

    plain = asked()
    assert (plain.name, plain.num_replicas, plain.max_ongoing_requests) == ("octavo", 1, 64)
    assert plain.ray_actor_options["num_cpus"] == 1
    wide = asked(num_replicas="3", tensor_parallel_size="2", num_threads="4", max_num_seqs="7")
    assert (wide.num_replicas, wide.max_ongoing_requests) == (3, 7)
    assert wide.ray_actor_options["num_cpus"] == 8
    on_gpus = asked(device="cuda", tensor_parallel_size="2")
    assert on_gpus.ray_actor_options["num_gpus"] == 2
    processor = {"num_cpus": 2, "memory": 1 << 30}
    own = {"num_replicas": 2, "max_ongoing_requests": 5, "ray_actor_options": processor}
    changed = asked(deployment=own)
    assert (changed.num_replicas, changed.max_ongoing_requests) == (2, 5)
    assert changed.ray_actor_options["num_cpus"] == 2
    assert changed.ray_actor_options["memory"] == 1 << 30


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_seqs": 3}, InvalidArgumentError, "max_seqs; expected fields of EngineConfig"),
        ({"max_num_seqs": "0"}, ValidationError, "max_num_seqs is 0"),
        ({"max_num_seqs": "many"}, ValidationError, "valid integer"),
        ({"num_replicas": "some"}, ValidationError, "valid integer"),
    ],
)
def test_what_is_wrong_is_named(arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        replicas(Replicas.model_validate({"model": "smollm2-135m", **arguments}))
