"""Progress bars: what a terminal shows, what a log gets instead."""

from __future__ import annotations

import io
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from octavo import progress
from octavo.progress import Bar, Progress, Unit, folder_size, request_bar, watch_folder


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is written to a terminal of 100 columns."""
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100, markup=False, highlight=False)
    monkeypatch.setattr("octavo.progress.stderr_console", lambda: console)
    return written


def last_frame(screen: io.StringIO) -> list[str]:
    """The lines of the last picture that was drawn, without colours."""
    text = re.sub(r"\x1b\[[0-9;?]*m", "", screen.getvalue())
    frame = re.split(r"\x1b\[[0-9;?]*[A-Za-z]", text.replace("\r", ""))
    return [line.rstrip() for line in [part for part in frame if part.strip()][-1].splitlines()]


@pytest.mark.parametrize(
    ("unit", "shown"), [("count", "3/12"), ("percent", "25 %"), ("bytes", "3.0/12.0 MB")]
)
def test_a_terminal_shows_how_much_is_done(screen: io.StringIO, unit: Unit, shown: str) -> None:
    size = 1_000_000 if unit == "bytes" else 1
    with Bar(unit, keep=True) as bar:
        bar.update("[x] work", 3 * size, 12 * size, "7 tokens/s")
    (line,) = last_frame(screen)
    assert line.startswith("[x] work") and shown in line and line.endswith("7 tokens/s")


@pytest.mark.parametrize("unit", ["count", "percent", "bytes"])
def test_a_narrow_terminal_shows_it_without_a_bar(unit, screen, monkeypatch) -> None:
    monkeypatch.setattr(progress, "_NARROW", 101)
    with Bar(unit, keep=True) as bar:
        bar.update("loading smollm2-135m", 161_100_000, 269_000_000)
    (line,) = last_frame(screen)
    shown = {"count": "161100000/269000000", "percent": " 60 %", "bytes": "161.1/269.0 MB"}
    assert line == f"loading smollm2-135m {shown[unit]}"


def test_a_stage_takes_the_place_of_the_one_before_unless_it_is_kept(screen: io.StringIO) -> None:
    with Bar("percent", keep=True) as bar:
        bar.update("first", 1, 2)
        bar.update("second", 1, 2)
    assert [line.split()[0] for line in last_frame(screen)] == ["first", "second"]
    screen.truncate(0)
    with Bar("percent") as bar:
        bar.update("third", 1, 2)
        bar.update("fourth", 1, 2)
        bar._bar.refresh()  # type: ignore[union-attr]
        assert [line.split()[0] for line in last_frame(screen)] == ["fourth"]


def test_nothing_is_drawn_before_a_step_begins(screen: io.StringIO) -> None:
    with Bar("bytes") as bar:
        bar.message("[only] a message")
    assert screen.getvalue() == "[only] a message\n"
    with Bar("bytes", quiet=True) as bar:
        bar.update("work", 1, 2)
    assert screen.getvalue() == "[only] a message\n"


def test_one_bar_of_requests_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    turn = threading.Lock()
    drawn = iter((5, 17, 17, 17))
    with request_bar(turn, 3, lambda: next(drawn)) as advance:
        assert advance is not None
        with request_bar(turn, 1, lambda: 0) as second:
            assert second is None
        advance(2)
        advance(0)
    assert not turn.locked()
    written = capsys.readouterr().err
    assert written.count("\n") == 1 and written.startswith("generating: 2/3, ")
    assert "tokens/s" in written
    with pytest.raises(KeyboardInterrupt), request_bar(turn, 1, lambda: 0):
        raise KeyboardInterrupt
    assert not turn.locked()


def test_a_folder_is_watched_while_it_grows(tmp_path: Path) -> None:
    class Recorder(Progress):
        advanced = 0

        def advance(self, count: int) -> None:
            self.advanced += count

    progress = Recorder()
    with watch_folder(progress, tmp_path, already=100):
        (tmp_path / "a").write_bytes(bytes(100_100))
        deadline = time.monotonic() + 20
        while progress.advanced != 100_000 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert progress.advanced == 100_000


def test_a_folder_that_vanishes_while_it_is_measured_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pip's do, between the moment they are listed and the moment they are looked into."""
    for folder in ("kept", "pip-unpack"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_bytes(bytes(7))
    scan = os.scandir

    def vanishing(path: Any) -> Any:
        if str(path).endswith("pip-unpack"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert folder_size(tmp_path) == 7


def test_a_notebook_gets_a_line_that_is_written_over(monkeypatch, capsys):
    """In a notebook's Python, without ipywidgets, which rich's bars would need."""

    class ZMQInteractiveShell:
        """What `get_ipython` gives there; its name is how rich knows a notebook."""

    monkeypatch.setattr("builtins.get_ipython", ZMQInteractiveShell, raising=False)
    now = [0.0]
    monkeypatch.setattr("octavo.progress.time.monotonic", lambda: now[0])
    with request_bar(threading.Lock(), 4, lambda: 40) as advance:
        assert advance is not None
        for _ in range(4):
            now[0] += 0.25
            advance(1)
    shown = capsys.readouterr()
    lines = shown.err.split("\r")
    assert shown.out == "" and lines[0] == "" and shown.err.endswith("\n")
    assert lines[1].startswith("generating: 1/4") and lines[-1].startswith("generating: 4/4")
    widths = [len(line.rstrip("\n")) for line in lines[1:]]
    longest = [len(line.rstrip()) for line in lines[1:]]
    # Nothing of a longer line before is left on the screen.
    assert all(width >= before for before, width in zip(longest, widths[1:], strict=False))
    with Bar("percent", quiet=True) as bar:
        bar.update("loading", 1, 2)
    assert capsys.readouterr().err == ""
