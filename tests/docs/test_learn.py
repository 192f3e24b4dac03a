"""The learning path: chapters show the toys, outputs and tables as they are, and true links."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from doc_blocks import ROOT

FOLDER = ROOT / "docs/learn"
TOYS = sorted((FOLDER / "toys").glob("*.py"))
PICTURES = sorted((FOLDER / "figures").glob("[0-9]*.py"))
CHAPTERS = sorted(FOLDER.glob("0*.md"))
sys.path.insert(0, str(ROOT / "scripts"))


def run(*command: str | Path, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A program's end and output."""
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=folder
    )


def test_chapters_show_toys_outputs_and_figures_as_they_are() -> None:
    done = run(FOLDER / "include.py", "--check")
    assert done.returncode == 0, done.stderr


def test_a_changed_chapter_is_found() -> None:
    """Planted: a number in a toy's printed output."""
    sys.path.insert(0, str(FOLDER))
    from include import filled

    text = (FOLDER / "02_kv_cache.md").read_text(encoding="utf-8")
    assert filled(text) == text
    assert filled(text.replace("computed 10 rows", "computed 11 rows")) == text


@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.name)
def test_a_toy_is_short_and_needs_numpy_alone(toy: Path) -> None:
    text = toy.read_text(encoding="utf-8")
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import)]
    froms = [node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names} | set(froms)
    assert len(text.splitlines()) <= 40
    assert names <= {"numpy", "importlib", "collections"}


def test_an_experiment_without_matplotlib_says_how_to_get_it() -> None:
    script = FOLDER / "experiments/01_forward_pass.py"
    hidden = "import runpy, sys; sys.modules['matplotlib'] = None; sys.path.insert(0, sys.argv[2])"
    done = run("-c", f"{hidden}; runpy.run_path(sys.argv[1])", script, script.parent)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: the plot needs matplotlib")
    assert done.stderr == done.stderr.rstrip() + "\n" and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", PICTURES, ids=lambda script: script.name)
def test_a_picture_is_what_its_script_draws(script: Path, tmp_path: Path) -> None:
    drawn = script.with_suffix(".svg").read_text(encoding="utf-8")
    for name in (script.name, "picture.py"):
        (tmp_path / name).write_text((script.parent / name).read_text(encoding="utf-8"))
    done = run(tmp_path / script.name)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / script.name).with_suffix(".svg").read_text(encoding="utf-8") == drawn


def test_text_that_runs_over_a_picture_s_edge_is_refused() -> None:
    sys.path.insert(0, str(FOLDER / "figures"))
    from picture import Picture

    with pytest.raises(ValueError, match="runs over the edge"):
        Picture(100, "").label(300, 20, "a text that does not fit beside it")


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)
def test_a_chapter_has_all_its_parts(chapter: Path) -> None:
    text = chapter.read_text(encoding="utf-8")
    name = chapter.stem
    for part in ("**Why.**", "## The idea", "## A toy", "## In octavo", "## Experiment"):
        assert part in text, part
    for part in (f"program toys/{name}.py", f"output toys/{name}.py", f"experiments/{name}.svg"):
        assert part in text, part
    assert re.search(r"!\[[^\]]{20,}\]\(figures/", text), "no picture that is described"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)
def test_links_to_functions_name_what_is_there(chapter: Path) -> None:
    from site_sources import NAME, line_of, links_to_sources

    links = list(links_to_sources(chapter.read_text(encoding="utf-8"), chapter, ROOT))
    named = [(link, NAME.search(link.match["text"])) for link in links]
    missing = [
        f"{link.match['text']} in {link.file}"
        for link, name in named
        if name and line_of(link.file, name[1]) is None
    ]
    assert not missing and sum(name is not None for _, name in named) >= 3
