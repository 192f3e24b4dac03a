"""The page and the documentation: their files, what they may reach, and what they show."""

from __future__ import annotations

import base64
import hashlib
import html as html_text
import json
import re
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from embedding_helpers import LIMITS, write_embedding_model
from server_helpers import error_of, events_of, fake_llm, run, serving, slow_down

import octavo
from octavo.engine.events import WAITING_REASONS
from octavo.llm import LLM
from octavo.server.embeddings import EmbeddingBody
from octavo.server.pages import BLANK, FIRST_OWNER, SHARED
from octavo.server.protocol import PromptBody

STATIC = Path(octavo.__file__).parent / "server" / "static"


OWN = [path for path in sorted(STATIC.iterdir()) if path.is_file()]
VENDOR = sorted((STATIC / "vendor").iterdir())
PAGES = ("index.html", "docs.html")


def test_every_file_is_served_and_the_policy_is_strict(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(fake_llm(tmp_path), api_keys=("k",)) as (client, _):
            for address in ("/", "/docs"):
                page = await client.get(address)
                assert page.status_code == 200 and "octavo</title>" in page.text
                policy = page.headers["content-security-policy"]
                rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
                assert rules["default-src"] == "'none'"
                assert rules["script-src"] == rules["style-src"] == "'self'"
                assert rules["require-trusted-types-for"] == "'script'"
                assert "unsafe" not in policy and "http" not in policy and "*" not in policy
                for name in re.findall(r'(?:src|href)="(/[^"#]*)"', page.text):
                    assert (await client.get(name)).status_code == 200, name
            for file in [*OWN, *VENDOR]:
                address = f"/static/{file.relative_to(STATIC)}"
                response = await client.get(address)
                assert response.content == file.read_bytes()
                assert response.headers["cache-control"] == "no-cache"
                if file.suffix in (".js", ".mjs"):
                    assert "javascript" in response.headers["content-type"]
                again = {"If-None-Match": response.headers["etag"]}
                assert (await client.get(address, headers=again)).status_code == 304
            assert (await client.get("/favicon.ico")).status_code == 200
            for name in ("../app.py", "%2e%2e/app.py", "missing.js"):
                assert (await client.get(f"/static/{name}")).status_code in (401, 404)
            error_of(await client.get("/engine"), 401)

    run(test)


def test_the_page_reaches_no_other_host_and_stays_readable() -> None:
    for file in OWN:
        text = file.read_text()
        elsewhere = re.findall(r"https?://(?!www\.w3\.org/2000/svg)\w\S+", text)
        assert not elsewhere, file
        assert len(text.splitlines()) <= 400, file
    for name in PAGES:
        html = (STATIC / name).read_text()
        # The policy forbids all of these.
        assert not re.search(r"<script(?![^>]*src=)|\bon\w+=|\bstyle=|<style", html)
        ids = re.findall(r'\bid="([^"]+)"', html)
        assert len(ids) == len(set(ids))
        pointed = re.findall(
            r'(?:\bfor|aria-controls|popovertarget|aria-labelledby)="([^"]+)"', html
        )
        pointed += re.findall(r'href="#([^"]+)"', html)
        assert set(pointed) <= set(ids)
    ids = set(re.findall(r'id="([^"]+)"', "".join((STATIC / name).read_text() for name in PAGES)))
    used = {i for f in STATIC.glob("*.js") for i in re.findall(r'\$\("([\w-]+)"\)', f.read_text())}
    assert used and used <= ids


def test_the_libraries_are_those_that_their_table_names() -> None:
    table = (STATIC / "vendor" / "README.md").read_text()
    rows = re.findall(r"^\| `([\w.-]+)` \| (\S+)@([\d.]+) \|.*`(\w{64})` \|$", table, re.M)
    scripts = {file.name for file in VENDOR if file.suffix in (".js", ".mjs")}
    assert {name for name, *_ in rows} == scripts and len(scripts) == 3
    for name, _, version, digest in rows:
        content = (STATIC / "vendor" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest, name
        assert version in content[:400].decode(), name  # each says its version in its first lines
    assert len([file for file in VENDOR if file.name.startswith("LICENSE-")]) == 3


CODE = re.compile(r'<pre><code class="language-(\w+)">(.*?)</code></pre>', re.S)


NAME = """the "one's" <b>"""  # must be written as HTML, as JSON, and within quotes of a shell


async def send_as_curl(client: httpx.AsyncClient, command: str) -> httpx.Response:
    """Send what one curl command of the documentation would."""
    words = shlex.split(command.replace("\\\n", " ").replace("$OCTAVO_API_KEY", "k"))
    words = [word for word in words if word != "-N"]
    assert words[0] == "curl" and words[1].startswith("http://server/")
    pairs = list(zip(words[2::2], words[3::2], strict=True))
    assert {option for option, _ in pairs} <= {"-H", "-d"}
    headers = dict(value.split(": ") for option, value in pairs if option == "-H")
    bodies = [value for option, value in pairs if option == "-d"]
    if not bodies:
        return await client.get(words[1], headers=headers)
    assert json.loads(bodies[0])["model"] == NAME
    return await client.post(words[1], headers=headers, content=bodies[0])


@pytest.mark.parametrize("gives", ["texts", "vectors"])
def test_the_documentation_has_examples_that_run_as_they_are_printed(
    tmp_path: Path, gives: str
) -> None:
    template = "{% for m in messages %}{{ m.content[:3] }}{% endfor %}A"

    async def test() -> None:
        if gives == "texts":
            llm = fake_llm(tmp_path, template)
        else:
            llm = LLM(write_embedding_model(tmp_path, tokenizer=True), **LIMITS)
        async with serving(llm, api_keys=("k",), served_names=(NAME,)) as (client, _):
            page = (await client.get("/docs")).text
            assert "{{" not in page and "<b>" not in page
            anchors = re.findall(r'<h2 id="([\w-]+)">', page)
            assert re.findall(r'<a href="#([\w-]+)">', page.partition("<main")[0]) == anchors
            examples = [(kind, html_text.unescape(code)) for kind, code in CODE.findall(page)]
            commands = [
                command
                for kind, code in examples
                if kind == "bash"
                for command in re.split(r"\n(?=curl )", code)
            ]
            assert len(commands) == (11 if gives == "texts" else 6)
            paths = {command.split()[1].removeprefix("http://server") for command in commands}
            assert ("/v1/chat/completions" in paths) == (gives == "texts")
            assert ("/v1/embeddings" in paths) == (gives == "vectors")
            if gives == "vectors":
                own = EmbeddingBody.model_fields.keys() - PromptBody.model_fields.keys()
                named = set(re.findall(r"<tr><td><code>(\w+)</code>", page))
                assert own - {"add_special_tokens"} <= named
            for command in commands:
                response = await send_as_curl(client, command)
                assert response.status_code == 200, response.text
                if "include_usage" in command:
                    assert events_of(response.text)[-1]["usage"]["completion_tokens"] > 0
                if "json_schema" in command:
                    answer = response.json()["choices"][0]
                    if answer["finish_reason"] == "stop":
                        assert set(json.loads(answer["message"]["content"])) == {"city", "country"}
            (python,) = [code for kind, code in examples if kind == "python"]
            compile(python, "docs", "exec")
            assert 'base_url="http://server/v1"' in python
            routes = (await client.get("/openapi.json")).json()["paths"]
            assert {"/v1/chat/completions", "/tokenize", "/engine"} <= set(routes)

    run(test)


def test_the_live_view(tmp_path: Path) -> None:
    llm = fake_llm(tmp_path, num_blocks=64)

    async def test() -> None:
        slow_down(llm, 0.01)
        async with serving(llm) as (client, _):
            import asyncio

            before = (await client.get("/engine")).json()
            assert set(base64.b64decode(before["blocks"]["map"])) == {BLANK}
            assert len(base64.b64decode(before["blocks"]["map"])) == 64
            body = {"max_tokens": 60, "ignore_eos": True, "n": 2}
            prompts = [letter * 21 for letter in "ABCDEF"]  # alike they would share, and all fit
            posts = [
                asyncio.ensure_future(client.post("/v1/completions", json={**body, "prompt": text}))
                for text in prompts
            ]
            running: list[dict[str, Any]] = []
            states = b""
            # The answers of one request share their prompt, once it has been computed.
            while SHARED not in states or not any(r["output_tokens"] > 0 for r in running):
                await asyncio.sleep(0.03)
                now = (await client.get("/engine")).json()
                running = [r for r in now["requests"] if r["state"] == "running"]
                states = base64.b64decode(now["blocks"]["map"])
            assert running
            assert len(running) <= len(now["requests"]) <= 6
            assert now["stats"]["num_running"] > 0 and now["stats"]["num_waiting"] > 0
            assert now["stats"]["waiting_for"] in WAITING_REASONS.values()
            metrics = (await client.get("/metrics")).text
            waits = r'octavo:num_requests_waiting_for\{.*reason="\w+"\} [1-9]'
            assert re.search(waits, metrics)
            assert re.search(r'waiting_by_reason\{.*reason="capacity"\} [1-9]', metrics)
            owners = {owner for request in running for owner in request["owners"]}
            assert owners and owners <= {state for state in states if state >= FIRST_OWNER}
            assert all(r["ttft"] is not None for r in running if r["output_tokens"] > 0)
            assert now["speed"]["tokens_per_second"] > 0
            responses = await asyncio.gather(*posts)
            assert all(response.status_code == 200 for response in responses)
            metrics = (await client.get("/metrics")).text
            assert not re.search(waits, metrics)  # what nobody waits for is taken back
            assert re.search(r'waiting_by_reason\{.*reason="capacity"\} 0', metrics)

            found = (await client.get(f"/engine/requests/{responses[0].json()['id']}")).json()
            assert len(found["sentences"]) >= 3 and "21 prompt tokens" in found["sentences"][0]
            error_of(await client.get("/engine/requests/nobody"), 404)
            body = {"prompt": ["ABCD", "xyz"], "max_tokens": 2, "n": 2}
            name = (await client.post("/v1/completions", json=body)).json()["id"]
            found = (await client.get(f"/engine/requests/{name}")).json()
            assert found["id"] == name and len(found["requests"]) == 2
            for each, count in zip(found["requests"], (4, 3), strict=True):
                assert f"{count} prompt tokens" in each["sentences"][0]
                url = f"/engine/requests/{quote(each['id'])}"
                assert (await client.get(url)).json() == each
            log = (await client.get("/engine/events")).text.splitlines()
            assert '"event": "log"' in log[0] and len(log) > 50

    run(test)


def test_the_event_log_goes_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    async def test() -> None:
        async with serving(fake_llm(tmp_path), event_log=path) as (client, _):
            body = {"prompt": "ABC", "max_tokens": 3, "ignore_eos": True}
            answer = (await client.post("/v1/completions", json=body)).json()
            assert f'"request": "{answer["id"]}"' in path.read_text()

    run(test)


OFFERED = (
    *("/", "/docs", "/static/base.css", "/openapi.json", "/health", "/ready", "/ping", "/version"),
    *("/metrics", "/engine", "/v1/models", "/v1/models/tiny"),
)


@pytest.mark.parametrize("path", [*OFFERED, "/v1/models/none", "/none", "/v1/completions"])
def test_head_is_get_without_the_body(page_url: str, path: str) -> None:
    with httpx.Client(base_url=page_url, headers={"x-request-id": "a"}) as client:
        got, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (got.status_code, b"")
        expected = 405 if path == "/v1/completions" else 200 if path in OFFERED else 404
        assert head.status_code == expected
        for name in ("content-type", "x-request-id", "allow", "etag", "content-security-policy"):
            assert head.headers.get(name) == got.headers.get(name), name
        assert int(head.headers["content-length"]) > 0
        assert client.get("/version").json().keys() == {"version"}  # on the same connection
