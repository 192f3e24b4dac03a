"""The site: built without a warning, nothing from another host, every page in the navigation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from doc_blocks import ROOT

pytest.importorskip("mkdocs", reason="mkdocs is not installed: `pip install 'octavo[docs]'`")
FETCHED = re.compile(
    r"<(?:script|img|iframe|source)[^>]* src=[\"']?(?:https?:)?//|"
    r"<link[^>]*rel=[\"']?(?:stylesheet|preload|icon|preconnect)[^>]*href=[\"']?(?:https?:)?//"
)


def build(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run mkdocs into a folder."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


def test_nothing_comes_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    assert [page for page in pages if FETCHED.search(page.read_text(encoding="utf-8"))] == []
    styles = "".join(style.read_text(encoding="utf-8") for style in site.rglob("*.css"))
    assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", styles)
    # What would be fetched by the theme's program if a page asked for it: diagrams.
    assert not any('class="mermaid"' in page.read_text(encoding="utf-8") for page in pages)


def test_fetching_is_found() -> None:
    """Planted: what the check above must find."""
    assert FETCHED.search('<script src="https://cdn.example/x.js">')
    assert FETCHED.search('<link rel="stylesheet" href="//fonts.example/x.css">')
    assert not FETCHED.search('<a href="https://example.org">')


def test_links_to_functions_open_their_line(site: Path) -> None:
    page = (site / "learn/04_paging.html").read_text(encoding="utf-8")
    (line,) = re.findall(
        r'block_manager\.py\.html#__codelineno-0-(\d+)"><code>BlockManager.reserve', page
    )
    source = (ROOT / "python/octavo/engine/block_manager.py").read_text(encoding="utf-8")
    assert "def reserve" in source.splitlines()[int(line) - 1]
    shown = (site / "source/python/octavo/engine/block_manager.py.html").read_text(encoding="utf-8")
    assert f'id="__codelineno-0-{line}"' in shown


def test_pages_of_the_index_are_those_of_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    listed = set(re.findall(r"\b(\w+\.md)\b", navigation))
    assert pages <= listed
    assert pages <= set(re.findall(r"\((\w+\.md)", index)), "docs/README.md lacks pages"


def test_a_broken_link_fails(tmp_path: Path) -> None:
    """Planted: a page with a link to an anchor that is not there."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/README.md").write_text("# A\n\n[b](#no-such-heading) [c](missing.md)\n")
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    text = text[: text.index("\nnav:")].replace("scripts/", f"{ROOT}/scripts/")
    (tmp_path / "mkdocs.yml").write_text(text, encoding="utf-8")
    done = build(tmp_path / "out", "--config-file", str(tmp_path / "mkdocs.yml"))
    assert done.returncode != 0
    assert "no-such-heading" in done.stderr and "missing.md" in done.stderr
