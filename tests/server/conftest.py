"""A browser for the tests of the page, where there is one.

Playwright's loop runs in this thread while a browser is open, so tests that use one stand in files
of their own, apart from those that call asyncio.run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from server_helpers import fake_llm, listening, slow_down

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture(scope="module")
def page_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a fake model under two names."""
    llm = fake_llm(tmp_path_factory.mktemp("page"))
    slow_down(llm, 0.004)
    with listening(llm, served_names=("tiny", "small")) as url:
        yield url


@pytest.fixture(scope="module")
def browser(page_url: str) -> Iterator[Any]:
    """A headless Chromium; it depends on the server so that it is closed before it."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine (apt install chromium)")
    reason = "Playwright is not installed (pip install 'octavo[browser]')"
    sync_api = pytest.importorskip("playwright.sync_api", reason=reason)
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()
