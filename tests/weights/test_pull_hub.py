"""Pulling from the Hugging Face Hub, played by a small server on the loopback interface.

The hub's address is read when huggingface_hub is imported, so each pull runs in a process.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from embedding_helpers import write_embedding_model
from weights_helpers import tiny_config, write_model

from octavo.weights.checkpoint import open_checkpoint
from octavo.weights.model_files import read_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by name (file -> content), errors by name, and what was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.errors: dict[str, tuple[int, dict[str, str]]] = {}
        self.requests: list[str] = []
        self.fail_once: set[str] = set()
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        self.requests.append(f"{request.command} {path}")
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        repository = "/".join(parts[2:4] if is_api else parts[:2])
        if repository in self.errors or repository not in self.files:
            status, headers = self.errors.get(repository, (404, {"X-Error-Code": "RepoNotFound"}))
            self.send(request, status, b"{}", headers)
        elif is_api:
            siblings = [
                {"rfilename": name, "size": len(content)}
                for name, content in self.files[repository].items()
            ]
            revision = parts[5] if len(parts) > 5 else "main"
            if revision in ("main", "v1", COMMIT):
                body = {"id": repository, "sha": COMMIT, "siblings": siblings}
                self.send(request, 200, json.dumps(body).encode(), {})
            else:
                self.send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            self.send_file(request, repository, "/".join(parts[4:]))

    def send_file(
        self, request: http.server.BaseHTTPRequestHandler, repository: str, name: str
    ) -> None:
        content = self.files[repository].get(name)
        if content is None:
            self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
        }
        if request.command == "GET" and name in self.fail_once:
            self.fail_once.discard(name)
            self.send(request, 403, b"", {})
            return
        self.send(request, 200, content, headers)

    def send(
        self,
        request: http.server.BaseHTTPRequestHandler,
        status: int,
        content: bytes,
        headers: dict[str, str],
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[Hub]:
    running = Hub()
    yield running
    running.server.shutdown()
    running.server.server_close()


def repository_files(directory: Path, **options: Any) -> dict[str, bytes]:
    """A model with all that a repository has beside it."""
    write_model(directory, tiny_config(), **options)
    files = {entry.name: entry.read_bytes() for entry in directory.iterdir()}
    files["tokenizer.json"] = files["tokenizer_config.json"] = b"{}"
    files["chat_template.jinja"] = b"{{ messages }}"
    files["additional_chat_templates/tool_use.jinja"] = b"{{ tools }}"
    files["additional_chat_templates/notes.txt"] = files["other/tool_use.jinja"] = b"not one"
    files["pytorch_model.bin"] = files["original/consolidated.00.pth"] = b"pickle"
    files["README.md"] = b"# a model"
    files["onnx/config.json"] = b"{}"
    return files


def octavo(hub: Hub, home: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Run `octavo ARGUMENTS`; returns the exit code and what it said."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "OCTAVO_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-m", "octavo", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_repository_becomes_a_model(num_shards: int, hub: Hub, tmp_path: Path) -> None:
    hub.files["org/model-1"] = repository_files(tmp_path / "source", num_shards=num_shards)
    code, said = octavo(hub, tmp_path, "pull", "org/model-1")
    assert code == 0, said
    path = tmp_path / "models" / "org--model-1"
    assert "is ready" in said
    weights = {name for name in hub.files["org/model-1"] if name.startswith("model")}
    assert {entry.name for entry in path.iterdir()} == weights | {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates",
        "octavo.json",
    }
    named = [entry.name for entry in (path / "additional_chat_templates").iterdir()]
    assert named == ["tool_use.jinja"]
    assert len(open_checkpoint(read_model(path))) == 21
    assert json.loads((path / "octavo.json").read_text()) == {
        "source": "org/model-1",
        "revision": COMMIT,
    }
    assert not any(".bin" in request or ".pth" in request for request in hub.requests)
    # The second time asks nobody; and the name is one that the other commands take.
    hub.requests.clear()
    code, said = octavo(hub, tmp_path, "pull", "org/model-1")
    assert code == 0 and "is there already" in said
    code, said = octavo(hub, tmp_path, "info", "org/model-1")
    assert code == 0, said
    assert hub.requests == []


@pytest.mark.parametrize(
    ("status", "headers", "parts"),
    [
        (401, {"X-Error-Code": "GatedRepo"}, ("is gated", "accept its terms", "HF_TOKEN")),
        (403, {"X-Error-Code": "GatedRepo"}, ("is gated", "accept its terms", "HF_TOKEN")),
        (404, {"X-Error-Code": "RepoNotFound"}, ("does not exist", "Check the name")),
        (401, {"X-Error-Code": "RepoNotFound"}, ("does not exist", "log in")),
        (401, {}, ("HTTP 401", "log in")),
        (403, {}, ("HTTP 403", "log in")),
        (400, {}, ("HTTP 400", "could not be fetched")),
    ],
)
def test_refusals_say_the_next_step(
    status: int, headers: dict[str, str], parts: tuple[str, ...], hub: Hub, tmp_path: Path
) -> None:
    hub.errors["org/private"] = (status, headers)
    code, said = octavo(hub, tmp_path, "pull", "org/private")
    assert code == 2
    assert "org/private" in said
    for part in parts:
        assert part in said, said


@pytest.mark.parametrize(
    ("without", "parts"),
    [
        ("model.safetensors", ("safetensors only", "pickle")),
        ("tokenizer.json", ("no tokenizer.json", "save_pretrained")),
        ("config.json", ("no config.json",)),
    ],
)
def test_a_repository_that_lacks_something_costs_no_download(
    without: str, parts: tuple[str, ...], hub: Hub, tmp_path: Path
) -> None:
    hub.files["org/part"] = repository_files(tmp_path / "source")
    del hub.files["org/part"][without]
    code, said = octavo(hub, tmp_path, "pull", "org/part")
    assert code == 2
    assert all(part in said for part in parts), said
    assert not any("resolve" in request for request in hub.requests)


def test_shards_without_an_index(hub: Hub, tmp_path: Path) -> None:
    files = repository_files(tmp_path / "source", num_shards=3)
    del files["model.safetensors.index.json"]
    hub.files["org/shards"] = files
    code, said = octavo(hub, tmp_path, "pull", "org/shards")
    assert code == 0, said
    assert len(open_checkpoint(read_model(tmp_path / "models" / "org--shards"))) == 21
    hub.files["org/fewer"] = dict(files)
    del hub.files["org/fewer"]["model-00002-of-00003.safetensors"]
    hub.requests.clear()
    code, said = octavo(hub, tmp_path, "pull", "org/fewer")
    assert code == 2 and "missing: model-00002-of-00003.safetensors" in said, said
    assert not any("resolve" in request for request in hub.requests)


def test_an_unsupported_model_costs_one_small_file(hub: Hub, tmp_path: Path) -> None:
    files = repository_files(tmp_path / "source")
    files["config.json"] = json.dumps(tiny_config(architectures=["MambaForCausalLM"])).encode()
    hub.files["org/other"] = files
    code, said = octavo(hub, tmp_path, "pull", "org/other")
    assert code == 2 and "MambaForCausalLM" in said and "LlamaForCausalLM" in said
    asked = {request.split("/")[-1] for request in hub.requests if "resolve" in request}
    assert asked == {"config.json"}


def test_an_interrupted_pull_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.files["org/big"] = repository_files(tmp_path / "source", num_shards=3)
    last = "model-00003-of-00003.safetensors"
    hub.fail_once = {last}
    code, said = octavo(hub, tmp_path, "pull", "org/big")
    assert code == 2 and "HTTP 403" in said
    assert [entry.name for entry in (tmp_path / "models").iterdir() if entry.is_dir()] == [
        ".org--big.partial"
    ]
    code, said = octavo(hub, tmp_path, "info", "org/big", HF_HUB_OFFLINE="1")
    assert code == 2 and "without it org/big is fetched" in said
    hub.requests.clear()
    code, said = octavo(hub, tmp_path, "pull", "org/big")
    assert code == 0, said
    fetched = {request.split("/")[-1] for request in hub.requests if request.startswith("GET /org")}
    assert fetched == {last}
    files = [entry.name for entry in (tmp_path / "models" / "org--big").iterdir()]
    assert last in files and ".cache" not in files


def test_an_interrupted_pull_is_listed_and_can_be_removed(hub: Hub, tmp_path: Path) -> None:
    hub.files["org/big"] = repository_files(tmp_path / "source", num_shards=3)
    hub.fail_once = {"model-00003-of-00003.safetensors"}
    assert octavo(hub, tmp_path, "pull", "org/big")[0] == 2
    code, said = octavo(hub, tmp_path, "list")
    assert code == 0 and "org/big (incomplete)" in said
    found = json.loads(octavo(hub, tmp_path, "list", "--json")[1])
    assert found["models"] == {} and found["incomplete"]["org/big"] > 10_000
    code, said = octavo(hub, tmp_path, "remove", "org/other")
    assert code == 2 and "pulled are: org/big" in said
    code, said = octavo(hub, tmp_path, "remove", "org/big")
    assert code == 0 and "org/big is deleted" in said
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize("verb", [["pull"], ["generate", "hi", "-m"]], ids=["pull", "generate"])
def test_a_pull_of_nothing_leaves_nothing(hub: Hub, tmp_path: Path, verb: list[str]) -> None:
    hub.files["org/secret"] = repository_files(tmp_path / "source")
    hub.fail_once = {"config.json"}
    for name in ("models/llama", "org/secret"):
        code, said = octavo(hub, tmp_path, *verb, name)
        assert code == 2 and ("there is no folder " + name in said) == (verb != ["pull"])
        assert not list((tmp_path / "models").iterdir())


def test_an_interrupted_pull_of_another_revision_leaves_no_files(hub: Hub, tmp_path: Path) -> None:
    hub.files["org/big"] = repository_files(tmp_path / "one", num_shards=1)
    hub.fail_once = {"tokenizer.json", "tokenizer_config.json"}
    assert octavo(hub, tmp_path, "pull", "org/big")[0] == 2
    partial = tmp_path / "models" / ".org--big.partial"
    (partial / "model.safetensors").write_bytes(b"of the other revision")
    (partial / "chat_template.json").write_bytes(b"of the other revision")
    templates = partial / "additional_chat_templates"
    templates.mkdir(exist_ok=True)
    (templates / "rag.jinja").write_bytes(b"of the other revision")
    hub.fail_once = set()
    hub.files["org/big"] = repository_files(tmp_path / "three", num_shards=3, seed=8)
    code, said = octavo(hub, tmp_path, "pull", "org/big")
    assert code == 0, said
    path = tmp_path / "models" / "org--big"
    found = (entry for entry in path.rglob("*") if entry.is_file())
    left = {entry.relative_to(path).as_posix() for entry in found} - set(hub.files["org/big"])
    assert left == {"octavo.json"}
    assert len(open_checkpoint(read_model(path))) == 21


def test_revisions(hub: Hub, tmp_path: Path) -> None:
    hub.files["org/model"] = repository_files(tmp_path / "source")
    code, said = octavo(hub, tmp_path, "pull", "org/model", "--revision", "nowhere")
    assert code == 2 and "no such revision" in said
    code, said = octavo(hub, tmp_path, "pull", "org/model", "--revision", "v1")
    assert code == 0, said
    code, said = octavo(hub, tmp_path, "pull", "org/model", "--revision", COMMIT)
    assert code == 0, said
    code, said = octavo(hub, tmp_path, "pull", "org/model", "--revision", "v2")
    assert code == 2 and "--force" in said


def test_no_network_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    code, said = octavo(hub, tmp_path, "pull", "org/model", HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 2 and "could not be fetched" in said and "copy a model directory" in said
    code, said = octavo(hub, tmp_path, "pull", "org/model", HF_HUB_OFFLINE="1")
    assert code == 2 and "HF_HUB_OFFLINE" in said


def test_a_name_of_the_hub_is_fetched_when_it_is_first_used(hub: Hub, tmp_path: Path) -> None:
    hub.files["org/model"] = repository_files(tmp_path / "source")
    code, said = octavo(hub, tmp_path, "--offline", "info", "org/model")
    assert code == 2 and "HF_HUB_OFFLINE is set" in said and not hub.requests
    code, said = octavo(hub, tmp_path, "info", "org/model")
    assert code == 0 and "org/model is not here yet" in said, said
    hub.requests.clear()
    code, said = octavo(hub, tmp_path, "info", "org/model")
    assert code == 0 and not hub.requests
    code, said = octavo(hub, tmp_path, "list")
    assert code == 0 and "org/model" in said
    code, said = octavo(hub, tmp_path, "remove", "org/model")
    assert code == 0 and "is deleted" in said
    code, said = octavo(hub, tmp_path, "remove", "org/model")
    assert code == 2 and "not a pulled model" in said
    code, said = octavo(hub, tmp_path, "list")
    assert code == 0 and "octavo pull" in said


def test_a_whole_model_in_the_hubs_own_cache_is_used(hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--org--model"
    snapshot = cache / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    files = repository_files(tmp_path / "source")
    for name, content in files.items():
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).write_bytes(content)
    where = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    code, said = octavo(hub, tmp_path, "info", "org/model", **where)
    assert code == 0 and COMMIT in said.replace(" ", ""), said
    weights = next(name for name in files if name.endswith(".safetensors"))
    (snapshot / weights).unlink()  # a part of a model is none
    code, said = octavo(hub, tmp_path, "info", "org/model", **where)
    assert code == 2 and "HF_HUB_OFFLINE is set" in said


def test_an_embedding_model_is_fetched_with_its_modules(hub: Hub, tmp_path: Path) -> None:
    """Without a head, as most are published."""
    source = write_embedding_model(tmp_path / "source", "mean", headless=True)
    names = [entry for entry in source.rglob("*") if entry.is_file()]
    hub.files["org/model"] = {
        entry.relative_to(source).as_posix(): entry.read_bytes() for entry in names
    }
    hub.files["org/model"] |= {"tokenizer.json": b"{}", "2_Other/notes.txt": b"x"}
    code, said = octavo(hub, tmp_path, "pull", "org/model")
    assert code == 0, said
    path = tmp_path / "models" / "org--model"
    assert (path / "1_Pooling" / "config.json").is_file() and not (path / "2_Other").exists()
    code, said = octavo(hub, tmp_path, "info", "org/model")
    assert code == 0 and "the mean of all tokens" in said, said
