"""The server's page in a browser: tabs that note every problem, and answers that tests choose."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

# The server's own refusals, which tests ask for, are no problems of the page.
_EXPECTED = ("status of 400", "net::ERR_CONNECTION", "net::ERR_INCOMPLETE", "net::ERR_EMPTY")


@contextlib.contextmanager
def tab(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """A page of a fresh browser profile; fails if a script failed, or the policy stopped one."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, **options)
    context.set_default_timeout(15_000)
    origin = "/".join(url.split("/")[:3])
    problems: list[str] = []
    elsewhere: list[str] = []

    def note_request(request: Any) -> None:
        if not request.url.startswith((origin, "data:", "blob:")):
            elsewhere.append(request.url)

    def note_message(message: Any) -> None:
        if message.type == "error" and not any(word in message.text for word in _EXPECTED):
            problems.append(message.text)

    page = context.new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", note_message)
    page.on("request", note_request)
    page.goto(url)
    page.wait_for_selector("#send:not([disabled]), main.text")
    yield page
    context.close()
    assert not problems
    assert not elsewhere


def until(page: Any, expression: str, seconds: float = 15) -> None:
    """Wait until a JavaScript expression is true; wait_for_function needs eval, forbidden here."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(20)


def answer_with(page: Any, text: str, reasoning: str = "") -> None:
    """Let the server's answers be this text behind that reasoning, a few characters an event."""
    deltas = [
        {name: part[i : i + 7]}
        for name, part in (("reasoning", reasoning), ("content", text))
        for i in range(0, len(part), 7)
    ]
    events = []
    for i, delta in enumerate(deltas):
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        usage = {"prompt_tokens": 9, "completion_tokens": i + 1}
        events.append({"id": "chatcmpl-1", "model": "tiny", "choices": [choice], "usage": usage})
    events[-1]["choices"][0]["finish_reason"] = "stop"  # type: ignore[index]
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    body = "".join(lines) + "data: [DONE]\n\n"
    headers = {"content-type": "text/event-stream"}
    page.unroute_all()
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=200, headers=headers, body=body),
    )


def never_ending(page: Any) -> None:
    """Let answers go on to the end of the context: the fake model may end them at any token."""

    def pass_on(route: Any) -> None:
        body = {**route.request.post_data_json, "ignore_eos": True}
        route.continue_(post_data=json.dumps(body))

    page.unroute_all()
    page.route("**/v1/chat/completions", pass_on)


def kept_conversations(page: Any) -> list[dict[str, Any]]:
    """What the browser's database has, after every write and deletion that was asked before."""
    kept: list[dict[str, Any]] = page.evaluate(
        'async () => (await import("/static/store.js")).readAll()'
    )
    return kept


def kept_answer(page: Any) -> str:
    """The first answer of the only conversation, as it came: Markdown shows less of it."""
    (conversation,) = kept_conversations(page)
    nodes = conversation["nodes"].values()
    return str(next(node["content"] for node in nodes if node["role"] == "assistant"))


def ask(page: Any, text: str) -> Any:
    """Send a message and wait for the end of its answer, which is returned."""
    page.locator("#prompt").fill(text)
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant:last-of-type > .facts")
    return page.locator(".message.assistant").last.locator(".text")


def texts(page: Any, selector: str) -> list[str]:
    """The text of each element, as a reader sees it."""
    return [each.inner_text() for each in page.locator(selector).all()]


class Gate:
    """A way to a server that can be cut, as if the server had stopped, and opened again."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._server = (host, int(port))
        self._open: list[socket.socket] = []
        self._port = 0
        self.open()
        self.url = f"http://127.0.0.1:{self._port}"

    def open(self) -> None:
        """Take connections, under the same address as before."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """End all connections in the middle of what they carry, and take no more."""
        for each in [self._listener, *self._open]:
            with contextlib.suppress(OSError):  # the other side may have ended it
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed by cut()
            while True:
                browser = listener.accept()[0]
                server = socket.create_connection(self._server)
                self._open += [browser, server]
                for pair in ((browser, server), (server, browser)):
                    threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
