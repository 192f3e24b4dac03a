"""Files that a user names: typed errors, and what is left behind."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from octavo.engine.events import EventLog, EventLogFile
from octavo.errors import FileError, InsufficientMemoryError
from octavo.files import check_writable, map_file, read_text, write_text
from octavo.weights.gguf import GgufFile

FULL = Path("/dev/full")  # a file on a disk that is always full
pytestmark = pytest.mark.skipif(not FULL.is_char_device(), reason="needs /dev/full, as Linux has")


def test_the_python_api_has_typed_errors(tmp_path, monkeypatch):
    log = EventLog()
    for path in (tmp_path / "no" / "such", tmp_path, FULL):
        with pytest.raises(FileError, match="the event log cannot be written"):
            EventLogFile(log, path)
        with pytest.raises(FileError, match="the event log cannot be written"):
            log.write(path)
    file = EventLogFile(log, tmp_path / "log.jsonl")
    file.close()
    with FULL.open("w") as full:
        monkeypatch.setattr(file, "_file", full)
        log.record((1.0, "first_token", "0"))
        with pytest.raises(FileError, match="the disk is full; free some space"):
            file.flush()
        with pytest.raises(FileError):
            file.close()


def test_write_text(tmp_path):
    path = tmp_path / "page.html"
    link = tmp_path / "link"
    link.symlink_to(path)
    write_text(link, "the page", "Grüße\r\n")
    assert link.is_symlink() and path.read_bytes() == "Grüße\r\n".encode()
    assert read_text(path, "a page") == "Grüße\r\n"
    read, write = os.pipe()
    write_text(f"/dev/fd/{write}", "the page", "x")
    assert os.read(read, 9) == b"x"
    os.close(read)
    os.close(write)
    # Only now: as root, a write_text that replaces what it should write to would replace this.
    with pytest.raises(FileError, match="the page cannot be written to .*: the disk is full"):
        write_text(FULL, "the page", "x" * 100_000)
    assert FULL.is_char_device()
    check_writable(path, "the page")
    assert sorted(tmp_path.iterdir()) == [link, path]  # no part of a file is left


def test_what_is_written_stays_as_it_was_if_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("before")

    def fail(self: Path, content: bytes) -> None:
        self.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(FileError, match="free some space"):
        write_text(path, "the page", "after")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_the_limit_of_addresses_leaves_no_room_for(tmp_path, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    path = tmp_path / "model.gguf"
    path.write_bytes(b"x" * 1234)
    assert map_file(path)[:] == b"x" * 1234
    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(InsufficientMemoryError, match=r"model\.gguf .* 1,234 bytes .*`ulimit -v"):
        GgufFile(path)
