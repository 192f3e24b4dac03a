"""The page: its files and what they may reach; and in a browser, where there is one."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_helpers import error_of, fake_llm, listening, run, serving, slow_down

import octavo
from octavo.engine.events import WAITING_REASONS
from octavo.server.pages import BLANK, FIRST_OWNER, SHARED

STATIC = Path(octavo.__file__).parent / "server" / "static"


def test_every_file_is_served_and_none_reaches_out(tmp_path: Path) -> None:
    files = sorted(STATIC.iterdir())
    assert {"index.html", "style.css", "app.js", "chat.js", "engine.js"} <= {f.name for f in files}

    async def test() -> None:
        async with serving(fake_llm(tmp_path), api_keys=("k",)) as (client, _):
            page = await client.get("/")
            assert page.status_code == 200 and "<title>octavo</title>" in page.text
            assert "default-src 'self'" in page.headers["content-security-policy"]
            for name in re.findall(r'(?:src|href)="(/[^"#]+)"', page.text):
                assert (await client.get(name)).status_code == 200, name
            for file in files:
                assert (await client.get(f"/static/{file.name}")).content == file.read_bytes()
            assert (await client.get("/favicon.ico")).status_code == 200
            for name in ("../app.py", "%2e%2e/app.py", "missing.js"):
                assert (await client.get(f"/static/{name}")).status_code in (401, 404)
            error_of(await client.get("/engine"), 401)

    run(test)
    for file in files:
        elsewhere = re.findall(r"https?://(?!www\.w3\.org/2000/svg)\S+", file.read_text())
        assert not elsewhere, file
    html = (STATIC / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*src=)|\bon\w+=|\bstyle=", html)  # the policy forbids them
    labels = set(re.findall(r'for="([^"]+)"', html))
    assert labels <= set(re.findall(r'id="([^"]+)"', html))
    used = set(re.findall(r'\$\("([\w-]+)"\)', "".join(f.read_text() for f in STATIC.glob("*.js"))))
    assert used <= set(re.findall(r'id="([^"]+)"', html))


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


# ---- in a browser ----

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture(scope="module")
def page_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    llm = fake_llm(tmp_path_factory.mktemp("page"))
    slow_down(llm, 0.004)
    with listening(llm, served_names=("tiny",)) as url:
        yield url


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_in_a_browser(page_url: str) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    problems: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 800}, color_scheme="dark")
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.goto(page_url)
        assert page.locator("html").get_attribute("data-theme") == "dark"
        sync_api.expect(page.locator("#model")).to_contain_text("tiny")

        # With the keyboard alone: settings, a message, its answer.
        page.keyboard.press("Alt+s")
        sync_api.expect(page.locator("#settings")).to_be_visible()
        page.locator("#max_tokens").fill("300")
        page.locator("#temperature").focus()
        page.keyboard.press("Home")
        page.keyboard.press("Alt+s")
        page.locator("#messages").focus()
        page.keyboard.press("/")
        page.keyboard.type("<b>Hi</b>")
        page.keyboard.press("Enter")
        sync_api.expect(page.locator(".message.user .text")).to_have_text("<b>Hi</b>")
        sync_api.expect(page.locator("#stop-button")).to_be_visible()
        sync_api.expect(page.locator("#running")).to_have_text("1")
        page.keyboard.press("Escape")
        facts = page.locator(".message.assistant .facts")
        sync_api.expect(facts).to_contain_text("stopped by you")
        assert page.locator(".message.assistant .text").inner_text()

        page.keyboard.press("Alt+n")
        sync_api.expect(page.locator("#welcome")).to_be_visible()
        page.locator("#suggestions button").first.click()
        sync_api.expect(facts).to_contain_text("written", timeout=30_000)
        facts.get_by_text("Where did the time go?").click()
        sync_api.expect(page.locator("#sentences")).to_contain_text("prompt tokens")
        page.keyboard.press("Escape")
        page.keyboard.press("Alt+t")
        assert page.locator("html").get_attribute("data-theme") == "light"

        # What goes wrong is said in the server's words.
        page.locator("#prompt").fill("x" * 600)
        page.keyboard.press("Enter")
        sync_api.expect(page.locator(".error")).to_contain_text("shorten the prompt")
        browser.close()
    assert [p for p in problems if "400" not in p] == []
