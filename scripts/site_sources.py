"""For mkdocs: files outside docs/ that the documentation links to become pages of the site.

On a Git host a link such as ../csrc/core/decoder.cpp shows the file. In the site it leads to a page
under source/ with the same file: code with colours and line numbers, Markdown as a page, whose own
links are followed in the same way. Where the link's text ends with the name of a function or class
in backticks, the page opens at its line.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"\[(?P<text>[^\[\]]*)\]\((?P<target>[^()\s#]+)(?P<anchor>#[^()\s]*)?\)")
NAME = re.compile(r"`(?:\w+(?:\.|::))?(\w+)`\Z")
LANGUAGES = {
    "py": "python",
    "pyi": "python",
    "h": "cpp",
    "cu": "cuda",
    "cuh": "cuda",
    "yml": "yaml",
}
IMAGES = {".svg", ".png"}


class Link(NamedTuple):
    """A link to a file of the repository that is no page of docs/."""

    match: re.Match[str]
    file: Path
    uri: str  # of its page in the site's sources


def links_to_sources(markdown: str, origin: Path, root: Path) -> Iterator[Link]:
    """The links of a page, written in the file `origin`, that need pages made for them."""
    docs = root / "docs"
    for match in LINK.finditer(markdown):
        file = Path(os.path.normpath(origin.parent / match["target"]))
        if file.is_dir():
            file /= "README.md"
        if not file.is_file() or not file.is_relative_to(root):
            continue  # another host's, or one that mkdocs complains about
        is_of_docs = file.is_relative_to(docs) and file.suffix in {".md", *IMAGES}
        if is_of_docs and origin.is_relative_to(docs):
            continue
        path = file.relative_to(root).as_posix()
        uri = f"source/{path}" if file.suffix in {".md", *IMAGES} else f"source/{path}.md"
        yield Link(match, file, file.relative_to(docs).as_posix() if is_of_docs else uri)


def line_of(file: Path, name: str) -> int | None:
    """The line, from 1, on which a function, class or constant of this name is defined."""
    text = file.read_text(encoding="utf-8")
    word = re.escape(name)
    if file.suffix in (".py", ".pyi"):
        pattern = rf"^\s*(?:async )?(?:def|class) {word}\b|^{word}\b.*="
    else:  # of C++ a definition, else the first line that names it
        pattern = rf"^[^\n;/]*\b{word}\([^;]*?\{{|\b(?:struct|class) {word}\b"
    found = re.search(pattern, text, re.MULTILINE)
    return (
        text.count("\n", 0, found.start() + len(found[0]) - len(found[0].lstrip())) + 1
        if found
        else None
    )


def page_of(file: Path, root: Path) -> str:
    """The Markdown of a source file's page."""
    text = file.read_text(encoding="utf-8")
    front = "---\nsearch: {exclude: true}\n---\n"
    if file.suffix == ".md":
        return front + text
    extension = file.suffix.lstrip(".")
    language = LANGUAGES.get(extension, extension or "text")
    fence = "~~~~~~~~"
    title = file.relative_to(root).as_posix().replace("_", r"\_")
    return f"{front}# {title}\n\n{fence}{{.{language} linenums=1}}\n{text}\n{fence}\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each source file that is linked to, from pages or from such pages."""
    root = Path(config.config_file_path).parent
    to_read = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    while to_read:
        origin = to_read.pop()
        for link in links_to_sources(origin.read_text(encoding="utf-8"), origin, root):
            if not link.uri.startswith("source/") or link.uri in files.src_uris:
                continue
            if link.file.suffix in IMAGES:
                files.append(File.generated(config, link.uri, abs_src_path=str(link.file)))
                continue
            files.append(File.generated(config, link.uri, content=page_of(link.file, root)))
            if link.file.suffix == ".md":
                to_read.append(link.file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a page to the pages that were added."""
    root, uri = Path(config.config_file_path).parent, page.file.src_uri
    origin = (
        root / uri.removeprefix("source/") if uri.startswith("source/") else root / "docs" / uri
    )
    if origin.suffix != ".md" or not origin.is_file():
        return markdown
    for link in reversed(list(links_to_sources(markdown, origin, root))):
        match = link.match
        target = posixpath.relpath(link.uri, posixpath.dirname(uri) or ".")
        line = None
        if (named := NAME.search(match["text"])) and link.file.suffix not in {".md", *IMAGES}:
            line = line_of(link.file, named[1])
        attributes = f"{{: data-line={line} }}" if line else ""
        new = f"[{match['text']}]({target}{match['anchor'] or ''}){attributes}"
        markdown = markdown[: match.start()] + new + markdown[match.end() :]
    return markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to a function open its line; here, as mkdocs does not know anchors of lines."""
    return re.sub(r'<a data-line="(\d+)" href="([^"#]*)"', r'<a href="\2#__codelineno-0-\1"', html)
