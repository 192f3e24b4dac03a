"""Take the pictures of the page that the README shows: docs/images/page-light.png and -dark.png.

    python scripts/screenshots.py

It needs octavo[browser], a Chromium and the demo model. It starts a server with the demo model,
asks it a few things in a headless browser, lets other requests run beside so that the engine has
something to do, and takes a picture in each light.
Every text in them is the model's own; the speeds are of the machine that the script runs on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
SIZE = {"width": 1280, "height": 800}
MOST_BYTES = 150_000
QUESTIONS = ("What is the capital of France?", "Name three kinds of whales.")
LAST = "Write a Python function that returns the sum of a list of numbers, and explain it briefly."
BESIDE = 10  # requests that run while the picture is taken


def start_server(model: str) -> tuple[subprocess.Popen[str], str]:
    """The server's process and its address, once it takes requests."""
    command = [sys.executable, "-m", "octavo", "serve", model, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--log-format", "json"], stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr or ():
        entry = json.loads(line) if line.startswith("{") else {}
        if entry.get("event") == "ready":
            threading.Thread(target=process.communicate, daemon=True).start()  # never full
            return process, re.sub("/$", "", entry["url"])
    raise SystemExit("the server did not start: is the demo model there (octavo pull)?")


def post(url: str, index: int) -> None:
    """One of the requests beside: a prompt and an answer of its own length."""
    body = {
        "prompt": f"Chapter {index}. "
        + "It was a long way to the sea, and the wind blew. " * index,
        "max_tokens": 600,
        "ignore_eos": True,
        "temperature": 0.8,
        "seed": index,
    }
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with contextlib.suppress(OSError), urllib.request.urlopen(request) as response:
        response.read()  # the server ends before it does


def ask(page: Any, text: str) -> None:
    page.keyboard.press("Alt+n")
    page.fill("#prompt", text)
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant > .facts", timeout=120_000)


def take_pictures(url: str, chromium: str, seconds: float) -> None:
    from playwright.sync_api import sync_playwright

    IMAGES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(url)
        page.wait_for_selector("#send:not([disabled])")
        page.keyboard.press("Alt+s")
        page.locator("#temperature").press("Home")  # the same words each time
        page.locator("#max_tokens").fill("300")
        page.locator("#keep-settings").click()
        page.keyboard.press("Alt+e")
        for question in (*QUESTIONS, LAST):
            ask(page, question)
        page.evaluate("document.querySelector('#messages').scrollTop = 0")
        threads = [threading.Thread(target=post, args=(url, i), daemon=True) for i in range(BESIDE)]
        for thread in threads:
            thread.start()
            time.sleep(seconds / BESIDE)  # so that the speed has a history
        for name in ("light", "dark"):
            path = IMAGES / f"page-{name}.png"
            page.screenshot(path=path)
            print(f"{path}  {path.stat().st_size} bytes")
            if path.stat().st_size > MOST_BYTES:
                raise SystemExit(f"{path} has more than {MOST_BYTES} bytes")
            page.keyboard.press("Alt+t")
            page.wait_for_timeout(400)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--chromium", default=shutil.which("chromium") or "chromium")
    parser.add_argument("--seconds", type=float, default=10, help="of work before the pictures")
    arguments = parser.parse_args()
    process, url = start_server(arguments.model)
    try:
        take_pictures(url, arguments.chromium, arguments.seconds)
    finally:
        process.kill()  # nobody waits for the requests beside
        process.wait()


if __name__ == "__main__":
    main()
