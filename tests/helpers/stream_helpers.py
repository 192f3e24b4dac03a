"""Running commands in this process with other standard streams, as a shell would give them."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from octavo.cli import main


class Streams:
    """The three streams of a command; they are files in `folder`, or any others."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._monkeypatch = monkeypatch

    def run(
        self,
        words: list[str],
        *,
        given: str | None = "fox\n",
        out: str | None = "out",
        err: str | None = "err",
        encoding: str = "utf-8",
    ) -> tuple[int, str, str]:
        """The exit code, and the texts of both outputs.

        given: the input. out, err: names of files. None: the stream is closed. encoding: of the
        outputs.
        """
        (self._folder / "given").write_text(given or "", encoding="utf-8")
        write = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        names = (None if given is None else "given", out, err)
        before = [os.dup(number) for number in range(3)]
        try:
            for number, name in enumerate(names):
                if name is not None:
                    opened = os.open(self._folder / name, write if number else os.O_RDONLY)
                    os.dup2(opened, number)
                    os.close(opened)
            for number, name in enumerate(names):
                if name is None:
                    os.close(number)
            self._tell_python(words, names, encoding)
            code = main()
            sys.stdout.flush()
        finally:
            for number, saved in enumerate(before):
                os.dup2(saved, number)
                os.close(saved)
        said = (self._folder / (name or "none") for name in (out, err))
        texts = [path.read_text(encoding) if path.is_file() else "" for path in said]
        return code, texts[0], texts[1]

    def _tell_python(self, words: list[str], names: tuple[str | None, ...], encoding: str) -> None:
        """Let sys have what Python's start would have put there."""
        given = None if names[0] is None else open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        outputs = [name and io.TextIOWrapper(io.BytesIO(), encoding) for name in names[1:]]
        for name, stream in zip(("stdin", "stdout", "stderr"), (given, *outputs), strict=True):
            self._monkeypatch.setattr(sys, name, stream)
        self._monkeypatch.setattr(sys, "argv", ["octavo", *words])
